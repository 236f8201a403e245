"""MAN in Lightning's Trainer: every optimizer step gets the formula's gradient, and nothing is left behind."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from fedlight.callbacks import MAN, penalized_step
from tests.callbacks.nets import (
    Batches,
    Lit,
    Recorder,
    Validated,
    batches,
    formula,
    gradient,
    is_untouched,
    norms,
    silent_trainer,
)

ZETA = 0.7
ROOT = Path(__file__).parents[2]
TOLERANCE = {"rtol": 1e-12, "atol": 1e-15}


def fit(module, data, *callbacks, compiled=None, validation=None, **kwargs):
    """Gradients of each optimizer step, and the trainer."""
    recorder = Recorder()
    trainer = silent_trainer(*callbacks, recorder, **kwargs)
    model = module if compiled is None else torch.compile(module, backend=compiled)
    trainer.fit(model, Batches(data), None if validation is None else Batches(validation))
    return recorder.gradients, trainer


def formula_gradients(module, groups, zeta=ZETA):
    """The formula's gradient for each optimizer step, over the mean of its batches, with SGD in between."""
    found = []
    for group in groups:
        loss = sum(formula(module, batch, zeta) for batch in group) / len(group)
        found.append(gradient(loss, module))
        with torch.no_grad():
            for p, g in zip(module.parameters(), found[-1], strict=True):
                p.sub_(module.lr * g)
    return found


def assert_same(ours, theirs, **tolerance):
    assert len(ours) == len(theirs)
    for step, expected in zip(ours, theirs, strict=True):
        for a, b in zip(step, expected, strict=True):
            torch.testing.assert_close(a, b, **(tolerance or TOLERANCE))


def test_each_step_follows_the_formula_and_is_reported():
    data, module = batches(3), Lit()
    ours, trainer = fit(module, data, MAN(ZETA))
    twin = Lit()
    expected, means = [], []
    for batch in data:
        means.append(norms(twin.net, batch[0]))
        expected += formula_gradients(twin, [[batch]])
    assert_same(ours, expected)
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items()}
    assert metrics.keys() == {"train/penalty", "man/net.relu", "man/net.tanh"}
    relu, tanh = (sum(m[i].item() for m in means) / 3 for i in (0, 1))
    assert metrics["man/net.relu"] == pytest.approx(relu)
    assert metrics["man/net.tanh"] == pytest.approx(tanh)
    assert metrics["train/penalty"] == pytest.approx(ZETA / 2 * (relu + tanh))
    assert is_untouched(module)


def test_callbacks_that_come_later_see_the_end_of_fit_without_it():
    class Watch(Callback):
        untouched = None

        def on_fit_start(self, trainer, pl_module):
            assert penalized_step(pl_module) is not None

        def on_fit_end(self, trainer, pl_module):
            self.untouched = is_untouched(pl_module)

    watch = Watch()
    fit(Lit(), batches(1), MAN(ZETA), watch)
    assert watch.untouched


def test_the_plain_gradient_is_another():
    data = batches(1)
    with_man, _ = fit(Lit(), data, MAN(ZETA))
    without, _ = fit(Lit(), data)
    assert_same(without, formula_gradients(Lit(), [data], zeta=0))
    assert (with_man[0][0] - without[0][0]).abs().max() > 1e-3


def test_gradient_accumulation():
    data = batches(4)
    ours, _ = fit(Lit(), data, MAN(ZETA), accumulate_grad_batches=2)
    assert_same(ours, formula_gradients(Lit(), [data[:2], data[2:]]))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_16_mixed_with_a_gradient_scaler(accumulate):
    # The Trainer allows "16-mixed" on a GPU only; the plugin and its GradScaler are the same here.
    data = batches(accumulate, dtype=torch.float32)
    plugin = MixedPrecision("16-mixed", "cpu")
    module = Lit(torch.float32)
    ours, trainer = fit(module, data, MAN(ZETA), plugins=[plugin], accumulate_grad_batches=accumulate)
    assert plugin.scaler.get_scale() == 65536
    expected = formula_gradients(Lit(torch.float32), [data])
    plain = formula_gradients(Lit(torch.float32), [data], zeta=0)
    assert_same(ours, expected, rtol=0, atol=1e-3)
    assert (expected[0][0] - plain[0][0]).abs().max() > 1e-2  # far above the tolerance
    assert trainer.callback_metrics["train/penalty"].dtype == torch.float32


