"""What steps change of a module besides trained parameters: found, put back, averaged, or refused by name."""

import collections
import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LambdaCallback
from torch import nn
from torch.nn import functional as F
from torchmetrics import MaxMetric, MinMetric

from fedlight.engines import moving
from fedlight.module.state import ModuleState, untouched
from fedlight.perturbations import SAM
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights


@dataclasses.dataclass(slots=True)
class Slotted:
    values: list


@dataclasses.dataclass(frozen=True)
class Frozen:
    values: list


class Everything(Regression):
    """Holds a thing of every kind, and :meth:`move` changes it."""

    seen: list = []  # noqa: RUF012  (shared by mistake, as is often done)
    calls = 0

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.hidden, self.count, self.outputs, self.pair = None, 0, [], ([], torch.zeros(2))
        self.queue, self.cache, self.names = collections.deque(maxlen=3), {"a": [1]}, {"one"}
        self.ordered = collections.OrderedDict(a=1)
        self.array, self.python = np.zeros(3), random.Random(1)
        self.numpy, self.legacy, self.torch = np.random.default_rng(1), np.random.RandomState(1), torch.Generator()
        self.slotted, self.frozen, self.plain = Slotted([1]), Frozen([]), torch.zeros(2)
        self.shared, self.loop = self.outputs, {"me": self}
        self.networks, self.best, self.dropout = [nn.Linear(1, 1)], MaxMetric(), nn.Dropout(0.5)
        self.register_buffer("centre", torch.zeros(2))

    @torch.no_grad()
    def move(self):
        self.net.weight.add_(1)
        self.teacher.weight.data.mul_(0.9)
        self.teacher.bias.data = self.teacher.bias + 1
        self.hidden, self.count = torch.ones(2), self.count + 1
        self.outputs.append(1)
        self.pair[0].append(1)
        self.pair[1].add_(1)
        self.queue.append(1)
        self.cache["a"].append(2)
        self.names.add("two")
        self.ordered["b"] = 2
        self.array[1] = 5
        for draw in (self.python.random, self.numpy.random, self.legacy.rand):
            draw()
        torch.rand(1, generator=self.torch)
        self.slotted.values = [*self.slotted.values, 2]
        self.frozen.values.append(1)
        self.plain.data.add_(1)
        self.networks[0].weight.data.add_(1)
        self.best.update(0.7)
        self.dropout.p = 0.1
        self.centre = self.centre + 1
        type(self).calls += 1
        Everything.seen.append(1)
        self.teacher.eval()
        self.extra = nn.Linear(2, 2)


def values(module):
    """All that :meth:`Everything.move` changes, as text."""
    draws = [copy.deepcopy(g).random() for g in (module.python, module.numpy)] + [copy.deepcopy(module.legacy).rand()]
    known = {k: v for k, v in vars(module).items() if k not in ("_modules", "loop", "torch", "_parameters", "_buffers")}
    state = module.state_dict() | {"hidden network": module.networks[0].weight}
    modes = {name: m.training for name, m in module.named_modules()}
    lists = (Everything.calls, Everything.seen, module.best._update_count, module.best.max_value, module.dropout.p)
    return repr((known, draws, state, modes, lists, module.torch.get_state().tolist(), hasattr(module, "extra")))


NAMES = {
    *("array", "best._update_count", "best.max_value", "cache", "calls", "centre", "count", "dropout.p", "extra"),
    *("frozen.values", "hidden", "legacy", "names", "net.weight", "networks", "numpy", "ordered", "outputs", "pair"),
    *("plain", "python", "queue", "seen", "slotted", "teacher.bias", "teacher.training", "teacher.weight", "torch"),
}


def test_whatever_changes_is_named_and_put_back():
    module = Everything()
    before, shared = values(module), module.outputs
    state = ModuleState({"self": module})
    assert state.unchanged()
    assert state.changes() == []
    module.move()
    found = {name.removeprefix("self.") for name in state.changes()} - {"shared"}
    assert found | {"outputs"} == NAMES  # which of its two names it is found under does not matter
    state.restore()
    assert state.unchanged()
    assert values(module) == before
    assert module.shared is module.outputs is shared
    module.move()
    state.refresh()
    assert state.changes() == []
    assert module.count == 1


def test_a_value_that_is_assigned_anew_is_no_change():
    module = Everything()
    state = ModuleState({"self": module})
    module.cache, module.plain, module.pair = {"a": [1]}, torch.zeros(2), ([], torch.zeros(2))
    assert state.changes() == []
    module.plain = torch.zeros(3)
    assert state.changes() == ["self.plain"]


def test_tensors_that_are_skipped_are_not_copied():
    module = Everything()
    state = ModuleState({"self": module}, lambda: [*module.parameters(), *module.buffers()])
    assert {kept.name for kept in state._tensors} >= {"self.plain"}
    assert not any(".teacher." in kept.name or ".net." in kept.name for kept in state._tensors)


def counter():
    n = 0
    while True:
        n += 1
        yield n


