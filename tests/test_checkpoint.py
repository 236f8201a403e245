"""Checkpoints: what they hold, when they are written, and what is refused."""

import errno
import io
import json
import os
import pathlib
import random
import struct
import threading
import time
import zipfile
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils._pytree import tree_flatten

from fedlight.algorithms.fedavg import FedAvg
from fedlight.algorithms.fedprox import FedProx
from fedlight.algorithms.scaffold import SCAFFOLD
from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.models import MLP, Classifier
from fedlight.penalties.man import MAN
from fedlight.perturbations import SAM
from fedlight.run.checkpoint import load_checkpoint, save_checkpoint
from fedlight.run.loggers import read_metrics
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

SIZES = (6, 12, 8, 3)


class Decaying(Regression):
    """A network with BatchNorm and dropout, and a learning rate that falls by round."""

    def __init__(self):
        layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 1)
        super().__init__(net=nn.Sequential(*layers))

    def configure_optimizers(self):
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.5)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.9), "interval": "round"}]


def fit(folder, rounds, ckpt_path=None, model=None, data=None, **settings):
    model = Regression() if model is None else model
    trainer = quiet_trainer(folder, max_rounds=rounds, **settings)
    trainer.fit(model, Clients(SIZES) if data is None else data, ckpt_path=ckpt_path)
    return model, trainer


RESUMED = {
    "FedAvg": {},
    "FedProx": {"algorithm": FedProx(mu=0.1)},
    "SCAFFOLD and SAM": {"algorithm": SCAFFOLD(), "perturbation": SAM(0.05)},
    "buffers local": {"buffers": "local"},
    "buffers reset": {"buffers": "reset"},
    "MAN and one view": {"callbacks": lambda: [MAN(0.1)], "views": ["server"]},
    "seed 5": {"seed": 5, "local_steps": 3},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_at_any_round_ends_with_the_same_bits(tmp_path, name):
    def settings():
        given = RESUMED[name]
        return {k: v() if k == "callbacks" else v for k, v in given.items()}

    whole, reference = fit(tmp_path / "whole", 4, model=Decaying(), **settings())
    for at in (1, 2, 3):
        first, _ = fit(tmp_path / f"{at}", at, model=Decaying(), **settings())
        resumed, trainer = fit(tmp_path / f"{at}", 4, "last", model=Decaying(), **settings())
        assert torch.equal(weights(resumed), weights(whole))
        assert not torch.equal(weights(resumed), weights(first))
        for view, params in reference._session.federation.state.views.items():
            assert torch.equal(trainer._session.federation.state.views[view], params)
        assert not list((tmp_path / f"{at}").glob("default/version_1"))
        expected, rows = (read_metrics(t.run_dir / "metrics.csv") for t in (reference, trainer))
        for a, b in zip(expected, rows, strict=True):
            assert {k: v for k, v in a.items() if "time/" not in k} == {k: v for k, v in b.items() if "time/" not in k}


def test_early_stopping_goes_on_counting(tmp_path):
    def stopping():
        return EarlyStopping("val/loss", patience=3, min_delta=100.0)

    _, whole = fit(tmp_path / "whole", 50, callbacks=[stopping()])
    assert whole.current_round == 4
    fit(tmp_path / "parts", 2, callbacks=[stopping()])
    callback = stopping()
    _, resumed = fit(tmp_path / "parts", 50, "last", callbacks=[callback])
    assert resumed.current_round == 4
    assert callback.wait_count == 3


def test_callbacks_and_module_can_add_to_a_checkpoint(tmp_path):
    class Counting(Callback):
        rounds = 0

        def on_round_end(self, trainer, pl_module):
            self.rounds += 1

        def state_dict(self):
            return {"rounds": self.rounds, "object": object()}

        def load_state_dict(self, state_dict):
            self.rounds = state_dict["rounds"]

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["by callback"] = torch.tensor(self.rounds)

        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            self.loaded = int(checkpoint["by callback"])

    class Model(Regression):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["by module"] = {"word": "yes"}

        def on_load_checkpoint(self, checkpoint):
            self.word = checkpoint["by module"]["word"]

    counting = Counting()
    # However it is given, what writes the checkpoint comes last.
    fit(tmp_path, 2, model=Model(), callbacks=[Checkpoint(), Counting()])
    model, _ = fit(tmp_path, 5, "last", model=Model(), callbacks=[counting])
    assert (counting.loaded, counting.rounds, model.word) == (2, 5, "yes")


class Adapted(Regression):
    """As with LoRA, no checkpoint has the base; the scale of what is predicted is no tensor."""

    def __init__(self, strict=False):
        super().__init__(net=nn.Sequential(nn.Linear(3, 2).requires_grad_(False), nn.Linear(2, 1)))
        self.strict_loading, self.scale = strict, 1.0

    def on_validation_end(self):
        self.scale += 1

    def test_step(self, batch, batch_idx):
        self.log("test/scale", self.scale)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["scale"] = self.scale
        for name in ("net.0.weight", "net.0.bias"):
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint):
        self.scale = checkpoint["scale"]
        if self.strict_loading:
            checkpoint["state_dict"] |= {k: v for k, v in self.state_dict().items() if k.startswith("net.0")}


