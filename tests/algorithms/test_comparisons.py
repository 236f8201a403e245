"""Methods that compare the client's model with others on the batch: MOON, FedNTD, and penalties of one's own."""

from math import log

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fedlight import MAN
from fedlight.algorithms import MOON, FedAvg, FedNTD
from fedlight.algorithms.fedntd import NotTrueDistillation
from fedlight.algorithms.moon import ModelContrast
from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.engines.vmap import programs
from fedlight.penalties.batches import cloned
from fedlight.penalties.comparison import Comparison
from fedlight.penalties.step import penalized_step
from fedlight.perturbations import SAM
from tests.algorithms import networks
from tests.algorithms.fitted import fit_network
from tests.engines.cases import Images, Net, train
from tests.engines.tape import Tape
from tests.helpers.tiny import Clients as Targets
from tests.helpers.tiny import Regression, quiet_trainer, weights

ENGINES = {"eager": lambda: "eager", "vmap": lambda: "vmap", "cuda_graph": lambda: CudaGraph(2, Tape)}


TWINS = {
    "MOON": (MOON(2.0, 0.3), networks.moon(2.0, 0.3, 0.1)),
    "FedNTD": (FedNTD(2.0, 1.7), networks.fedntd(2.0, 1.7, 0.1)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TWINS)
def test_rounds_equal_those_of_the_twin_with_sam(name, engine):
    algorithm, expected = TWINS[name]
    found = fit_network(algorithm, perturbation=SAM(0.1), engine=ENGINES[engine]())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_compiled_step_tells_the_models_apart(monkeypatch):
    """In a client's first round they are one tensor."""
    monkeypatch.setattr(programs, "BACKEND", "aot_eager")
    found = fit_network(MOON(2.0, 0.3), engine="eager", compile=True)
    np.testing.assert_allclose(found, networks.moon(2.0, 0.3), rtol=0, atol=1e-10)


def test_terms_by_hand():
    e = torch.eye(2)
    measured = {"features": e[:1], "start/features": e[:1], "previous/features": e[1:]}
    assert float(ModelContrast(3.0, 0.5).penalty(None, measured)) == pytest.approx(3 * log(1 + torch.e**-2), rel=1e-5)
    # Without the true class: 1/2, 1/2 for the model that was received, 1/4, 3/4 for the client's.
    logits = {"start/logits": torch.zeros(2, 3), "logits": torch.tensor([[9.0, 0.0, log(9)], [0.0, -5.0, log(9)]])}
    term = NotTrueDistillation(2.0, 2.0).penalty(None, logits | {"targets": torch.tensor([0, 1])})
    assert float(term) == pytest.approx(2 * (0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75)), rel=1e-5)
    half = NotTrueDistillation().penalty(None, {k: v.half() for k, v in logits.items()} | {"targets": e[0].long()})
    assert half.dtype == torch.float32
    assert half.isfinite()


class Restless(Net):
    """Draws, counts and collects in each step."""

    def __init__(self):
        super().__init__(norm=True, dropout=0.5)
        self.steps, self.seen = 0, []

    def training_step(self, batch, batch_idx):
        self.steps += 1
        MODES.add((self.training, self.norm.training, self.dropout.training))
        self.seen.append(len(batch[1]))
        self.log("train/seen", float(sum(self.seen)))
        return super().training_step((batch[0] + torch.rand_like(batch[0]), batch[1]), batch_idx)


MODES: set[tuple[bool, ...]] = set()


def test_the_other_models_leave_no_trace(tmp_path):
    """With weight 0 all is as in FedAvg, to the bit: masks, noise, buffers, attributes and logs."""
    found = []
    for algorithm in (FedAvg(), MOON(mu=0), FedNTD(beta=0)):
        model = Restless()
        trainer = quiet_trainer(tmp_path, algorithm=algorithm, engine="eager", accumulate_grad_batches=2, max_rounds=1)
        trainer.fit(model, Images())
        found.append(
            (weights(model), {k: v for k, v in trainer.callback_metrics.items() if k[:5] in ("train", "comm/")})
        )
    for state, logged in found[1:]:
        assert torch.equal(state, found[0][0])
        assert logged.pop("train/penalty") == 0
        assert logged == found[0][1]
    assert {(True, True, True), (False, True, False)} == MODES  # as in the look before training