@pytest.mark.parametrize("make", [counter, lambda: iter([1, 2, 3]), lambda: enumerate("abc")])
def test_an_iterator_that_moves_is_refused_by_name(tmp_path, make):
    class Iterates(Regression):
        def training_step(self, batch, batch_idx):
            next(self.stream)
            return super().training_step(batch, batch_idx)

    model = Iterates()
    model.stream = make()
    with pytest.raises(
        MisconfigurationException, match=r"model: self.stream changes while a client trains, and cannot"
    ):
        quiet_trainer(tmp_path, clients_per_round=1, local_steps=1).fit(model, Clients())


def test_what_is_too_large_to_copy_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("fedlight.module.state._COPIED", 0)
    module = Everything()
    module.big = torch.zeros(10**5)
    with pytest.raises(MisconfigurationException, match="model: self.big changes"), untouched(module):
        module.big.add_(1)


class Validated(Regression):
    """Keeps the smallest loss of all validations, in a metric, a list, an attribute and a buffer."""

    def __init__(self):
        super().__init__()
        self.smallest, self.losses, self.validations = MinMetric(), [], 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def validation_step(self, batch, batch_idx):
        self.now = F.mse_loss(self(batch[0]), batch[1])
        self.losses.append(self.now)
        self.seen += 1
        self.log("val/loss", self.now)

    def on_validation_epoch_end(self):
        self.validations += 1
        self.smallest.update(torch.stack(self.losses).mean())
        self.losses.clear()
        self.log("val/smallest", self.smallest.compute())
        self.log("val/seen", self.seen.float())


class WithValidation(Clients):
    def client_val_dataset(self, client):
        return self.client_dataset(client)


def test_only_the_evaluation_of_the_server_leaves_a_trace(tmp_path):
    """Views and clients have other losses: the server's metric knows nothing of them, nor theirs of the server's."""
    rows = []

    class Rows(Callback):
        def on_round_end(self, trainer, module):
            rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    model = Validated()
    quiet_trainer(tmp_path, callbacks=[Rows()], max_rounds=3, limit_val_batches=1).fit(model, WithValidation())
    best = [min(row["val/loss"] for row in rows[: i + 1]) for i in range(3)]
    assert [row["val/smallest"] for row in rows] == pytest.approx(best)
    assert model.validations == model.smallest._update_count == 3
    assert [row["val/seen"] for row in rows] == [1, 2, 3]  # a buffer of the server, in checkpoints
    for row in rows:
        assert row["val/smallest_all"] == pytest.approx(row["val/loss_all"])


SIZES: list[int] = []


class Traced(Everything):
    """Changes everything in its step."""

    def training_step(self, batch, batch_idx):
        SIZES.append(len(batch[0]))
        self.move()
        del self.extra  # more parameters to train would be refused
        random.random(), np.random.rand(), torch.rand(())
        return super().training_step(batch, batch_idx)


def test_the_trial_before_training_is_undone_and_as_large_as_a_batch(tmp_path):
    model, twin = Traced(), Everything()
    Everything.seen.clear()
    Everything.calls = 0
    draws = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    quiet_trainer(tmp_path, max_rounds=0).fit(model, Clients(sizes=(7, 3), batch_size=5))
    assert SIZES[0] == 5
    assert (
        Everything.calls == len(Everything.seen) == model.count == len(model.outputs) == model.best._update_count == 0
    )
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == draws
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_what_a_step_appends_in_the_second_pass_of_sam_is_taken_back(tmp_path):
    lengths = []

    class Appends(Regression):
        outputs: list = []  # noqa: RUF012

        def training_step(self, batch, batch_idx):
            self.outputs.append(1)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            lengths.append(len(self.outputs))

    quiet_trainer(tmp_path, perturbation=SAM(0.1), max_rounds=1, local_steps=3).fit(Appends(), Clients())
    assert lengths == [1, 2, 3] * 2
    assert Appends.outputs == []


