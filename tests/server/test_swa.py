"""View `swa`: the mean of the server's models over the last rounds, evaluated, kept and handed out as others are."""

import shutil

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn

from fedlight import HessianSpectrum
from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.run.loggers import read_metrics
from fedlight.server.state import summed_rounds
from tests.helpers.tiny import Clients, Regression, quiet_trainer

MODELS: dict[str, list[torch.Tensor]] = {}
VIEWS: dict[str, list[torch.Tensor | None]] = {}


class Watch(Callback):
    def on_round_end(self, trainer, module):
        state = trainer.federation.state
        MODELS.setdefault(trainer.name, []).append(state.algorithm["params"].double())
        VIEWS.setdefault(trainer.name, []).append(state.views.get("swa"))


def trainer(root, name, rounds=8, callbacks=(), **settings):
    MODELS.pop(name, None), VIEWS.pop(name, None)
    views = {"views": ["server", "swa"], "enable_checkpointing": True, "name": name}
    return quiet_trainer(root, max_rounds=rounds, callbacks=[Watch(), *callbacks], **{**views, **settings})


def net():
    return Regression(0.1, nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))


def data():
    return Clients((6, 8, 8, 4))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Eight rounds; the view's are the last two."""
    made = trainer(tmp_path_factory.mktemp("swa"), "whole")
    made.fit(net(), data())
    return made


def mean(name, rounds):
    return torch.stack([MODELS[name][r - 1] for r in rounds]).mean(0)


def test_it_is_the_mean_of_the_last_quarter_and_nothing_before(whole):
    assert VIEWS["whole"][:6] == [None] * 6
    assert torch.equal(VIEWS["whole"][6], MODELS["whole"][6].float())
    torch.testing.assert_close(VIEWS["whole"][7].double(), mean("whole", [7, 8]), rtol=1e-7, atol=1e-8)
    rows = read_metrics(whole.run_dir / "metrics.csv")
    logged = ["val/loss_swa" in row and row["val/loss_swa"] == row["val/loss_swa"] for row in rows]
    assert logged == [False] * 6 + [True] * 2
    assert rows[6]["val/loss_swa"] == pytest.approx(rows[6]["val/loss"], rel=1e-6)  # of one model, with its buffers
    assert rows[7]["val/loss_swa"] != rows[7]["val/loss"]


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({"swa_start": 0.0}, range(1, 7)),
        ({"swa_start": 0.5}, [4, 5, 6]),
        ({"swa_start": 0.34}, [3, 4, 5, 6]),  # 2.04 rounds
        ({"swa_start": 0.34, "swa_every_n_rounds": 2}, [4, 6]),  # the end of each cycle of two
    ],
)
def test_the_start_and_the_cycle_are_settings(settings, rounds, tmp_path):
    made = trainer(tmp_path, "settings", 6, **settings)
    made.fit(net(), data())
    torch.testing.assert_close(VIEWS["settings"][-1].double(), mean("settings", rounds), rtol=1e-6, atol=1e-8)
    assert made.federation.state.swa["count"] == len(rounds)


def test_a_continued_run_has_the_same_bits(whole, tmp_path):
    trainer(tmp_path, "stopped", callbacks=[Stop(7)]).fit(net(), data())
    again = trainer(tmp_path, "stopped")
    again.fit(net(), data(), ckpt_path="last")
    assert torch.equal(VIEWS["stopped"][-1], VIEWS["whole"][-1])
    assert again.federation.state.swa["count"] == 2


class Stop(Callback):
    def __init__(self, round):
        self.round = round

    def on_round_end(self, trainer, module):
        trainer.should_stop = trainer.current_round == self.round


def test_a_run_that_is_prolonged_begins_its_mean_anew(whole, tmp_path, capsys, caplog):
    """Of 12 rounds the last three count: what was summed up to round 8, of 8, does not."""
    longer = trainer(tmp_path, "longer", 12)
    copy = shutil.copytree(whole.run_dir, tmp_path / "longer" / "version_0")
    longer.fit(net(), data(), ckpt_path=copy / "checkpoints" / "last.ckpt")
    assert VIEWS["longer"][0] is None  # round 9
    torch.testing.assert_close(VIEWS["longer"][-1].double(), mean("longer", [2, 3, 4]), rtol=1e-6, atol=1e-8)
    assert "swa begins late" not in capsys.readouterr().err + caplog.text


def test_a_mean_that_lacks_rounds_says_so(caplog, capsys):
    one = torch.ones(2)
    kept = summed_rounds({}, one, 7, begin=6, every=1)
    assert summed_rounds(kept, one, 8, begin=6, every=1)["sum"].tolist() == [2.0, 2.0]
    anew = summed_rounds(kept, 3 * one, 10, begin=8, every=1)  # prolonged when it was too late for round 9
    assert (anew["sum"].tolist(), int(anew["first"]), int(anew["count"])) == ([3.0, 3.0], 10, 1)
    assert "swa begins late, with round 10 instead of 9" in capsys.readouterr().err + caplog.text


def test_it_is_validated_exported_and_chosen_like_other_views(whole, tmp_path):
    last = whole.run_dir / "checkpoints" / "last.ckpt"
    again = trainer(tmp_path, "again")
    (metrics,) = again.validate(net(), data(), ckpt_path=last, verbose=False)
    row = read_metrics(whole.run_dir / "metrics.csv")[-1]
    assert metrics["val/loss_swa"] == pytest.approx(row["val/loss_swa"], rel=1e-6)
    again.export(net(), data(), last, to=tmp_path / "model.pt", view="swa")
    module = net()
    module.load_state_dict(torch.load(tmp_path / "model.pt"))
    torch.testing.assert_close(nn.utils.parameters_to_vector(module.parameters()).detach(), VIEWS["whole"][-1])
    early = trainer(tmp_path, "early", 2, swa_start=0.9, callbacks=[Stop(1)])
    early.fit(net(), data())
    with pytest.raises(MisconfigurationException, match=r"view='swa': .* has the views \['server'\]"):
        early.export(net(), data(), "last", to=tmp_path / "model.pt", view="swa")


def test_before_its_first_round_nothing_is_measured_of_it(tmp_path, capsys, caplog):
    spectrum = HessianSpectrum(1, density=False, trace=False, layerwise=False, views=["swa"])
    best = Checkpoint(monitor="val/loss_swa")
    made = trainer(tmp_path, "measured", 4, callbacks=[spectrum, best], swa_start=0.5)
    made.fit(net(), data())
    rows = read_metrics(made.run_dir / "metrics.csv")
    logged = [row.get("hessian/lambda_max_swa", float("nan")) for row in rows]
    assert [value == value for value in logged] == [False, False, True, True]
    assert (made.run_dir / "checkpoints" / "best.ckpt").exists()
    said = capsys.readouterr().err + caplog.text
    assert "best.ckpt: the round with the smallest val/loss_swa." in said
    assert "best.ckpt is not written" not in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"swa_start": 1.0}, r"trainer\.swa_start=1\.0 must be at least 0 and below 1"),
        ({"swa_start": -0.1}, r"trainer\.swa_start=-0\.1 must be"),
        ({"swa_every_n_rounds": 0}, r"trainer\.swa_every_n_rounds=0 must be a whole number of at least 1"),
        ({"views": ["swa"]}, r"trainer\.views=\['swa'\] must hold 'server'"),
    ],
)
def test_bad_settings_are_refused(settings, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, "bad", **settings)
