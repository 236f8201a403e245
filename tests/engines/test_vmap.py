"""The vmap engine agrees with the eager one, and says what it cannot do."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn, optim
from torchmetrics import MeanMetric

import fedlight.algorithms as algorithms
from fedlight.engines.base import LocalTraining
from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.engines.recordable import check_recordable
from fedlight.engines.vmap import engine as vmap
from fedlight.engines.vmap import programs
from fedlight.engines.vmap.engine import Vmap
from fedlight.local import LocalObjective
from fedlight.penalties.man import MAN
from fedlight.perturbations import ASAM, LESAM, SAM, DualSAM
from tests.engines import cases
from tests.engines.tape import Tape
from tests.helpers.tiny import Clients, Regression, quiet_trainer, two_classes, weights

CASES = {
    "plain": {},
    "equal clients": {"data": {"sizes": cases.EQUAL}},
    "own storage": {"data": {"shared": False}},
    "a batch larger than a client": {"data": {"batch_size": 10}},
    "one client": {"clients_per_round": 1},
    "man": {"callbacks": [MAN(0.3)]},
    "sam": {"perturbation": SAM(0.1)},
    "asam": {"perturbation": ASAM(0.1)},
    "lesam": {"perturbation": LESAM(0.1)},
    "dual sam, man": {"perturbation": DualSAM(0.1), "callbacks": [MAN(0.3)]},
    "fedprox": {"algorithm": algorithms.FedProx(0.5)},
    "scaffold": {"algorithm": algorithms.SCAFFOLD()},
    "feddc, sam": {"algorithm": algorithms.FedDC(0.1), "perturbation": SAM(0.1)},
    "fedcm": {"algorithm": algorithms.FedCM(0.3)},
    "momentum": {"net": {"optimizer": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)}},
    "adam": {"net": {"optimizer": partial(optim.Adam, lr=0.01)}},
    "adamw": {"net": {"optimizer": partial(optim.AdamW, lr=0.01, amsgrad=True), "groups": True}},
    "adagrad": {"net": {"optimizer": partial(optim.Adagrad, lr=0.01, initial_accumulator_value=0.1)}},
    "rmsprop": {"net": {"optimizer": partial(optim.RMSprop, lr=0.01, momentum=0.5, centered=True)}},
    "groups": {"net": {"groups": True, "optimizer": partial(optim.SGD, lr=0.1, momentum=0.9)}},
    "local steps": {"local_steps": 5},
    "accumulate": {"accumulate_grad_batches": 2},
    "accumulate, sam": {"accumulate_grad_batches": 2, "perturbation": SAM(0.1), "local_steps": 3},
    "clip norm": {"gradient_clip_val": 0.2},
    "clip value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "limit": {"limit_train_batches": 2},
    "schedule per step": {
        "net": {"scheduler": partial(optim.lr_scheduler.ExponentialLR, gamma=0.7), "interval": "step"}
    },
    "schedule per epoch": {
        "net": {"scheduler": partial(optim.lr_scheduler.ExponentialLR, gamma=0.5), "interval": "epoch", "groups": True}
    },
    "schedule per round": {"net": {"scheduler": partial(optim.lr_scheduler.ExponentialLR, gamma=0.5)}},
    "momentum schedule": {
        "net": {
            "optimizer": partial(optim.SGD, lr=0.1, momentum=0.9),
            "scheduler": partial(optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=20),
            "interval": "step",
        }
    },
    "batch norm": {"net": {"norm": True}, "data": {"sizes": (6, 10, 14)}, "clients_per_round": 3},
    "batch norm, sam": {
        "net": {"norm": True},
        "perturbation": SAM(0.1),
        "data": {"sizes": (8, 8)},
        "clients_per_round": 2,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_vmap_agrees_with_eager(name, tmp_path):
    expected, rows = cases.train(tmp_path, "eager", **CASES[name])
    found, found_rows = cases.train(tmp_path, Vmap(), **CASES[name])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=key)
    assert len(found_rows) == len(rows) == 2
    for row, found_row in zip(rows, found_rows, strict=True):
        # Losses and accuracies are summed in float32.
        assert found_row == pytest.approx(row, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_a_traced_program_gives_the_same_bits(tmp_path, monkeypatch):
    settings = {"perturbation": SAM(0.1), "callbacks": [MAN(0.3)], "net": {"dropout": 0.5}, "precision": "32-true"}
    monkeypatch.setattr(programs, "TRACE_AFTER", 10**9)
    expected, _ = cases.train(tmp_path, "vmap", **settings)
    monkeypatch.setattr(programs, "TRACE_AFTER", 2)
    found, _ = cases.train(tmp_path, "vmap", **settings)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


class Mixes(algorithms.FedAvg):
    """Has some clients take their loss at a mixture with another model."""

    def objective(self, received, client, weight):
        other = received["params"].flip(0) if weight > 1 else None
        return LocalObjective(received["params"], other=other, share=0.5)


class Batches(cases.Net):
    """Has a learning rate for each number of batches; clients of three and of four take two steps."""

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=0.1 * self.trainer.num_training_batches)


@pytest.mark.parametrize("what", ["other models", "other rates"])
def test_clients_may_have_programs_and_rates_of_their_own(what, tmp_path, monkeypatch):
    settings = {"algorithm": Mixes()} if what == "other models" else {"accumulate_grad_batches": 2}
    if what == "other rates":
        monkeypatch.setattr(cases, "Net", Batches)
    expected, _ = cases.train(tmp_path, "eager", **settings)
    found, _ = cases.train(tmp_path, "vmap", **settings)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_the_clients_may_be_split_into_waves(tmp_path, monkeypatch):
    expected, _ = cases.train(tmp_path, "vmap")
    monkeypatch.setattr("fedlight.engines.vmap.programs._ENTRIES", 700)  # two clients of 310 parameters
    found, _ = cases.train(tmp_path, "vmap")
    torch.testing.assert_close(found, expected)


def test_reading_ahead_in_small_pieces_changes_nothing(tmp_path, monkeypatch):
    expected, _ = cases.train(tmp_path, "vmap")
    monkeypatch.setattr("fedlight.engines.vmap.stacked_clients._GATHERED_BYTES", 1)
    found, _ = cases.train(tmp_path, "vmap")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_clients_draw_different_dropout_masks_from_a_seed(tmp_path):
    runs = [cases.train(tmp_path, "vmap", net={"dropout": 0.5}, seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(runs[0]["server/params"], runs[1]["server/params"])
    assert not torch.equal(runs[0]["server/params"], runs[2]["server/params"])


def test_a_value_that_a_callback_changes_is_not_frozen(tmp_path, monkeypatch):
    class Louder(Callback):
        def on_round_start(self, trainer, module):
            man.zeta = 10.0 * trainer.current_round

    monkeypatch.setattr(programs, "TRACE_AFTER", 1)
    man = MAN(0.0)
    settings = {"callbacks": [man, Louder()], "max_rounds": 3, "data": {"sizes": cases.EQUAL}}
    expected, _ = cases.train(tmp_path, "eager", **settings)
    man.zeta = 0.0
    found, _ = cases.train(tmp_path, "vmap", **settings)
    torch.testing.assert_close(found, expected)


class Odd(cases.Net):
    """Does in its step what ``act`` says."""

    def __init__(self, act, **settings):
        super().__init__(**settings)
        self.act = act
        self.average = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return self.act(self, loss, batch, batch_idx)


def branches(module, loss, batch, index):
    return loss * 2 if loss > 1 else loss


def reads_the_round(module, loss, batch, index):
    return loss * (1 + module.current_epoch)


def reads_the_index(module, loss, batch, index):
    return loss if index % 2 else loss * 2


def updates_a_metric(module, loss, batch, index):
    module.average.update(loss.detach())
    return loss


def skips(module, loss, batch, index):
    return None if module.training and index == 10 else loss


def changes_its_weights(module, loss, batch, index):
    module.kept.add_(batch[0].mean())
    return loss


def draws_for_all(module, loss, batch, index):
    return loss * torch.distributions.Normal(loss.detach(), 1.0).rsample()


REFUSED = {
    draws_for_all: r"draws random numbers into .* no client's own, .* torch.randn_like draw .*: `return loss \* ",
    branches: r"branches on the value of a tensor.*test_vmap.py:\d+: `return loss \* 2 if loss > 1 else loss`",
    reads_the_round: r"reads trainer.current_epoch",
    reads_the_index: r"reads batch_idx",
    skips: r"reads batch_idx",
    updates_a_metric: r"updates the metric 'average'",
    changes_its_weights: r"Odd.training_step changes self.kept, which a recorded step would freeze",
}


@pytest.mark.parametrize("act", REFUSED)
def test_what_cannot_be_batched_is_named_before_the_first_round(act, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "Net", partial(Odd, act))
    if act is changes_its_weights:
        monkeypatch.setattr(Odd, "kept", torch.zeros(()), raising=False)
    with pytest.raises(MisconfigurationException, match=r"(?s)trainer.engine=vmap: .*" + REFUSED[act]) as error:
        cases.train(tmp_path, "vmap")
    assert "trainer.engine=eager" in str(error.value)


def test_a_layer_that_mixed_precision_has_for_one_client_alone_is_named_with_the_way_out(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    given = {"engine": "vmap", "max_rounds": 1}
    with pytest.raises(MisconfigurationException, match="one client alone, and trainer.precision=bf16-true for many"):
        quiet_trainer(tmp_path, precision="bf16-mixed", **given).fit(Regression(net=net), Clients())
    quiet_trainer(tmp_path, precision="bf16-true", **given).fit(Regression(net=net), Clients())


def test_hooks_of_every_batch_are_refused(tmp_path):
    class Watches(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            pass

    with pytest.raises(MisconfigurationException, match="Watches overrides on_train_batch_end"):
        cases.train(tmp_path, "vmap", callbacks=[Watches()])


def test_an_optimizer_that_mixes_entries_is_refused(tmp_path):
    class Own(optim.SGD):
        pass

    with pytest.raises(MisconfigurationException, match="cannot step Own"):
        cases.train(tmp_path, "vmap", net={"optimizer": partial(Own, lr=0.1)})


def clamps(optimizer):
    group = optimizer.param_groups[0]
    optimizer.register_step_post_hook(lambda *_: [p.data.clamp_(-1, 1) for p in group["params"]])


def begins(optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)


def other_step(optimizer):
    optimizer.step = lambda closure=None: optim.SGD.step(optimizer, closure)


@pytest.mark.parametrize("engine", ["vmap", CudaGraph(recorder=Tape)], ids=["vmap", "cuda_graph"])
@pytest.mark.parametrize("change", [clamps, begins, other_step])
def test_what_an_optimizer_does_besides_its_class_is_refused(change, engine, tmp_path):
    def make():
        change(optimizer := optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        return optimizer

    model = Regression()
    model.configure_optimizers = make
    with pytest.raises(MisconfigurationException, match="SGD of configure_optimizers has hooks, a step or a state of"):
        quiet_trainer(tmp_path, engine=engine).fit(model, Clients())


def test_16_mixed_is_refused():
    # Fabric has no 16-mixed on CPUs, so the check itself is asked.
    precision = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    fabric = SimpleNamespace(strategy=SimpleNamespace(precision=precision))
    training = LocalTraining(cases.Net(), fabric, seed=0, batch_size=4, epochs=1, steps=None)
    with pytest.raises(MisconfigurationException, match="trainer.precision=16-mixed"):
        check_recordable(training, "vmap")


def test_a_frozen_layer_stays(tmp_path, monkeypatch):
    class Frozen(cases.Net):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.conv.requires_grad_(False)
            self.tied = nn.Linear(5, 3)
            self.tied.weight = self.fc2.weight

    monkeypatch.setattr(cases, "Net", Frozen)
    torch.manual_seed(0)
    expected, _ = cases.train(tmp_path, "eager")
    torch.manual_seed(0)
    found, _ = cases.train(tmp_path, "vmap")
    torch.testing.assert_close(found, expected)


def hooked(net):
    net.weight.register_hook(lambda gradient: gradient * 0.1)


def decays(net):
    net.unused = nn.Parameter(torch.ones(1))


def renorms(net):
    net.register_forward_pre_hook(lambda net, _: (net.weight.data.clamp_(-0.1, 0.1), None)[1])


REFUSED_AT = {hooked: "net.weight has a hook", decays: "unused has no gradient", renorms: "net.weight, and a recorded"}


@pytest.mark.parametrize("change", REFUSED_AT)
def test_what_a_parameter_does_in_autograd_alone_is_refused(change, tmp_path):
    model = Regression()
    change(model.net)
    model.configure_optimizers = lambda: optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(MisconfigurationException, match=f"trainer.engine=vmap: .*parameter .*{REFUSED_AT[change]}"):
        quiet_trainer(tmp_path, engine="vmap").fit(model, Clients())


class Skips(Regression):
    """Takes no step with a single sample."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if len(batch[0]) > 1 else None