@pytest.mark.parametrize("strict", [False, True])
def test_a_module_may_leave_out_of_a_checkpoint_what_it_has_anyway(tmp_path, strict):
    expected, _ = fit(tmp_path / "whole", 3, model=Adapted(strict))
    fit(tmp_path, 2, model=Adapted(strict))
    found, resumed = fit(tmp_path, 3, "last", model=Adapted(strict))
    assert torch.equal(weights(found), weights(expected))
    assert resumed.test(Adapted(strict), Clients(), ckpt_path="last")[0]["test/scale"] == expected.scale == 4


def test_what_a_module_takes_out_of_a_checkpoint_for_good_is_said(tmp_path, caplog):
    class Renamed(Regression):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {f"model.{k}": v for k, v in checkpoint["state_dict"].items()}

    class Undone(Renamed):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}

    for model, said in ((Undone(), 0), (Renamed(), 1), (Adapted(), 0)):
        caplog.clear()
        fit(tmp_path / type(model).__name__, 2, model=model)
        assert sum("on_save_checkpoint leaves out, renames" in message for message in caplog.messages) == said
    with pytest.raises(MisconfigurationException, match="belongs to another model"):
        fit(tmp_path / "Renamed", 3, "last", model=Renamed())


def test_a_checkpoint_is_plain_and_lightning_reads_it(tmp_path):
    model, trainer = fit(tmp_path, 2, model=Regression(lr=0.07))
    path = trainer.run_dir / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"] == {"lr": 0.07}
    assert saved["epoch"] == 2
    assert saved["global_step"] == trainer.global_step
    loaded = Regression.load_from_checkpoint(path)
    assert loaded.lr == 0.07
    assert torch.equal(weights(loaded), weights(model))
    net = MLP(3, 2)
    classifier = Classifier(net, 2)

    class Labels(Clients):
        def dataset(self, x, y):
            return super().dataset(x, y.argsort() % 2)

    data = Labels(SIZES)
    data.datasets = [type(d)(d.inputs, d.targets.long()) for d in data.datasets]
    data.held_out = type(data.held_out)(data.held_out.inputs, data.held_out.targets.long())
    _, trainer = fit(tmp_path, 1, model=classifier, data=data)
    path = trainer.run_dir / "checkpoints" / "last.ckpt"
    assert torch.equal(weights(Classifier.load_from_checkpoint(path, net=MLP(3, 2))), weights(classifier))


SLOW = partial(SGD, lr=0.1)


class Untyped(Regression):
    """What it is made with has no types, and so no CLI could make it."""

    def __init__(self, lr=0.1, optimizer=SLOW):
        super().__init__(lr)
        self.save_hyperparameters()


