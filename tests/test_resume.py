"""A run is continued as the same experiment, or its folder says from which round it is another."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

from fedlight.algorithms.feddyn import FedDyn
from fedlight.algorithms.fedprox import FedProx
from fedlight.algorithms.scaffold import SCAFFOLD
from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.cli.command import main
from fedlight.data import IID, DatasetPartition, DirichletClients
from fedlight.data.reading import class_names
from fedlight.penalties.man import MAN
from fedlight.perturbations import SAM
from fedlight.report.runs import read_run
from fedlight.run.checkpoint import load_checkpoint
from fedlight.run.folder import keep_config
from fedlight.run.loggers import read_metrics
from fedlight.run.resume import record_changes
from fedlight.server.sampling import Bernoulli
from tests.helpers.tiny import Clients, Regression, quiet_trainer, seeded, weights
from tests.test_cli import QUIET, TINY


class Net(Regression):
    """A net with a layer for MAN, momentum and a schedule of rounds."""

    def __init__(self, lr=0.1, momentum=0.5, gamma=0.9, dropout=0.1):
        super().__init__(lr, nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4, 1)))
        self.momentum, self.gamma = momentum, gamma

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, self.gamma), "interval": "round"}]


def data(partitioner=None, num_clients=4, batch_size=4, seed=0, shift=0.0, **settings):
    x = seeded(40, 3) + shift
    return DatasetPartition(
        TensorDataset(x, x.sum(1)),
        TensorDataset(seeded(8, 3), torch.zeros(8)),
        num_clients=num_clients,
        partitioner=partitioner or DirichletClients(0.5),
        targets=(torch.arange(40) % 4).tolist(),
        batch_size=batch_size,
        seed=seed,
        **settings,
    )


def settings(**changed):
    return {"algorithm": FedProx(0.1), "perturbation": SAM(0.05), "callbacks": [MAN(0.1)], **changed}


def fit(folder, rounds, model=None, on=None, ckpt_path=None, **changed):
    trainer = quiet_trainer(folder, max_rounds=rounds, **settings(**changed))
    model = model or Net()
    trainer.fit(model, on or data(), ckpt_path=ckpt_path)
    return model, trainer


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run of two rounds."""
    folder = tmp_path_factory.mktemp("first")
    fit(folder, 2)
    return folder


CHANGES = {
    "seed_everything": {"seed": 1},
    "data.seed": {"on": lambda: data(seed=1)},
    "data.partitioner.class_path": {"on": lambda: data(IID())},
    "data.partitioner.alpha": {"on": lambda: data(DirichletClients(5.0))},
    "data.num_clients": {"on": lambda: data(num_clients=5)},
    "data.batch_size": {"on": lambda: data(batch_size=5)},
    "data.samples.0.0": {"on": lambda: data(shift=0.1)},
    "data.collate_fn": {"on": lambda: data(collate_fn=torch.utils.data.default_collate)},
    "algorithm.mu": {"algorithm": FedProx(0.2)},
    "algorithm.class_path": {"algorithm": SCAFFOLD()},
    "perturbation": {"perturbation": None},
    "perturbation.rho": {"perturbation": SAM(0.1)},
    "trainer.callbacks": {"callbacks": []},
    "trainer.callbacks.0.zeta": {"callbacks": [MAN(0.2)]},
    "optimizer.groups.0.lr": {"model": lambda: Net(lr=0.2)},
    "optimizer.groups.0.momentum": {"model": lambda: Net(momentum=0.6)},
    "optimizer.lr_scheduler.0.scheduler.gamma": {"model": lambda: Net(gamma=0.8)},
    "model.layers.3": {"model": lambda: Net(dropout=0.2)},
    "trainer.local_epochs": {"local_epochs": 2},
    "trainer.local_steps": {"local_steps": 3},
    "trainer.accumulate_grad_batches": {"accumulate_grad_batches": 2},
    "trainer.limit_train_batches": {"limit_train_batches": 1},
    "trainer.gradient_clip_val": {"gradient_clip_val": 0.5},
    "trainer.clients_per_round": {"clients_per_round": 3},
    "trainer.sampler.class_path": {"sampler": Bernoulli()},
    "trainer.precision": {"precision": "64-true"},
    "trainer.tf32": {"tf32": False},
    "trainer.buffers": {"buffers": "reset"},
    "trainer.views": {"views": ["server"]},
    "trainer.centralized": {"centralized": True},
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_experiment_is_refused_unless_it_is_allowed(first, tmp_path, caplog, key):
    def resume(**more):
        changed = {k: v() if k in ("on", "model") else v for k, v in CHANGES[key].items()}
        return fit(tmp_path, 3, ckpt_path="last", **changed, **more)

    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"]
    before = {p: p.read_bytes() for p in files}
    with pytest.raises(MisconfigurationException, match="is of another experiment") as error:
        resume()
    assert f"\n  {key}: " in str(error.value)
    assert "trainer.allow_changes=true" in str(error.value)
    assert {p: p.read_bytes() for p in files} == before
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    _, trainer = resume(allow_changes=True)
    assert trainer.current_round == 3
    noted = json.loads((trainer.run_dir / "config_history" / "changes.json").read_text())
    assert list(noted) == ["2"]
    assert key in noted["2"]
    for changed in noted["2"]:  # a line for each
        assert sum(f"allow_changes: {changed}: " in message for message in caplog.messages) == 1
    for row in read_metrics(trainer.run_dir / "metrics.csv"):
        assert row["lr"] == row["lr"]
    # The changed run can be continued as what it is now.
    changed = {k: v() if k in ("on", "model") else v for k, v in CHANGES[key].items()}
    fit(tmp_path, 4, ckpt_path="last", **changed)
    assert json.loads((trainer.run_dir / "config_history" / "changes.json").read_text()) == noted


def test_what_may_differ(first, tmp_path):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    whole, _ = fit(tmp_path / "whole", 4)
    resumed, trainer = fit(
        tmp_path,
        4,
        on=data(num_workers=0, eval_batch_size=3),
        ckpt_path="last",
        callbacks=[MAN(0.1), EarlyStopping("val/loss", patience=9), Checkpoint(every_n_rounds=2)],
        check_val_every_n_rounds=2,
        client_val_every_n_rounds=0,
        limit_val_batches=1,
        limit_train_batches=1.0,
        views=["all", "selected", "server"],
        profiler="simple",
        logger=False,
        engine="eager",
        client_state="disk",
        deterministic=True,
    )
    assert torch.equal(weights(resumed), weights(whole))
    assert not (trainer.run_dir / "config_history" / "changes.json").exists()


def test_a_changed_learning_rate_takes_over_where_the_schedule_is(first, tmp_path):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    _, trainer = fit(tmp_path, 4, model=Net(lr=0.2, gamma=0.5), ckpt_path="last", allow_changes=True)
    rows = read_metrics(trainer.run_dir / "metrics.csv")
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.09, 0.2 * 0.25, 0.2 * 0.125])