class Encodes(Regression):
    """Does what torch does for one client, and not for several."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + nn.functional.one_hot((batch[1] > 0).long()).sum()


@pytest.mark.parametrize(("module", "expected"), [(Skips, "returned None; every step needs"), (Encodes, "branches")])
def test_steps_of_every_size_are_tried(module, expected, tmp_path):
    trainer = quiet_trainer(tmp_path, engine="vmap", clients_per_round=4, accumulate_grad_batches=4)
    with pytest.raises(MisconfigurationException, match=f"trainer.engine=vmap: .*{expected}"):
        trainer.fit(module(), Clients((14, 5, 5, 5)))


class Decayed(Regression):
    def __init__(self):
        super().__init__()
        self.weights = [p for p in self.parameters() if p.ndim > 1]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.weights[0].square().sum()


@pytest.mark.parametrize("settings", [{"engine": "vmap"}, {"algorithm": algorithms.MOON()}], ids=["vmap", "eager"])
def test_a_parameter_that_a_step_takes_from_a_list_is_refused(settings, tmp_path):
    """No other client's, or model's, could take its place: its gradient was lost, and what it put out was another's."""
    with pytest.raises(MisconfigurationException, match=r"in it holds net.weight, and a step takes it from there"):
        quiet_trainer(tmp_path, **settings).fit(Decayed(), Clients())


