"""The interface of penalties: attaching, the wrapped step, copies."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedlight.callbacks import PenalizedStep, Penalty, penalized_step
from fedlight.penalties.comparison import Comparison
from tests.callbacks.nets import Batches, Lit, batches, gradient, is_untouched, silent_trainer

BATCH = batches(1)[0]


class WeightDecay(Penalty):
    """weight/2·‖w‖²: a penalty that observes nothing."""

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = weight

    def penalty(self, module, measured):
        assert measured == {}
        return self.weight / 2 * sum(p.square().sum() for p in module.parameters())


class LogitNorm(Penalty):
    """weight·Σ mean(logits²)."""

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = weight

    def observe(self, module):
        return {"head": module.net.fc3}

    def measure(self, output):
        return output.square().mean()

    def penalty(self, module, measured):
        return self.weight * sum(measured.values())

    def metrics(self, measured):
        return {f"norm/{name}": value for name, value in measured.items()}


@pytest.mark.parametrize("value", [2.0, 2, np.float32(2), torch.tensor(2.0)])
def test_a_penalty_logs_tensors_and_numbers(value):
    class Told(LogitNorm):
        def metrics(self, measured):
            return {"norm": value}

    module, logged = Lit(), {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    with Told().attached(module):
        module.training_step(BATCH, 0)
    assert logged["norm"] == 2


@pytest.mark.parametrize("observed", [None, [nn.Linear(1, 1)], {"head": "net.fc3"}, nn.Linear(1, 1)])
def test_what_is_no_dictionary_of_submodules_is_refused(observed):
    class Odd(LogitNorm):
        def observe(self, module):
            return observed

    module = Lit()
    with pytest.raises(TypeError, match=r"Odd\.observe\(\) gives .*; it must give a dictionary of submodules by"):
        Odd().attach(module)
    assert is_untouched(module)


class Compared(Comparison):
    def penalty(self, module, measured):
        return measured["features"].sum()


@pytest.mark.parametrize("layer", [0, ["net"], nn.Linear(1, 1)])
def test_the_layer_of_a_comparison_is_a_name(layer):
    with pytest.raises(TypeError, match=r"Compared: `layers` takes module classes, names and regular"):
        Compared(layer)


@pytest.mark.parametrize("value", [None, torch.ones(2), "1"])
def test_what_is_no_scalar_is_refused(value):
    class Odd(WeightDecay):
        def penalty(self, module, measured):
            return value

    module = Lit()
    with Odd().attached(module), pytest.raises(TypeError, match=r"Odd\.penalty must return a scalar Tensor, not "):
        module.training_step(BATCH, 0)


def test_a_penalty_may_be_a_number():
    class Constant(WeightDecay):
        def penalty(self, module, measured):
            return sum(measured.values())

    module = Lit()
    task = module.training_step(BATCH, 0)
    with Constant().attached(module):
        assert torch.equal(module.training_step(BATCH, 0), task)


def test_a_penalty_of_the_parameters_is_added_to_loss_and_gradient():
    module = Lit()
    task = module.training_step(BATCH, 0)
    squares = sum(p.square().sum() for p in module.parameters())
    expected = gradient(task, module)
    with WeightDecay(0.5).attached(module) as step:
        loss = module.training_step(BATCH, 0)
    torch.testing.assert_close(loss, task + 0.25 * squares, rtol=1e-14, atol=0)
    for ours, without, p in zip(gradient(loss, module), expected, module.parameters(), strict=True):
        torch.testing.assert_close(ours, without + 0.5 * p, rtol=1e-12, atol=1e-14)
    assert torch.equal(step.task_loss, task)
    assert not step.task_loss.requires_grad
    assert not step.penalty.requires_grad
    torch.testing.assert_close(step.penalty, 0.25 * squares.detach(), rtol=1e-14, atol=0)


def test_penalties_add_up_and_leave_one_by_one():
    module, decay, logits = Lit(), WeightDecay(), LogitNorm()
    task = module.training_step(BATCH, 0)
    decay.attach(module)
    alone = module.training_step(BATCH, 0) - task
    step = logits.attach(module)
    assert step.penalties == [decay, logits]
    both = module.training_step(BATCH, 0) - task
    with torch.no_grad():
        norm = 0.5 * module.net(BATCH[0]).square().mean()
    torch.testing.assert_close(both, alone + norm, rtol=1e-12, atol=0)
    torch.testing.assert_close(step.measured(logits)["head"], 2 * norm)
    assert step.measured(decay) == {}
    decay.detach(module)
    torch.testing.assert_close(module.training_step(BATCH, 0) - task, norm, rtol=1e-12, atol=0)
    logits.detach(module)
    assert is_untouched(module)
    assert torch.equal(module.training_step(BATCH, 0), task)


def test_attaching_and_detaching_twice_is_once():
    module, penalty = Lit(), LogitNorm()
    task = module.training_step(BATCH, 0)
    first = penalty.attach(module)
    assert penalty.attach(module) is first
    once = module.training_step(BATCH, 0)
    torch.testing.assert_close(once - task, 0.5 * module.net(BATCH[0]).square().mean())
    penalty.detach(module)
    penalty.detach(module)
    assert is_untouched(module)
    assert penalized_step(module) is None
    penalty.detach(None)


def test_the_context_manager_detaches_after_an_error():
    module, penalty = Lit(), LogitNorm()
    with pytest.raises(ZeroDivisionError), penalty.attached(module):
        raise ZeroDivisionError
    assert is_untouched(module)


def test_one_penalty_serves_several_modules():
    penalty, one, two = LogitNorm(), Lit(seed=1), Lit(seed=2)
    penalty.attach(one), penalty.attach(two)
    losses = [m.training_step(BATCH, 0).item() for m in (one, two)]
    penalty.detach(one)
    assert is_untouched(one)
    assert two.training_step(BATCH, 0).item() == losses[1] != losses[0]


class OfBatch(Lit):
    def training_step(self, batch):
        return super().training_step(batch, 0)


class OfAnyName(Lit):
    def training_step(self, samples, number):
        assert number == 7
        return super().training_step(samples, number)


class OfAny(Lit):
    def training_step(self, *args):
        assert args[1] == 7
        return super().training_step(*args)


class OfMore(Lit):
    def training_step(self, batch, batch_idx, dataloader_idx=0):
        assert batch_idx == 7
        return super().training_step(batch, batch_idx)


class OfIterator(Lit):
    def training_step(self, dataloader_iter):
        return super().training_step(next(dataloader_iter), 0)


@pytest.mark.parametrize("cls", [OfBatch, OfAnyName, OfAny, OfMore, OfIterator])
def test_trainers_see_the_signature_that_the_module_has(cls):
    module = cls()

    def seen():
        step = module.training_step
        return (
            is_param_in_hook_signature(step, "batch_idx", min_args=2),
            is_param_in_hook_signature(step, "dataloader_iter", explicit=True),
            is_overridden("training_step", module),
        )

    def call():
        batch = iter([BATCH]) if cls is OfIterator else BATCH
        return module.training_step(batch, 7) if seen()[0] else module.training_step(batch)

    before, task = seen(), call()
    with LogitNorm().attached(module) as step:
        assert seen() == before
        assert torch.equal(call(), task + step.penalty)


def test_a_dict_is_copied_and_keeps_its_entries():
    class Dict(Lit):
        def training_step(self, batch, batch_idx):
            self.output = {"loss": super().training_step(batch, batch_idx), "extra": 1}
            return self.output

    module = Dict()
    with LogitNorm().attached(module) as step:
        output = module.training_step(BATCH, 0)
    assert output["extra"] == 1
    assert torch.equal(module.output["loss"], step.task_loss)
    assert torch.equal(output["loss"], step.task_loss + step.penalty)


def test_none_is_passed_through():
    class Skipping(Lit):
        def training_step(self, batch, batch_idx):
            return None if batch_idx else super().training_step(batch, batch_idx)

    module = Skipping()
    with LogitNorm().attached(module) as step:
        assert module.training_step(BATCH, 0) is not None
        assert module.training_step(BATCH, 1) is None
        assert step.task_loss is step.penalty is None


@pytest.mark.parametrize("output", [1.0, (torch.zeros(()),), {"lss": torch.zeros(())}])
def test_what_is_no_loss_is_an_error(output):
    class Odd(Lit):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return output

    module = Odd()
    with LogitNorm().attached(module), pytest.raises(TypeError, match=f"Odd returned {type(output).__name__}: "):
        module.training_step(BATCH, 0)


def test_a_module_without_training_step_or_with_manual_optimization_is_refused():
    with pytest.raises(TypeError, match="no training_step"):
        LogitNorm().attach(nn.Linear(2, 2))
    module = Lit()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization = False"):
        LogitNorm().attach(module)
    assert is_untouched(module)


def test_layers_that_are_not_called_are_an_error():
    class Idle(Lit):
        def training_step(self, batch, batch_idx):
            return self.net.fc1.weight.sum()

    module = Idle()
    with (
        LogitNorm().attached(module),
        pytest.raises(MisconfigurationException, match="LogitNorm saw no output of head"),
    ):
        module.training_step(BATCH, 0)


def test_a_failed_step_records_nothing_afterwards():
    class Failing(Lit):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ZeroDivisionError

    module, penalty = Failing(), LogitNorm()
    step = penalty.attach(module)
    with pytest.raises(ZeroDivisionError):
        module.training_step(BATCH, 0)
    before = step.measured(penalty)["head"]
    module(BATCH[0] * 2)
    assert torch.equal(step.measured(penalty)["head"], before)


def test_the_plain_forward_is_untouched():
    module, penalty = Lit(), LogitNorm()
    step = penalty.attach(module)
    module(BATCH[0])
    assert step.measured(penalty) == {}


def test_without_a_trainer_evaluation_is_eval_mode_without_gradients():
    module = Lit()
    task = module.training_step(BATCH, 0)
    with LogitNorm().attached(module):
        with torch.no_grad():
            assert module.training_step(BATCH, 0) > task
        module.eval()
        assert module.training_step(BATCH, 0) > task  # a frozen backbone may train in this mode
        with torch.no_grad():
            assert torch.equal(module.training_step(BATCH, 0), task)


def test_an_attribute_that_was_there_comes_back():
    module = Lit()
    calls = []

    def mine(batch, batch_idx):
        calls.append(batch_idx)
        return Lit.training_step(module, batch, batch_idx)

    module.training_step = mine
    with LogitNorm().attached(module) as step:
        loss = module.training_step(BATCH, 3)
    assert torch.equal(loss, step.task_loss + step.penalty)
    assert calls == [3]
    assert module.training_step is mine


def test_what_wraps_the_wrapper_survives_and_gets_the_plain_loss():
    module, penalty = Lit(), LogitNorm()
    task = module.training_step(BATCH, 0)
    penalty.attach(module)
    inner = module.training_step
    module.training_step = lambda batch, batch_idx: 2 * inner(batch, batch_idx)
    assert module.training_step(BATCH, 0) > 2 * task
    penalty.detach(module)
    assert torch.equal(module.training_step(BATCH, 0), 2 * task)
    assert penalized_step(module) is None


def test_a_copy_is_attached_and_independent():
    module, penalty = Lit(), LogitNorm()
    penalty.attach(module)
    loss = module.training_step(BATCH, 0)
    clone = copy.deepcopy(module)
    step = penalized_step(clone)
    assert step.module is clone
    assert step.penalties == [penalty]
    assert step.task_loss is None
    assert step.measured(penalty) == {}
    with torch.no_grad():
        for p in clone.parameters():
            p.mul_(2)
    with penalty.attached(twin := Lit()):
        twin.load_state_dict(clone.state_dict())
        expected = twin.training_step(BATCH, 0)
    assert torch.equal(clone.training_step(BATCH, 0), expected)
    assert torch.equal(penalized_step(module).task_loss + penalized_step(module).penalty, loss.detach())
    penalty.detach(clone)
    assert is_untouched(clone)
    assert torch.equal(module.training_step(BATCH, 0), loss)
    penalty.detach(module)
    assert is_untouched(module)


def test_a_copy_of_a_submodule_is_inert():
    module, penalty = Lit(), LogitNorm()
    step = penalty.attach(module)
    module.teacher = copy.deepcopy(module.net)
    module.training_step(BATCH, 0)
    expected = step.measured(penalty)
    module.teacher(BATCH[0])
    assert step.measured(penalty) == expected


def test_attached_modules_and_penalties_can_be_pickled():
    module, penalty = Lit(), LogitNorm(0.25)
    penalty.attach(module)
    loss = module.training_step(BATCH, 0)
    assert pickle.loads(pickle.dumps(penalty)).weight == 0.25
    clone = pickle.loads(pickle.dumps(module))
    assert torch.equal(clone.training_step(BATCH, 0), loss)
    step = pickle.loads(pickle.dumps(penalized_step(module)))
    assert isinstance(step, PenalizedStep)
    assert torch.equal(step.module.training_step(BATCH, 0), loss)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    assert torch.equal(restored.training_step(BATCH, 0), loss)
    for penalty in penalized_step(restored).penalties:
        penalty.detach(restored)
    assert is_untouched(restored)


def test_the_state_dict_does_not_change():
    module = Lit()
    keys = list(module.state_dict())
    with LogitNorm().attached(module):
        assert list(module.state_dict()) == keys


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    class Checkpointed(Lit):
        def forward(self, x):
            return checkpoint(self.net, x.requires_grad_(), use_reentrant=use_reentrant)

    module, plain = Checkpointed(), Lit()
    penalty = LogitNorm()
    with penalty.attached(plain):
        expected = plain.training_step(BATCH, 0)
        expected.backward()
    with penalty.attached(module):
        if use_reentrant:  # its forward pass has no gradients: said, not computed wrongly
            with (
                pytest.warns(UserWarning, match=r"leaves out 'head'.*use_reentrant=False"),
                pytest.raises(MisconfigurationException, match="saw no output of head"),
            ):
                module.training_step(BATCH, 0)
            return
        loss = module.training_step(BATCH, 0)
        loss.backward()
    assert torch.equal(loss, expected)
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-15)


def test_logging_needs_a_trainer_or_a_log_of_the_module():
    module, logged = Lit(), {}
    with LogitNorm().attached(module) as step:
        module.training_step(BATCH, 0)  # would warn
        module.log = lambda name, value, **options: logged.update({name: (value, options)})
        module.training_step(BATCH, 0)
    assert list(logged) == ["train/penalty", "norm/head"]
    value, options = logged["train/penalty"]
    assert torch.equal(value, step.penalty)
    assert not logged["norm/head"][0].requires_grad
    assert options == {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": 8}


def test_a_batch_without_tensors_does_not_stop_logging():
    class Odd(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch.content, batch_idx)

    class Opaque:
        content = BATCH

    trainer = silent_trainer(LogitNorm())
    trainer.fit(Odd(), Batches([Opaque()]))
    assert "norm/head" in trainer.callback_metrics


def test_fabric():
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    module, penalty = Lit(), LogitNorm()
    task = module.training_step(BATCH, 0).detach()
    wrapped, optimizer = fabric.setup(module, module.configure_optimizers())
    wrapped.mark_forward_method("training_step")
    with penalty.attached(wrapped) as step:
        assert penalized_step(wrapped) is step
        loss = wrapped.training_step(BATCH, 0)
        fabric.backward(loss)
        optimizer.step()
    torch.testing.assert_close(step.task_loss, task)
    torch.testing.assert_close(loss, step.task_loss + step.penalty)
    assert is_untouched(module)


def test_a_plain_loop_with_a_compiled_module():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Lit().net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            return F.cross_entropy(self(batch[0]), batch[1])

    module, penalty = Plain(), LogitNorm()
    with penalty.attached(module):
        expected = module.training_step(BATCH)
    compiled = torch.compile(module, backend="eager")
    compiled.training_step(BATCH)
    with penalty.attached(compiled):
        assert torch.equal(compiled.training_step(BATCH), expected)
    assert is_untouched(module)


def test_in_a_copy_a_penalty_whose_fit_is_over_logs_nothing():
    class Largest(LogitNorm):
        def metrics(self, measured):
            return {"largest": max(measured.values())}

    module, logged, over = Lit(), {}, Largest()
    step = over.attach(module)
    WeightDecay().attach(module)
    clone = copy.deepcopy(module)
    step.remove(over, over=True)
    clone.log = lambda name, value, **_: logged.update({name: value})
    clone.training_step(BATCH, 0)
    assert set(logged) == {"train/penalty"}