class TakingGradients(networks.Network):
    """Adds what has no weight and needs gradients with regard to inputs and parameters, as penalties on them do."""

    def training_step(self, batch):
        x = batch[0].clone().requires_grad_()
        self.head.bias.requires_grad_(False).requires_grad_(True)
        loss = super().training_step((x, batch[1]))
        found = torch.autograd.grad(loss, [x, *self.parameters()], create_graph=True)
        return loss + 0 * sum(g.square().sum() for g in found)


@pytest.mark.parametrize("algorithm", [MOON(2.0), FedNTD(2.0)])
def test_steps_may_take_gradients_of_their_own(tmp_path, algorithm):
    found = []
    for i, model in enumerate((networks.Network(), TakingGradients())):
        trainer = quiet_trainer(tmp_path / str(i), algorithm=algorithm, engine="eager", max_rounds=2, local_epochs=2)
        trainer.fit(model, networks.Points())
        found.append((weights(model), trainer.callback_metrics["train/penalty"]))
    assert found[0][1] != 0
    torch.testing.assert_close(found[1], found[0])


def test_other_models_have_gradients_only_where_a_step_takes_some(tmp_path):
    class Asked(networks.Network):
        def training_step(self, batch):
            modes.add((getattr(penalized_step(self), "model", None) is None, torch.is_grad_enabled()))
            return super().training_step(batch)

    modes = set()
    quiet_trainer(tmp_path, algorithm=MOON(), engine="eager", max_rounds=1).fit(Asked(), networks.Points())
    assert modes == {(True, True), (False, False)}


class Noted(Comparison):
    """Notes whether the other model's features are the module's own at the start, and adds their distance."""

    def penalty(self, module, measured):
        DISTANCES.append((measured["features"] - measured["start/features"]).detach().abs().max())
        return (measured["features"] - measured["start/features"]).square().mean()


DISTANCES: list[torch.Tensor] = []


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [MOON(), FedNTD()])
def test_engines_agree_with_everything_beside(tmp_path, algorithm):
    """BatchNorm, batches that accumulate, MAN, SAM, and another comparison on a layer that is named."""
    found = []
    for i, engine in enumerate(ENGINES.values()):
        beside = {"perturbation": SAM(0.1), "callbacks": [MAN(), Noted("act1")], "accumulate_grad_batches": 2}
        DISTANCES.clear()
        short = {"max_rounds": 1, "net": {"norm": True}}
        found.append(train(tmp_path / str(i), engine(), algorithm=algorithm, **beside, **short))
        if i == 0:
            assert (float(DISTANCES[0]), float(DISTANCES[-1]) > 0) == (0, True)
    for state, rows in found[1:]:
        assert state.keys() == found[0][0].keys()
        for name, value in state.items():
            torch.testing.assert_close(value, found[0][0][name], rtol=0, atol=1e-8, msg=name)
        for row, expected in zip(rows, found[0][1], strict=True):
            assert row["train/penalty"] == pytest.approx(expected["train/penalty"])


def test_the_weight_of_a_methods_own_penalty_may_follow_the_round(tmp_path):
    beta = {"schedule": "linear", "from": 0, "to": 1, "rounds": 2}
    trainer = quiet_trainer(tmp_path, algorithm=FedNTD(beta), max_rounds=2, local_epochs=2)
    trainer.fit(networks.Network(), networks.Points())
    assert trainer.callback_metrics["schedule/algorithm.beta"] == 0.5
    assert trainer.callback_metrics["train/penalty"] > 0


class Ignoring(networks.Network):
    """Leaves out a class, and writes into its batch."""

    def __init__(self, ignored, in_place=True, label=None):
        super().__init__()
        self.label, self.in_place, self.ignored = label, in_place, ignored

    def training_step(self, batch):
        x, y = batch
        y = y if self.label is None else y.masked_fill(y == self.label, self.ignored)
        x = x.mul_(0.5) if self.in_place else x * 0.5
        return F.cross_entropy(self.head(self.act(self.first(x))), y, ignore_index=self.ignored)


def trained(tmp_path, model, algorithm, **settings):
    quiet_trainer(tmp_path, algorithm=algorithm, logger=False, max_rounds=2, local_epochs=2, **settings).fit(
        model, networks.Points()
    )
    return weights(model)