class Selects(Regression):
    def training_step(self, batch, batch_idx):
        penalty = sum(t.square().sum() for t in vars(self.net)["_parameters"].values() if isinstance(t, nn.Parameter))
        return super().training_step(batch, batch_idx) + penalty


def test_what_takes_the_place_of_a_parameter_is_one_to_isinstance(tmp_path):
    """A step that looks lost the term, silently."""
    found = []
    for engine in ("eager", "vmap"):
        model = Selects()
        quiet_trainer(tmp_path, engine=engine, max_rounds=2).fit(model, Clients())
        found.append(weights(model))
    torch.testing.assert_close(*found)


class Makes(dict):
    """As transformers' table of activations, which makes what it is asked for."""

    def keys(self):
        raise NotImplementedError

    __getitem__ = keys


ACTIVATIONS = Makes(relu=torch.relu)


class Siamese(Regression):
    """A submodule under two names, of which another one shares a parameter."""

    def __init__(self):
        super().__init__(net=nn.Linear(3, 1))
        self.same, self.other = self.net, nn.Linear(3, 1)
        self.other.bias = self.net.bias

    def forward(self, x):
        return ACTIVATIONS.get("relu")(self.other(x) + self.same(2 * x) - self.net(x))[:, 0]


def test_a_submodule_may_have_two_names(tmp_path):
    found = []
    for engine in ("eager", "vmap"):
        model = Siamese()
        with torch.no_grad():
            model.other.weight.fill_(0.5)
        quiet_trainer(tmp_path, engine=engine, max_rounds=2).fit(model, Clients())
        found.append(weights(model))
    torch.testing.assert_close(*found)