def test_what_is_of_numpy_is_read_as_pythons(tmp_path):
    """A learning rate of ``np.logspace`` made checkpoints that torch refuses to read; a callback's state was lost."""

    class Counting(Callback):
        rounds = np.int64(0)

        def on_round_end(self, trainer, pl_module):
            self.rounds += 1

        def state_dict(self):
            return {"rounds": self.rounds, "by client": {np.int64(3): np.str_("word")}}

        def load_state_dict(self, state_dict):
            self.rounds, self.word = state_dict["rounds"], state_dict["by client"][3]

    counting = Counting()
    numbers = {"seed": np.int64(1), "clients_per_round": np.float32(0.5), "gradient_clip_val": np.float64(9)}
    fit(tmp_path, 1, model=Regression(np.float64(0.2)), callbacks=[Counting()], **numbers)
    _, trainer = fit(tmp_path, 2, "last", model=Regression(np.float64(0.2)), callbacks=[counting], **numbers)
    assert (counting.rounds, counting.word) == (2, "word")
    assert torch.load(trainer.run_dir / "checkpoints" / "last.ckpt")["hyper_parameters"] == {"lr": 0.2}


def test_a_module_whose_arguments_have_no_types_is_loaded_with_its_plain_ones(tmp_path):
    model, trainer = fit(tmp_path, 1, model=Untyped(lr=0.07))
    loaded = Untyped.load_from_checkpoint(trainer.run_dir / "checkpoints" / "last.ckpt")
    assert loaded.lr == 0.07
    assert torch.equal(weights(loaded), weights(model))


def test_the_checkpoint_of_the_module_does_not_depend_on_what_it_evaluated_last(tmp_path):
    model, trainer = fit(tmp_path, 3, model=Decaying(), clients_per_round=1)
    saved = torch.load(trainer.run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())


class Scripted(Regression):
    """Logs a validation metric that is given by round."""

    def __init__(self, values, name="val/accuracy"):
        super().__init__()
        self.values, self.name = values, name

    def validation_step(self, batch, batch_idx):
        self.log(self.name, self.values[self.current_epoch - 1])


def best_round(trainer):
    return torch.load(trainer.run_dir / "checkpoints" / "best.ckpt", weights_only=True)["fedlight"]["server"]["round"]


@pytest.mark.parametrize(
    ("values", "name", "settings", "best"),
    [
        ([0.1, 0.5, 0.3], "val/accuracy", {}, 2),
        ([0.9, 0.5, 0.7], "val/loss", {}, 2),
        ([0.9, 0.5, 0.7], "val/loss", {"mode": "max"}, 1),
        ([0.9, 0.5, 0.7], "val/f1", {"monitor": "val/f1"}, 1),
        ([0.5, 0.5, 0.5], "val/accuracy", {}, 1),
        ([float("nan"), 0.5, float("nan")], "val/accuracy", {}, 2),
    ],
)
@pytest.mark.parametrize("max_overhead", [1, 1e-9])
def test_best_is_the_best_round_however_seldom_it_is_written(tmp_path, values, name, settings, best, max_overhead):
    callback = Checkpoint(max_overhead=max_overhead, **settings)
    _, trainer = fit(tmp_path, 3, model=Scripted(values, name), callbacks=[callback])
    assert best_round(trainer) == best


def test_without_the_monitored_metric_there_is_no_best(tmp_path):
    _, trainer = fit(tmp_path, 1, callbacks=[Checkpoint(monitor="val/f1")])
    assert [p.name for p in (trainer.run_dir / "checkpoints").iterdir()] == ["last.ckpt"]


def test_the_best_value_survives_a_resume_and_not_a_new_fit(tmp_path):
    values = [0.5, 0.9, 0.3, 0.8]
    fit(tmp_path, 2, model=Scripted(values))
    _, trainer = fit(tmp_path, 4, "last", model=Scripted(values))
    assert best_round(trainer) == 2
    trainer.fit(Scripted([0.1, 0.2, 0.15, 0.1]), Clients(SIZES))
    assert best_round(trainer) == 2
    assert "version_1" in str(trainer.run_dir)


def test_a_pending_best_is_written_when_the_run_fails(tmp_path):
    class Failing(Scripted):
        def on_round_start(self):
            if self.current_epoch == 3:
                raise KeyError("mine")

    callback = Checkpoint(max_overhead=1e-9)
    with pytest.raises(KeyError):
        fit(tmp_path, 5, model=Failing([0.1, 0.5, 0.3, 0.2, 0.1]), callbacks=[callback])
    path = tmp_path / "default" / "version_0" / "checkpoints" / "best.ckpt"
    assert torch.load(path, weights_only=True)["fedlight"]["server"]["round"] == 2