def test_another_algorithm_begins_anew_from_the_servers_model(tmp_path):
    fit(tmp_path, 2, algorithm=FedDyn(0.1))
    server = torch.load(tmp_path / "default" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["fedlight"]
    params = server["server"]["algorithm"]["params"]

    class Look(Checkpoint):
        def on_train_start(self, trainer, pl_module):
            federation = trainer._session.federation
            self.found = federation.params.clone(), federation.store.clients(), trainer.current_round
            self.latest = federation.state.latest_mean["params"].clone()

    look = Look()
    given = {"algorithm": SCAFFOLD(), "callbacks": [MAN(0.1), look], "ckpt_path": "last", "allow_changes": True}
    _, trainer = fit(tmp_path, 3, **given)
    assert torch.equal(look.found[0], params)
    assert look.found[1:] == ([], 2)
    assert torch.equal(look.latest.float(), params)
    assert trainer.global_step > server["server"]["global_step"] > 0


# --- checkpoints of version 0.1 ---------------------------------------------------------------------------------------


def of_version_0_1(path):
    """Let a checkpoint say of its experiment what those of version 0.1 say."""
    saved = load_checkpoint(path)
    clients = saved["fedlight"]["clients"]
    saved["fedlight"] |= {"format": 1, "clients": {**clients, "rows": dict(clients["rows"])}}
    del saved["fedlight"]["experiment"]
    saved["fedlight"] |= {"seed": 0, "algorithm": "FedProx", "perturbation": "SAM", "num_clients": 4}
    saved["fedlight"] |= {"views": ["server", "selected", "all"], "buffers": "average"}
    torch.save(saved, path)


def test_a_checkpoint_of_version_0_1_is_compared_as_far_as_it_goes(first, tmp_path):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    of_version_0_1(tmp_path / "default" / "version_0" / "checkpoints" / "last.ckpt")
    for key, changed in (
        ("seed_everything: 0 in", {"seed": 1}),
        ("algorithm.class_path: FedProx in", {"algorithm": FedDyn()}),
        ("perturbation.class_path|perturbation: ", {"perturbation": None}),
        ("data.num_clients: 4 in", {"on": data(num_clients=5)}),
        ("trainer.buffers: average in", {"buffers": "reset"}),
        ("model.hparams.lr: 0.1 in", {"model": Net(lr=0.2)}),
    ):
        with pytest.raises(MisconfigurationException, match=key):
            fit(tmp_path, 3, ckpt_path="last", **changed)
    whole, _ = fit(tmp_path / "whole", 3)
    resumed, _ = fit(tmp_path, 3, ckpt_path="last")
    assert torch.equal(weights(resumed), weights(whole))


def test_a_learning_rate_without_a_schedule_is_known_to_version_0_1(tmp_path):
    quiet_trainer(tmp_path, max_rounds=1, algorithm=FedProx(), perturbation=SAM()).fit(Regression(), data())
    path = tmp_path / "default" / "version_0" / "checkpoints" / "last.ckpt"
    of_version_0_1(path)
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "hyper_parameters": {}}, path)
    trainer = quiet_trainer(tmp_path, max_rounds=2, algorithm=FedProx(), perturbation=SAM())
    with pytest.raises(MisconfigurationException, match="optimizer.groups.0.lr: 0.1 in the checkpoint, 0.2 here"):
        trainer.fit(Regression(lr=0.2), data(), ckpt_path="last")