def test_an_exception_names_round_and_clients(tmp_path, monkeypatch):
    class Fails(vmap.StackedClients):
        def __init__(self, round, tasks, parts):
            super().__init__(round, tasks, parts)
            if round == 1:
                raise ZeroDivisionError("mine")

    monkeypatch.setattr(vmap, "StackedClients", Fails)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        cases.train(tmp_path, "vmap", max_rounds=2, clients_per_round=2)
    assert re.fullmatch(r"This happened in round 2, client \d, \d.", caught.value.__notes__[0])


class Recurrent(Regression):
    """Reads its inputs one after the other."""

    def __init__(self):
        super().__init__(net=nn.GRU(1, 2, batch_first=True))

    def forward(self, x):
        return self.net(x.unsqueeze(2))[0][:, -1, 0]


class Classes(Regression):
    """A recurrent layer, which torch takes no batched inputs for where its weights are not batched."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.unsqueeze(2))[0][:, -1], y)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_model_that_all_clients_share_is_tried_as_in_a_round(tmp_path):
    trainer = quiet_trainer(tmp_path, engine="vmap", algorithm=algorithms.FedNTD(), limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match="trainer.engine=vmap: .* cannot be batched"):
        trainer.fit(Classes(net=nn.GRU(1, 3, batch_first=True)), two_classes())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_recurrent_layer_is_left_as_it_was(tmp_path):
    """It keeps a list of its parameters, which torch.func does not put back."""
    models = {engine: Recurrent() for engine in ("eager", "vmap")}
    for engine, model in models.items():
        quiet_trainer(tmp_path, engine=engine, logger=False, max_rounds=2).fit(model, Clients())
    torch.testing.assert_close(weights(models["vmap"]), weights(models["eager"]), rtol=0, atol=1e-6)


class LogsWidths(cases.Net):
    """In batches of one it logs a number under a name that is a float64 tensor's otherwise."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/share", 0.25 if len(batch[1]) == 1 else loss.detach() * 0 + 0.5)
        return loss


def test_a_name_may_be_logged_in_two_types(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "Net", LogsWidths)
    (_, eager), (_, rows) = (cases.train(tmp_path, engine) for engine in ("eager", "vmap"))
    assert [row["train/share"] for row in rows] == pytest.approx([row["train/share"] for row in eager])