class Grows(Regression):
    """A buffer that a step makes longer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.grow()
        return super().training_step(batch, batch_idx)

    def grow(self):
        self.cache = torch.zeros(len(self.cache) + 1)


class GrowsInPlace(Grows):
    def grow(self):
        self.cache.data = torch.zeros(len(self.cache) + 1)


class Deletes(Grows):
    def grow(self):
        self.cache = None


class GrowsInValidation(GrowsInPlace):
    def validation_step(self, batch, batch_idx):
        self.grow()  # as an observer that sees each batch


@pytest.mark.parametrize("model", [Grows, GrowsInPlace, Deletes, GrowsInValidation])
def test_a_buffer_that_changes_its_shape_is_refused_by_name(tmp_path, model):
    with pytest.raises(MisconfigurationException, match=r"model: buffer 'cache' was \(\[1\], torch.float32\) and is"):
        quiet_trainer(tmp_path).fit(model(), Clients())


def test_a_buffer_with_two_names_is_replaced_under_one(tmp_path):
    class Tied(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("first", torch.zeros(1))
            self.register_buffer("second", self.first)

        def training_step(self, batch, batch_idx):
            self.second = self.second + 1
            return super().training_step(batch, batch_idx)

    model = Tied()
    trainer = quiet_trainer(tmp_path, clients_per_round=4, local_steps=2)
    trainer.fit(model, Clients())
    assert trainer._session.federation.state.buffers["first"] == 6  # two steps in each of three rounds
    assert model.first is model.second


def test_a_late_teacher_without_a_copy_ends_the_run_by_name(tmp_path, monkeypatch):
    class Late(Regression):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Linear(100, 100).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1:
                self.teacher.weight.data.mul_(0.9)
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr("fedlight.module.state._COPIED", 0)
    with pytest.raises(MisconfigurationException, match=r"model: self.teacher.weight changes while a client trains"):
        quiet_trainer(tmp_path).fit(Late(), Clients())


class Logs(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/own", loss)
        return loss


class Counts(Logs):
    steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("model", "captures"), [(Logs, 0), (Counts, 8)])
def test_a_second_pass_captures_the_attributes_only_of_a_module_that_changes_some(
    tmp_path, monkeypatch, model, captures
):
    calls = []
    take = moving.attributes_of
    monkeypatch.setattr(moving, "attributes_of", lambda module: calls.append(1) or take(module))
    quiet_trainer(tmp_path, max_rounds=1, clients_per_round=4, perturbation=SAM(0.1)).fit(model(), Clients())
    assert len(calls) == captures


_LATE = ["on_fit_start", "on_train_start", "on_round_start", "on_validation_start"]


@pytest.mark.parametrize("hook", _LATE)
def test_what_hooks_register_is_refused_as_no_checkpoint_could_be_read_into_it(tmp_path, hook):
    model = Regression()
    setattr(model, hook, lambda: model.net.register_buffer("late", torch.zeros(3)))
    with pytest.raises(
        MisconfigurationException, match="registers 'net.late', which a checkpoint could not be read into"
    ):
        quiet_trainer(tmp_path).fit(model, Clients())
    quiet_trainer(tmp_path, max_rounds=1, enable_checkpointing=False).fit(model, Clients())


@pytest.mark.parametrize(("extra", "refused"), [({"a": [1, torch.ones(2)]}, False), ({1, 2}, True)])
def test_extra_state_that_no_checkpoint_can_be_read_with_is_refused(tmp_path, extra, refused):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return extra

        def set_extra_state(self, state):
            assert str(state) == str(extra)

    def model():
        module = Regression()
        module.net = Extra(3, 1)
        return module

    if refused:
        with pytest.raises(MisconfigurationException, match="'net._extra_state' of its state is a set"):
            quiet_trainer(tmp_path).fit(model(), Clients())
        return
    quiet_trainer(tmp_path, max_rounds=1).fit(model(), Clients())
    quiet_trainer(tmp_path, max_rounds=2).fit(model(), Clients(), "last")


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
@pytest.mark.parametrize("owner", ["module", "callback"])
def test_what_hooks_of_the_start_set_is_what_training_begins_with(tmp_path, hook, owner, caplog):
    class Centred(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(3))
            self.register_buffer("scale", None)

        def forward(self, x):
            return super().forward((x - self.centre) * self.scale)

    def begins(module):
        if not hasattr(module, "started"):
            module.started, module.centre = True, torch.full((3,), 0.5)
            module.scale = torch.full((), 2.0)
            nn.init.constant_(module.net.weight, 1.0)

    expected, found = Centred(), Centred()
    begins(expected)
    callbacks = [LambdaCallback(**{hook: lambda trainer, module: begins(module)})] if owner == "callback" else []
    if owner == "module":
        setattr(found, hook, lambda: begins(found))
    quiet_trainer(tmp_path / "expected").fit(expected, Clients())
    trainer = quiet_trainer(tmp_path, callbacks=callbacks)
    trainer.fit(found, Clients())
    assert torch.equal(weights(found), weights(expected))
    assert torch.equal(found.centre, torch.full((3,), 0.5))

    goes_on = Centred()
    goes_on.register_buffer("scale", torch.zeros(()))
    trainer = quiet_trainer(
        tmp_path, callbacks=[LambdaCallback(on_fit_start=lambda t, m: nn.init.zeros_(m.net.weight))]
    )
    trainer.fit(goes_on, Clients(), ckpt_path="last")
    assert torch.equal(weights(goes_on), weights(expected))


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_what_does_not_go_on_from_client_to_client_is_said_once(tmp_path, caplog, engine):
    class Average(Regression):
        def __init__(self):
            super().__init__()
            self.average, self.worst = self.net.weight.detach().clone(), MaxMetric()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.worst.update(loss.detach())
            return loss

        def on_train_batch_end(self, *_):
            self.average = (self.average + self.net.weight.detach()) / 2

    quiet_trainer(tmp_path, engine=engine, enable_checkpointing=False).fit(Average(), Clients())
    said = "model: steps change self.average: every client finds them as they were when the round began."
    assert [r.message for r in caplog.records if "steps change" in r.message] == [said]