OLD = Path(__file__).parent / "helpers" / "version_0_1_0.ckpt"
"""Written by version 0.1.0: SCAFFOLD after three rounds of two clients each, of whom client 1 was none."""


def test_a_checkpoint_made_by_version_0_1_0_is_continued(tmp_path):
    """The expected numbers are those with which version 0.1.0 itself went on to six rounds."""
    assert torch.load(OLD, weights_only=True)["fedlight"]["version"] == "0.1.0"
    model = Regression()
    trainer = quiet_trainer(tmp_path, algorithm=SCAFFOLD(), max_rounds=6)
    trainer.fit(model, Clients(), ckpt_path=OLD)
    expected = [1.0790212154388428, -1.6399234533309937, 0.33669182658195496, 0.5109084844589233]
    torch.testing.assert_close(weights(model), torch.tensor(expected))
    store = trainer._session.federation.store
    assert store.clients() == [0, 1, 2, 3]
    control = [2.373650550842285, 2.830577850341797, 0.6639132499694824, 2.3111090660095215]
    torch.testing.assert_close(store.get(2, "algorithm")["control"], torch.tensor(control))
    equally = torch.stack([store.get(i, "latest")["params"] for i in range(4)]).mean(0)  # as it was for every method
    torch.testing.assert_close(equally, torch.tensor([1.13156557, -1.31078720, 0.24954543, 0.65351617]))


def test_a_checkpoint_made_by_version_0_1_0_is_tested(tmp_path):
    trainer = quiet_trainer(tmp_path, algorithm=SCAFFOLD())
    (found,) = trainer.test(Regression(), Clients(), ckpt_path=OLD, verbose=False)
    assert found == pytest.approx(
        {"test/loss": 4.57646697, "test/loss_selected": 3.79965495, "test/loss_all": 6.0342789}
    )


# --- what the folder keeps --------------------------------------------------------------------------------------------


def command(folder, *more):
    main(["fit", *TINY, *QUIET, f"--trainer.default_root_dir={folder}", *more])


def test_the_configuration_is_true_and_the_one_before_is_kept_with_its_rounds(tmp_path):
    run = tmp_path / "default" / "version_0"

    def governed():
        names = ["config.yaml", *(f"config_history/{p.name}" for p in sorted((run / "config_history").glob("*.yaml")))]
        return {name: yaml.safe_load((run / name).read_text())["trainer"]["max_rounds"] for name in names}

    command(tmp_path, "--trainer.max_rounds=2")
    command(tmp_path, "--trainer.max_rounds=2", "--ckpt_path=last")
    assert governed() == {"config.yaml": 2}
    command(tmp_path, "--trainer.max_rounds=5", "--ckpt_path=last")
    assert governed() == {"config.yaml": 5, "config_history/rounds_0-1.yaml": 2}
    first = (run / "config.yaml").read_text()
    assert yaml.safe_load(first)["ckpt_path"] is None  # so that it runs again
    assert read_run(run).status == "finished"
    with pytest.raises(SystemExit) as stop:
        command(tmp_path, "--trainer.max_rounds=6", "--model.lr=0.2", "--ckpt_path=last")
    assert stop.value.code == 2
    assert (run / "config.yaml").read_text() == first
    more = ["--trainer.max_rounds=6", "--model.lr=0.2", "--ckpt_path=last", "--trainer.allow_changes=true"]
    command(tmp_path, *more)
    assert governed() == {"config.yaml": 6, "config_history/rounds_0-1.yaml": 2, "config_history/rounds_2-4.yaml": 5}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == 0.2
    assert config["trainer"]["allow_changes"] is False  # it was for this once
    found = read_run(run)  # neither 0.1 nor 0.2 is its learning rate
    assert found.status == "changed"
    assert "model.hparams.lr from round 6: 0.1 -> 0.2" in found.detail