def test_last_is_written_every_so_many_rounds_and_at_the_end(tmp_path):
    written = []

    class Watch(Callback):
        def on_round_start(self, trainer, pl_module):
            path = trainer.run_dir / "checkpoints" / "last.ckpt"
            round = torch.load(path, weights_only=True)["fedlight"]["server"]["round"] if path.exists() else 0
            written.append(round)

    callbacks = [Watch(), Checkpoint(every_n_rounds=3, max_overhead=1)]
    _, trainer = fit(tmp_path, 8, callbacks=callbacks)
    assert written == [0, 0, 0, 3, 3, 3, 6, 6]
    assert load_checkpoint(trainer.run_dir / "checkpoints" / "last.ckpt")["epoch"] == 8


def test_writing_takes_no_more_than_its_share_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fedlight.callbacks.checkpoint.time.monotonic", lambda: now[0])
    written = []

    class Clock(Callback):
        def on_round_start(self, trainer, pl_module):
            now[0] += 1.0  # a round takes a second

    callback = Checkpoint(max_overhead=0.2)
    trainer = quiet_trainer(tmp_path, max_rounds=13, callbacks=[Clock(), callback])

    def save(name, content=None, wait=True):
        now[0] += 0.5  # and a checkpoint half of one
        written.append((name, trainer.current_round))

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    trainer.fit(Scripted([0.1] * 13), Clients(SIZES))
    # 1 s (two files) is at most a fifth of 5 s; then 0.5 s of 2.5 s.
    assert written == [("best", 1), ("last", 1), ("last", 6), ("last", 9), ("last", 12), ("last", 13)]


def test_no_checkpoints_if_none_are_wanted(tmp_path):
    _, trainer = fit(tmp_path, 1, enable_checkpointing=False)
    assert not (trainer.run_dir / "checkpoints").exists()