def test_ignored_targets_and_batches_that_a_step_writes_into(tmp_path):
    """Also in the second pass of SAM, and of the models that are compared with."""
    for algorithm in (FedNTD(3.0), MOON(3.0)):
        models = Ignoring(2), Ignoring(2, in_place=False), Ignoring(-100, in_place=False, label=2)
        one, other, third = (
            trained(tmp_path, model, algorithm, perturbation=SAM(0.1), engine="eager") for model in models
        )
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    logits = torch.tensor([[9.0, 0.0, log(9)], [0.0, -5.0, log(9)]])
    measured = {"start/logits": torch.zeros(2, 3), "logits": logits, "targets": torch.tensor([-100, 1])}
    term = NotTrueDistillation(2.0, 2.0).penalty(None, measured)
    assert float(term) == pytest.approx(2 * (0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75)), rel=1e-5)
    assert NotTrueDistillation().penalty(None, measured | {"targets": torch.tensor([-100, -100])}) == 0


def test_a_batch_is_copied_with_all_its_containers():
    x = torch.ones(2)
    batch = {"x": x, "parts": [x, {"y": x}], "text": "a"}
    other = cloned(batch)
    other["parts"][1].pop("y").zero_()
    other["x"].zero_()
    assert batch["parts"][1]["y"].tolist() == [1, 1]
    assert other["text"] == "a"


class Looking(networks.Network):
    """A teacher, and figures for the log, come last."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def training_step(self, batch):
        loss = super().training_step(batch)
        with torch.set_grad_enabled(not self.teacher):
            logits = self.head(self.act(self.first(batch[0] + 1)))
        return loss if self.teacher else loss + 0 * F.cross_entropy(logits.detach(), batch[1])


@pytest.mark.parametrize("engine", ["eager", "vmap"])
def test_what_the_last_calls_took_without_a_gradient_is_not_compared(tmp_path, engine):
    for algorithm, model, missing in ((MOON(), Looking(True), "features"), (FedNTD(), Looking(False), "logits")):
        with pytest.raises(MisconfigurationException, match=f"found no '{missing}' .* calls must have a gradient"):
            trained(tmp_path, model, algorithm, engine=engine)


class NoHead(Net):
    """A classifier without a linear layer."""

    def forward(self, x):
        return self.act1(self.conv(x)).mean((2, 3))


def fit(root, model, data, callbacks=(), **settings):
    quiet_trainer(root, max_rounds=1, callbacks=[*callbacks, Begun()], **settings).fit(model, data)


BEGUN = []


class Begun(Callback):
    def on_round_start(self, trainer, pl_module):
        BEGUN.append(type(trainer.algorithm).__name__)


def test_what_is_not_there_is_named_before_training(tmp_path):
    missing = r"ModelContrast found no 'features' in NoHead.*`layer` names, one of \['conv', 'act1'"
    with pytest.raises(MisconfigurationException, match=missing):
        fit(tmp_path, NoHead(), Images(), algorithm=MOON())
    fit(tmp_path, NoHead(), Images(), algorithm=MOON(layer="act1"))
    with pytest.raises(MisconfigurationException, match=r"`layer`: 'act.' stands for act1, act2; name one of them"):
        fit(tmp_path, NoHead(), Images(), algorithm=MOON(layer="act."))
    with pytest.raises(MisconfigurationException, match="`layers`: 'head' matches nothing"):
        fit(tmp_path, NoHead(), Images(), algorithm=MOON(layer="head"))
    with pytest.raises(MisconfigurationException, match="NotTrueDistillation found no 'logits' in Regression"):
        fit(tmp_path, Regression(), Targets(), algorithm=FedNTD())
    with pytest.raises(MisconfigurationException, match=r"no 'previous/features'.*LocalObjective\.references"):
        fit(tmp_path, Net(), Images(), callbacks=[ModelContrast()])
    assert set(BEGUN) == {"MOON"}  # the one with a layer


def test_fedntd_of_two_classes_is_refused():
    measured = {"targets": torch.tensor([0, 1]), "logits": torch.ones(2, 2), "start/logits": torch.zeros(2, 2)}
    with pytest.raises(
        ValueError, match="FedNTD compares the classes that a sample does not have; of two, one remains"
    ):
        NotTrueDistillation().penalty(torch.nn.Identity(), measured)


def test_lightnings_own_trainer_has_no_other_model(tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, callbacks=[NotTrueDistillation()], default_root_dir=tmp_path, **quiet)
    trainer.callbacks = [c for c in trainer.callbacks if "Summary" not in type(c).__name__]
    loader = DataLoader(networks.Points().all, batch_size=9)
    with pytest.raises(MisconfigurationException, match=r"no 'start/logits'.*FederatedTrainer only"):
        trainer.fit(networks.Network(), loader)