def test_a_run_that_goes_on_is_not_finished(tmp_path):
    quiet_trainer(tmp_path, max_rounds=2).fit(Regression(), Clients())
    summary = tmp_path / "default" / "version_0" / "summary.json"
    seen = []

    class Look(Checkpoint):
        def on_round_start(self, trainer, pl_module):
            seen.append(summary.exists())

    quiet_trainer(tmp_path, max_rounds=3, callbacks=[Look()]).fit(Regression(), Clients(), ckpt_path="last")
    assert seen == [False]
    assert json.loads(summary.read_text())["rounds"] == 3


def test_the_history_of_rounds_that_are_trained_again_is_void(tmp_path):
    def names():
        return sorted(p.name for p in (tmp_path / "config_history").iterdir())

    (tmp_path / "config.yaml").write_text("a")
    keep_config(tmp_path, 10, same=False)
    (tmp_path / "config.yaml").write_text("b")
    keep_config(tmp_path, 20, same=False)
    keep_config(tmp_path, 25, same=True)
    assert names() == ["rounds_0-9.yaml", "rounds_10-19.yaml"]
    (tmp_path / "config.yaml").write_text("c")
    keep_config(tmp_path, 15, same=False)  # c never governed one of the rounds that are left
    assert names() == ["rounds_0-9.yaml", "rounds_10-14.yaml"]
    keep_config(tmp_path, 5, same=False)
    assert names() == ["rounds_0-4.yaml"]
    assert (tmp_path / "config_history" / "rounds_0-4.yaml").read_text() == "a"
    record_changes(tmp_path, 5, {"algorithm.mu": [1, 2]})
    record_changes(tmp_path, 8, {})
    record_changes(tmp_path, 9, {"algorithm.mu": [2, 3]})
    path = tmp_path / "config_history" / "changes.json"
    assert json.loads(path.read_text()) == {"5": {"algorithm.mu": [1, 2]}, "9": {"algorithm.mu": [2, 3]}}
    record_changes(tmp_path, 9, {})
    assert json.loads(path.read_text()) == {"5": {"algorithm.mu": [1, 2]}}
    path.write_text("{")
    with pytest.raises(MisconfigurationException, match=r"changes.json is damaged \(.*line 1 column 2"):
        record_changes(tmp_path, 9, {})
    path.write_text("{}")
    record_changes(tmp_path, 3, {})
    assert not path.exists()


@pytest.mark.parametrize("call", ["fit", "test", "validate", "predict"])
def test_classes_of_other_names_are_refused(tmp_path, call):
    def classes(*names):
        train, held_out = (TensorDataset(x := seeded(n, 3), x.sum(1)) for n in (40, 8))
        return DatasetPartition(train, held_out, num_clients=4, batch_size=4, targets=names * 20)

    quiet_trainer(tmp_path, max_rounds=1).fit(Net(), classes("ant", "bee"))
    command = getattr(quiet_trainer(tmp_path, max_rounds=2), call)
    with pytest.raises(MisconfigurationException, match=r"data.classes.1: .*bee.*cat"):
        command(Net(), classes("ant", "cat"), "last")
    command(Net(), classes("ant", "bee"), "last")


@pytest.mark.parametrize("classes", [None, 2, np.array(["ant", "bee"])])
def test_a_datamodule_may_call_anything_its_classes(tmp_path, classes):
    data = Clients()
    data.classes = classes
    quiet_trainer(tmp_path, max_rounds=1).fit(Regression(), data)
    second = quiet_trainer(tmp_path, max_rounds=2)
    second.fit(Regression(), data, "last")
    names = ["ant", "bee"] * (type(classes) is np.ndarray)
    assert class_names(data) == names
    written = load_checkpoint(second.run_dir / "checkpoints" / "last.ckpt")["fedlight"]["experiment"]["data"]
    assert written["classes"] == (names or classes)  # as checkpoints from before have it


def test_a_buffer_that_comes_with_a_hook_is_read_from_the_checkpoint(tmp_path):
    class Centred(Regression):
        def __init__(self, centre=None):
            super().__init__()
            self.register_buffer("centre", centre)

        def on_train_start(self):
            self.centre = torch.ones(3) + self.trainer.current_round

        def forward(self, x):
            return super().forward(x - self.centre)

    expected = Centred()
    quiet_trainer(tmp_path / "expected").fit(expected, Clients())
    quiet_trainer(tmp_path, max_rounds=1).fit(Centred(), Clients())
    found, trainer = Centred(), quiet_trainer(tmp_path)
    trainer.fit(found, Clients(), ckpt_path="last")
    assert torch.equal(weights(found), weights(expected))
    assert torch.equal(found.centre, torch.ones(3))
    trainer.test(fresh := Centred(), Clients(), ckpt_path="last")
    assert torch.equal(fresh.centre, torch.ones(3))