def test_16_mixed_activations_beyond_the_squares_of_float16():
    data = [(300 * x, y) for x, y in batches(1, dtype=torch.float32)]
    module = Lit(torch.float32)
    with torch.no_grad():
        module.net.fc1.weight.mul_(2)
    large = norms(module.net, data[0][0])[0].item()
    assert large > 65504
    _, trainer = fit(module, data, MAN(1e-6), plugins=[MixedPrecision("16-mixed", "cpu")])
    assert trainer.callback_metrics["man/net.relu"].item() == pytest.approx(large, rel=1e-2)


def test_bf16_mixed():
    data = batches(1, dtype=torch.float32)
    ours, trainer = fit(Lit(torch.float32), data, MAN(ZETA), precision="bf16-mixed")
    expected = formula_gradients(Lit(torch.float32), [data])
    assert_same(ours, expected, rtol=0, atol=5e-3)
    assert trainer.callback_metrics["man/net.relu"].dtype == torch.float32


def test_gradient_clipping_sees_the_penalty():
    data = batches(1)
    module, before = Lit(), Lit()
    fit(module, data, MAN(ZETA), gradient_clip_val=0.01)
    (expected,) = formula_gradients(Lit(), [data])
    total = torch.cat([g.flatten() for g in expected]).norm()
    for p, q, g in zip(module.parameters(), before.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * g * 0.01 / (total + 1e-6), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_torch_compile():
    data, module = batches(2), Validated()
    ours, trainer = fit(module, data, MAN(ZETA), compiled="aot_eager", validation=data)
    assert_same(ours, formula_gradients(Lit(), [[batch] for batch in data]), rtol=1e-9, atol=1e-12)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(mean_loss(module, data))
    assert not any(child._forward_hooks for child in module.modules())
    assert penalized_step(module) is None


def mean_loss(module, data):
    with torch.no_grad():
        return sum(formula(module, batch, 0).item() for batch in data) / len(data)


def test_what_was_compiled_without_it_is_compiled_anew():
    data, module = batches(1), Lit()
    start = {k: v.clone() for k, v in module.state_dict().items()}
    expected, plain = formula_gradients(Lit(), [data]), formula_gradients(Lit(), [data], zeta=0)
    for callbacks, wanted in (((), plain), ((MAN(ZETA),), expected), ((), plain), ((MAN(ZETA),), expected)):
        module.load_state_dict(start)
        compiled = "aot_eager" if module._compiler_ctx is None else None  # fit leaves the module compiled
        ours, _ = fit(module, data, *callbacks, compiled=compiled)
        assert_same(ours, wanted, rtol=1e-10, atol=1e-13)


def run_script(name):
    """The output of a script of this folder, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "MASTER_", "LOCAL_", "NODE_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes():
    """Each rank has its own mean; for batches of one size the averaged gradient is the formula's over all of them."""
    assert "gradients agree" in run_script("ddp.py")


@pytest.mark.slow
def test_the_twin_package():
    """In a process of its own, as importing it changes where Lightning writes its messages."""
    pytest.importorskip("pytorch_lightning")
    assert "twin agrees" in run_script("twin.py")


class CallsTrainingStep(Lit):
    """Its validation borrows from its training."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx), batch_size=8)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.training_step(batch, batch_idx), batch_size=8)


class StaysInTrainingMode(CallsTrainingStep):
    """It does not switch to evaluation mode either."""

    def on_validation_model_eval(self):
        pass

    on_test_model_eval = on_validation_model_eval


@pytest.mark.parametrize("cls", [Validated, CallsTrainingStep, StaysInTrainingMode])
def test_validation_and_test_are_untouched(cls):
    data = batches(2)

    class Watch(Callback):
        sane = None

        def on_sanity_check_end(self, trainer, pl_module):
            assert man.norms(pl_module) == {}
            self.sane = trainer.callback_metrics["val/loss"].item()

    man, watch, module = MAN(ZETA), Watch(), cls()
    before = mean_loss(module, data)
    _, trainer = fit(module, data, man, watch, validation=data)
    assert watch.sane == pytest.approx(before, rel=1e-6)
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(mean_loss(module, data), rel=1e-6)
    for run in (trainer.validate, trainer.test):
        (metrics,) = run(module, Batches(data), verbose=False)
        assert list(metrics.values()) == [pytest.approx(mean_loss(module, data), rel=1e-6)]
    assert is_untouched(module)


def test_an_exception_leaves_nothing_behind():
    class Failing(Lit):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(ZeroDivisionError):
        fit(module, batches(2), MAN(ZETA))
    assert is_untouched(module)


def test_a_graph_that_the_step_has_used_up_is_explained():
    """As in adversarial training."""

    class Adversarial(Lit):
        def training_step(self, batch, batch_idx):
            x, y = batch[0].requires_grad_(), batch[1]
            (gradient,) = torch.autograd.grad(super().training_step((x, y), batch_idx), x)
            return super().training_step((x.detach() + gradient.sign() / 10, y), batch_idx)

    with pytest.raises(RuntimeError, match="a second time") as raised:
        fit(Adversarial(), batches(1), MAN(ZETA))
    assert raised.value.__notes__[0].startswith("MAN measures layers of a graph that training_step")


def test_nothing_to_penalise_is_said_before_the_first_update():
    class Linear(Lit):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 3, dtype=torch.float64)

    module = Linear()
    before = module.net.weight.clone()
    with pytest.raises(MisconfigurationException, match=r"no activation in Linear.*net \(Linear\)"):
        fit(module, batches(1), MAN(ZETA))
    assert torch.equal(module.net.weight, before)
    assert is_untouched(module)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_that_takes_the_iterator_has_all_batches():
    class OfIterator(Lit):
        def training_step(self, dataloader_iter):
            return super().training_step(*next(dataloader_iter)[:2])

    data = batches(3)
    ours, trainer = fit(OfIterator(), data, MAN(ZETA))
    assert_same(ours, formula_gradients(Lit(), [[batch] for batch in data]))
    assert "train/penalty" in trainer.callback_metrics


def test_manual_optimization_that_a_hook_begins_is_refused():
    class Later(Lit):
        def on_train_epoch_start(self):
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match="MAN cannot be added to the loss of Later"):
        fit(Later(), batches(1), MAN(ZETA))


def test_layers_made_in_configure_model():
    class Late(Lit):
        def __init__(self):
            super().__init__()
            self.made, self.net = self.net, None

        def configure_model(self):
            self.net = self.made

    data = batches(1)
    ours, _ = fit(Late(), data, MAN(ZETA))
    assert_same(ours, formula_gradients(Lit(), [data]))


def test_a_layer_that_is_replaced_during_a_fit_is_measured():
    class Replaced(Lit):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net.relu, self.net.fc2 = nn.Identity(), nn.Sequential(nn.ReLU(), self.net.fc2)

    data = batches(2)
    ours, trainer = fit(Replaced(), data, MAN(ZETA), max_epochs=3)
    assert_same(ours, formula_gradients(Lit(), [[batch] for batch in data * 3]))
    assert {"man/net.fc2.0", "man/net.tanh"} <= trainer.callback_metrics.keys()


def test_several_fits_and_several_callbacks():
    data, module = batches(1), Lit(lr=0.0)
    expected = formula_gradients(Lit(lr=0.0), [data])
    halves = [MAN(ZETA, layers=["net.relu"]), MAN(ZETA, layers=["net.tanh"])]
    for callbacks in ([MAN(ZETA)], halves, [MAN(ZETA)]):
        ours, _ = fit(module, data, *callbacks)
        assert_same(ours, expected)
    assert is_untouched(module)


def test_a_copy_that_is_kept_is_trained_plainly_after_the_fit():
    class Best(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            self.copies = [copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))]

    best, data, man = Best(), batches(1), MAN(ZETA)
    fit(Lit(lr=0.0), data, man, best)
    for kept in best.copies:
        for callbacks, zeta in (([], 0.0), ([MAN(ZETA)], ZETA), ([man], ZETA)):
            ours, _ = fit(kept, data, *callbacks)
            assert_same(ours, formula_gradients(Lit(lr=0.0), [data], zeta))
        assert is_untouched(kept)


def test_barebones_trains_and_does_not_log():
    data = batches(1)
    settings = {"barebones": True, "enable_checkpointing": None, "logger": None, "enable_progress_bar": None}
    settings |= {"enable_model_summary": None, "log_every_n_steps": None}
    ours, _ = fit(Lit(), data, MAN(ZETA), **settings)
    assert_same(ours, formula_gradients(Lit(), [data]))