def test_a_callback_can_write_one_of_its_own(tmp_path):
    class Own(Callback):
        def on_round_end(self, trainer, pl_module):
            trainer.save_checkpoint(f"round_{trainer.current_round}")
            trainer.save_checkpoint(tmp_path / "elsewhere.ckpt")

    whole, trainer = fit(tmp_path, 3, callbacks=[Own()])
    names = sorted(p.name for p in (trainer.run_dir / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "round_1.ckpt", "round_2.ckpt", "round_3.ckpt"]
    # One that lies elsewhere begins a folder of its own.
    resumed, other = fit(tmp_path / "new", 3, trainer.run_dir / "checkpoints" / "round_1.ckpt")
    assert other.run_dir == trainer.run_dir
    assert torch.equal(weights(resumed), weights(whole))
    (tmp_path / "copy.ckpt").write_bytes((trainer.run_dir / "checkpoints" / "round_2.ckpt").read_bytes())
    resumed, other = fit(tmp_path / "new", 3, tmp_path / "copy.ckpt")
    assert other.run_dir == tmp_path / "new" / "default" / "version_0"
    assert torch.equal(weights(resumed), weights(whole))
    assert [row["round"] for row in read_metrics(other.run_dir / "metrics.csv")] == [0, 1, 2]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two rounds, and the path of its last checkpoint."""
    _, trainer = fit(tmp_path, 2, callbacks=[Checkpoint(max_overhead=1)])
    return tmp_path, trainer.run_dir / "checkpoints" / "last.ckpt"


def refused(run, message, ckpt_path="last", **settings):
    """Resuming fails with this message, and nothing that is there changes."""
    folder, _ = run
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        fit(folder, 4, ckpt_path, **settings)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_a_missing_checkpoint(run):
    refused(run, "is a folder. Give a file, 'last' or 'best'", ".")
    refused(run, "ckpt_path='nothing.ckpt' does not exist. Give a file, 'last' or 'best'", "nothing.ckpt")
    refused(run, "ckpt_path='last': no run below .*/other has a checkpoint of that name. Check", name="other")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 100, lambda b: b[:-1]])
def test_a_torn_checkpoint(run, damage):
    run[1].write_bytes(damage(run[1].read_bytes()))
    refused(run, r"last.ckpt' cannot be read \(.*\): it is torn, damaged or no checkpoint")


def test_a_flipped_bit_is_found_or_changes_nothing(run):
    """All parts of the file: what is not found, as in the space between tensors, is not read either."""
    whole, rng, found = run[1].read_bytes(), random.Random(0), 0

    def content(path):
        checkpoint = load_checkpoint(path)
        clients = checkpoint["fedlight"]["clients"]
        return tree_flatten({**checkpoint, "rows": list(clients.pop("rows"))})

    leaves, spec = content(run[1])
    assert len(leaves) > 20
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        run[1].write_bytes(damaged)
        try:
            same, structure = content(run[1])
        except MisconfigurationException:
            found += 1
            continue
        assert structure == spec
        assert all(torch.equal(a, b) if isinstance(b, Tensor) else a == b for a, b in zip(same, leaves, strict=True))
    assert found > 100


def test_every_flipped_bit_of_a_tensor_is_found(run):
    whole = run[1].read_bytes()
    with zipfile.ZipFile(run[1]) as parts:
        tensors = [i for i in parts.infolist() if ("/data/" in i.filename or "/rows/" in i.filename) and i.file_size]
        assert sum("/rows/" in i.filename for i in tensors) == 2  # a block, and how many there are
        contents = [parts.read(info) for info in tensors]
    for info, content in zip(tensors, contents, strict=True):
        damaged = bytearray(whole)
        name, extra = struct.unpack_from("<HH", whole, info.header_offset + 26)  # of the part's own header
        start = info.header_offset + 30 + name + extra
        assert whole[start : start + len(content)] == content
        damaged[start + len(content) // 2] ^= 4
        run[1].write_bytes(damaged)
        refused(run, r"last.ckpt' cannot be read \(ValueError\): it is torn, damaged or no checkpoint")


def test_something_else_than_a_checkpoint_of_fedlight(run, tmp_path):
    for content in ({"state_dict": {}}, [1, 2], 3):
        torch.save(content, run[1])
        refused(run, "was not written by fedlight")
    saved = io.BytesIO()
    torch.save(Regression(), saved)  # pickled code is never run
    run[1].write_bytes(saved.getvalue())
    refused(run, "cannot be read")


def test_another_format(run):
    saved = torch.load(run[1], weights_only=True)
    saved["fedlight"]["format"] = 99
    torch.save(saved, run[1])
    refused(run, "has format 99, this version reads 1 and 2")


def test_another_model(run):
    deeper = Regression(net=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)))
    refused(
        run, "belongs to another model: it lacks 'net.0.bias' and 3 more; it has 'net.bias' and 1 more", model=deeper
    )

    class Wide(Regression):
        def forward(self, x):
            return self.net(x).sum(1)

    refused(run, r"'net.weight' is \(1, 3\) there and \(2, 3\) here", model=Wide(net=nn.Linear(3, 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": SCAFFOLD()}, "algorithm.class_path: FedAvg in the checkpoint, SCAFFOLD here"),
        ({"perturbation": SAM(0.1)}, "perturbation: None in the checkpoint, {'class_path': 'SAM', 'rho': 0.1} here"),
        ({"views": ["server"]}, r"trainer.views: \['selected', 'all'\] in the checkpoint, \[\] here"),
        ({"buffers": "local"}, "trainer.buffers: average in the checkpoint, local here"),
        ({"data": Clients((4, 4))}, "data.num_clients: 4 in the checkpoint, 2 here"),
    ],
)
def test_another_federation(run, settings, message):
    refused(run, message, **settings)


def test_an_algorithm_with_other_state(run):
    class Momentum(FedAvg):
        def init_server(self, params):
            return {**super().init_server(params), "momentum": torch.zeros_like(params)}

    Momentum.__name__ = "FedAvg"
    refused(run, "the algorithm keeps .*momentum.*, the checkpoint has", algorithm=Momentum())


def test_evaluation_needs_the_model_only(run):
    folder, _ = run
    trainer = quiet_trainer(folder, algorithm=SCAFFOLD(), views=["server"], clients_per_round=1)
    found = trainer.validate(Regression(), Clients((4, 4)), ckpt_path="last", verbose=False)[0]
    assert set(found) == {"val/loss", "val/loss_selected", "val/loss_all"}
    with pytest.raises(MisconfigurationException, match="belongs to another model"):
        trainer.test(Regression(net=nn.Linear(3, 2)), Clients(SIZES), ckpt_path="best")


# --- writing while training goes on ----------------------------------------------------------------------------------


class Slow:
    """A disk that writes nothing until it is let go."""

    def __init__(self, monkeypatch):
        self.go, self.written = threading.Event(), []
        monkeypatch.setattr("fedlight.run.checkpoint.atomic_file", self.write)

    @contextmanager
    def write(self, path):
        self.go.wait(60)
        file = io.BytesIO()
        yield file
        file.seek(0)
        self.written.append((path.name, torch.load(file, weights_only=True)))


class Rounds(Callback):
    """Calls a function at the end of each round, and keeps numbers that it changes in place."""

    def __init__(self, at_end):
        self.at_end, self.total = at_end, torch.zeros(1)

    def on_round_end(self, trainer, pl_module):
        self.total += 1
        self.at_end(trainer.current_round)

    def state_dict(self):
        return {"total": self.total}


@pytest.mark.parametrize("client_state", ["cpu", "disk"])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch, client_state):
    slow, seen = Slow(monkeypatch), []

    def at_end(round):
        seen.append((round, len(slow.written)))
        if client_state == "disk" or round == 4:
            slow.go.set()

    callbacks = [Rounds(at_end), Checkpoint(max_overhead=0.99)]
    fit(tmp_path, 5, callbacks=callbacks, algorithm=SCAFFOLD(), client_state=client_state)
    if client_state == "cpu":
        assert seen[:4] == [(1, 0), (2, 0), (3, 0), (4, 0)]
    else:  # rows on disk belong to the checkpoint: it is there before they change
        assert all(written > 0 for round, written in seen[1:])
    assert slow.written[-1][0] == "last.ckpt"
    for _, content in slow.written:  # each as it was when it was taken
        round = content["epoch"]
        assert content["callbacks"]["Rounds"]["total"] == round
        assert content["fedlight"]["server"]["round"] == round
    assert [content["epoch"] for name, content in slow.written if name == "last.ckpt"][-1] == 5


def test_what_fails_while_training_goes_on_stops_the_run(tmp_path, monkeypatch):
    tried = threading.Event()

    def full(path):
        tried.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedlight.run.checkpoint.atomic_file", full)
    rounds = []

    def at_end(round):
        rounds.append(round)
        if round > 1:
            tried.wait(60)
            time.sleep(0.1)

    with pytest.raises(MisconfigurationException, match="the disk is full"):
        fit(tmp_path, 500, callbacks=[Rounds(at_end), Checkpoint(max_overhead=0.99)])
    assert 1 < len(rounds) < 10


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_stops_the_run_and_keeps_the_old_checkpoint(run, monkeypatch):
    folder, path = run
    before, replace = path.read_bytes(), os.replace

    def full(source, target):
        if str(target).endswith("last.ckpt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        MisconfigurationException, match="cannot write to .*checkpoints: the disk is full. Choose another"
    ):
        fit(folder, 4, "last")
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.tmp"))
    monkeypatch.undo()
    resumed, _ = fit(folder, 4, "last")
    whole, _ = fit(folder / "whole", 4)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_file_that_cannot_be_written_whole_never_replaces_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    save_checkpoint(path, {"a": torch.ones(2)})
    before = path.read_bytes()

    def failing(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"):
        save_checkpoint(path, {"a": torch.zeros(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_while_metrics_are_written(tmp_path, monkeypatch):
    class Full(Callback):
        def on_round_start(self, trainer, pl_module):
            if trainer.current_round == 1:
                monkeypatch.setattr(pathlib.Path, "open", self.open)

        @staticmethod
        def open(path, *args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(MisconfigurationException, match="version_0: the disk is full"):
        fit(tmp_path, 3, callbacks=[Full()])


def test_too_little_room_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(MisconfigurationException, match="0.0 MB left, and a checkpoint needs 0.0 MB. Make room"):
        fit(tmp_path, 1)
    assert not list(tmp_path.glob("default/*"))


def test_a_folder_that_is_a_file_or_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        MisconfigurationException, match="default_root_dir: cannot write to .*: a part of the path is a file"
    ):
        fit(tmp_path / "file", 1)
    for number, reason in ((errno.EACCES, "permission is denied"), (errno.EROFS, "the file system is read-only")):

        def fail(self, *args, number=number, **kwargs):
            raise OSError(number, "no")

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "mkdir", fail)
            with pytest.raises(MisconfigurationException, match=f"trainer.default_root_dir: cannot write .*: {reason}"):
                fit(tmp_path / "new", 1)


def test_a_run_whose_folder_is_read_only_does_not_resume(run, monkeypatch):
    def fail(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "no")

    plain = pathlib.Path.open

    def open_unless_lock(path, *args, **kwargs):
        return fail(path) if path.name == ".lock" else plain(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", open_unless_lock)
    refused(run, "permission is denied")


def test_snapshots_are_not_changed_by_later_rounds(tmp_path):
    snapshots = []

    class Take(Callback):
        def on_round_end(self, trainer, pl_module):
            snapshots.append((trainer.snapshot(), trainer._session.federation.params.clone()))

    fit(tmp_path, 3, model=Decaying(), callbacks=[Take()])
    for round, (content, params) in enumerate(snapshots):
        assert content["fedlight"]["server"]["round"] == round + 1
        assert torch.equal(content["fedlight"]["server"]["algorithm"]["params"], params)
        assert torch.equal(content["state_dict"]["net.0.weight"].reshape(-1), params[: 4 * 3])


@pytest.mark.parametrize("client_state", ["cpu", "disk"])
def test_a_mean_of_all_clients_that_was_weighted_otherwise_is_summed_up_anew(tmp_path, caplog, client_state):
    """As earlier versions wrote it: equally for every method, and without a word about that."""
    settings = {"client_state": client_state}
    _, whole = fit(tmp_path / "whole", 3, **settings)
    _, first = fit(tmp_path / "old", 2, **settings)
    path = first.run_dir / "checkpoints" / "last.ckpt"
    content = load_checkpoint(path)
    server, known = content["fedlight"]["server"], first._session.federation.state.views["all"]
    del server["latest_mean"]["shares"]
    server["latest_mean"]["params"] += 1
    server["views"]["all"] = server["views"]["all"] + 1
    save_checkpoint(path, content)
    caplog.clear()
    _, again = fit(tmp_path / "old", 2, "last", **settings)
    assert "its view `all` weighs clients otherwise than here, and is summed up anew" in caplog.text
    torch.testing.assert_close(again._session.federation.state.views["all"], known)
    caplog.clear()
    _, resumed = fit(tmp_path / "old", 3, path, **settings)
    expected = whole._session.federation.state.views
    torch.testing.assert_close(resumed._session.federation.state.views["all"], expected["all"])
    assert torch.equal(resumed._session.federation.state.views["server"], expected["server"])


def test_a_checkpoint_with_the_same_weights_is_continued_without_a_word(tmp_path, caplog):
    fit(tmp_path, 1)
    caplog.clear()
    fit(tmp_path, 2, "last")
    assert "weighs" not in caplog.text


class Several(Regression):
    """Logs given metrics in validation, one value a round."""

    def __init__(self, **metrics):
        super().__init__()
        self.metrics = metrics

    def validation_step(self, batch, batch_idx):
        for name, values in self.metrics.items():
            self.log(name.replace("__", "/"), values[self.current_epoch - 1])


RISING, FALLING = [0.1, 0.5, 0.3], [0.9, 0.5, 0.7]


@pytest.mark.parametrize(
    ("metrics", "said", "best"),
    [
        ({"val__acc": RISING}, "largest val/acc", 2),
        ({"val_acc": FALLING}, "largest val_acc", 1),
        ({"val_loss": FALLING}, "smallest val_loss", 2),
        ({"valid_loss": FALLING}, "smallest valid_loss", 2),
        ({"val__loss": RISING, "val__accuracy": RISING}, "largest val/accuracy", 2),
        ({"val_loss": RISING, "acc": RISING}, "largest acc", 2),
        ({"MulticlassAccuracy": RISING, "val__f1": FALLING}, "largest MulticlassAccuracy", 2),
        ({"val__top1_acc": RISING, "val__loss": RISING}, "smallest val/loss", 1),
        ({"val__f1": RISING, "val__reconstruction_loss": FALLING}, "smallest val/reconstruction_loss", 2),
        ({"val__rmse": FALLING}, "smallest val/rmse", 2),
        ({"MeanSquaredError": FALLING}, "smallest MeanSquaredError", 2),
        ({"perplexity": FALLING}, "smallest perplexity", 2),
        ({"auroc": RISING, "val__f1": FALLING}, "largest auroc", 2),
        ({"val__vaccinated": RISING}, "largest val/vaccinated", 2),
    ],
)
def test_what_is_best_is_chosen_from_what_validation_logs_and_said_once(tmp_path, caplog, metrics, said, best):
    _, trainer = fit(tmp_path, 3, model=Several(**metrics))
    assert [m for m in caplog.messages if "best.ckpt" in m] == [f"best.ckpt: the round with the {said}."]
    assert best_round(trainer) == best
    name = said.split()[1]
    summary = json.loads((trainer.run_dir / "summary.json").read_text())["best"]
    assert set(summary) >= {k.replace("__", "/") for k in metrics} | {f"{name}_all"}
    assert summary[name]["round"] == best - 1
    assert trainer.test(Several(**metrics), Clients(SIZES), "best", verbose=False)


@pytest.mark.parametrize(
    ("model", "settings", "said", "why"),
    [
        (lambda: Several(), {}, "Checkpoint.monitor=None, and validation logs nothing.", "nothing"),
        (
            lambda: Several(val__f1=RISING),
            {"callbacks": lambda: [Checkpoint(monitor="val/f2")]},
            "Checkpoint.monitor='val/f2', and validation logs val/f1; did you mean 'val/f1'?",
            "val/f1, val/f1_selected, val/f1_all",
        ),
    ],
)
def test_where_there_is_no_best_a_line_and_a_later_test_say_why(tmp_path, caplog, model, settings, said, why):
    settings = {key: make() for key, make in settings.items()}
    _, trainer = fit(tmp_path, 2, model=model(), check_val_every_n_rounds=2, **settings)
    assert [m for m in caplog.messages if "best.ckpt" in m] == [f"best.ckpt is not written: {said}"]
    assert [p.name for p in (trainer.run_dir / "checkpoints").iterdir()] == ["last.ckpt"]
    with pytest.raises(MisconfigurationException) as error:
        quiet_trainer(tmp_path).test(model(), Clients(SIZES), "best")
    assert (
        f"best.ckpt is written when what Checkpoint monitors is logged in validation; logged was: train/loss, {why}"
        in (str(error.value).replace("train/loss.", "train/loss, nothing."))
    )


def test_a_resume_compares_with_the_same_metric(tmp_path):
    """And where a checkpoint of version 0.1 does not say which, with none but those that it took."""
    fit(tmp_path, 2, model=Several(val_loss=[0.5, 0.4, 0.6, 0.7]))
    both = {"val_loss": [0.5, 0.4, 0.6, 0.7], "val_acc": [0.1, 0.2, 0.3, 0.25]}
    _, trainer = fit(tmp_path, 4, "last", model=Several(**both))
    assert best_round(trainer) == 2
    fit(tmp_path / "old", 2, model=Several(val_acc=[0.5, 0.6, 0.1, 0.2]))
    path = tmp_path / "old" / "default" / "version_0" / "checkpoints" / "last.ckpt"
    content = load_checkpoint(path)
    (state,) = (s for s in content["callbacks"].values() if "best" in s)
    assert state.pop("monitor") == "val_acc"
    save_checkpoint(path, content)
    _, trainer = fit(tmp_path / "old", 4, "last", model=Several(val_acc=[0.5, 0.6, 0.1, 0.2]))
    assert best_round(trainer) == 4
