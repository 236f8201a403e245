import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from fedlight.analysis import HessianOperator, NoSecondDerivativeError, TaskLoss, hessian_operator, measure_hessian
from fedlight.callbacks import MAN
from fedlight.module.logs import LogCollector, collecting_logs
from tests.analysis.cases import Task, mlp

X, Y = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


class Noisy(LightningModule):
    """Everything that an analysis could disturb: BatchNorm, dropout, a metric, random numbers, logs, hooks."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.calls = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.calls += 1
        x = x + 0.1 * torch.randn_like(x) + random.random() + np.random.rand()
        logits = self.net(x)
        self.log("accuracy", self.accuracy(logits, y), prog_bar=True)
        self.log_dict({"a": 1.0})
        return {"loss": F.cross_entropy(logits, y), "logits": logits}


class Moving(Noisy):
    """Its step moves a teacher, a queue and a counter, on which the loss depends."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(6, 3).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(3))

    def training_step(self, batch, batch_idx):
        self.teacher.weight.data.mul_(0.5)
        self.queue = self.queue + 1
        loss = super().training_step(batch, batch_idx)["loss"]
        return loss * self.calls + self.teacher(batch[0]).square().mean() + self.queue.sum()


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_an_analysis_leaves_the_model_and_the_program_as_they_were():
    module = Noisy().train()
    module.net[4].eval()  # a mode of its own
    seen = []
    handle = module.net[0].register_forward_hook(lambda m, a, o: seen.append(1))
    F.cross_entropy(module.net(X), Y).backward()
    seen.clear()
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    gradients = {k: p.grad.clone() for k, p in module.named_parameters()}
    modes = [m.training for m in module.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    attributes = set(vars(module))
    rng = states()
    precision = torch.backends.mkldnn.matmul.fp32_precision

    operator = hessian_operator(module, [(X, Y)])
    result = measure_hessian(operator, top_k=2, density=True, layers={"head": (4, 5)})

    assert result.converged
    assert states() == rng
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())
    assert all(torch.equal(p.grad, gradients[k]) for k, p in module.named_parameters())
    assert [m.training for m in module.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()] == hooks
    assert set(vars(module)) == attributes
    assert module.calls == 0
    assert module.accuracy._update_count == 0
    assert all(p.requires_grad and p.is_leaf for p in module.parameters())
    handle.remove()


def test_the_loss_is_the_task_loss_in_eval_mode():
    module = Task(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)))
    module.net(X + 1)  # BatchNorm has statistics
    loss, _ = hessian_operator(module, [(X, Y)]).loss_and_gradient()
    module.eval()
    assert loss == pytest.approx(F.cross_entropy(module.net(X), Y).item(), rel=1e-6)


def test_random_numbers_of_a_step_are_the_same_in_every_product():
    class Draws(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] + torch.randn(12, 6), batch[1]), batch_idx)

    operator = hessian_operator(Draws(mlp()), [(X, Y), (X, Y)], graph_memory=0)
    v = torch.randn(operator.size)
    assert torch.equal(operator.matvec(v), operator.matvec(v))


def test_penalties_stay_out_of_the_loss():
    module = Task(mlp())
    plain = hessian_operator(module, [(X, Y)])
    with MAN(zeta=10.0).attached(module) as step:
        penalised = hessian_operator(module, [(X, Y)])
        v = torch.randn(plain.size)
        assert torch.equal(plain.matvec(v), penalised.matvec(v))
        assert plain.loss_and_gradient()[0] == penalised.loss_and_gradient()[0]
        assert step.task_loss is None  # the module itself was not run
        with collecting_logs(module, LogCollector()):  # and is still penalised
            assert module.training_step((X, Y), 0) > F.cross_entropy(module.net(X), Y) + 1e-3


def test_precision_is_the_one_that_is_asked_for():
    module = Task(mlp()).to(torch.bfloat16)
    batches = [(X.half(), Y)]
    assert hessian_operator(module, batches).dtype == torch.float32
    double = hessian_operator(module, batches, double=True)
    assert double.dtype == double.loss_and_gradient()[1].dtype == torch.float64
    assert next(module.parameters()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hessian_operator(Task(mlp()), [(X, Y)])
        assert inside.loss_and_gradient()[1].dtype == torch.float32
    with torch.inference_mode():
        hessian_operator(Task(mlp()), [(X, Y)]).matvec(torch.ones(inside.size))


def test_frozen_parameters_are_left_out():
    module = Task(mlp())
    module.net[0].requires_grad_(False)
    assert hessian_operator(module, [(X, Y)]).size == 4 * 5 + 4 + 3 * 4 + 3
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameter"):
        hessian_operator(module, [(X, Y)])


def test_a_compiled_module_is_analysed_uncompiled():
    module = Task(mlp())
    module.net.compile(backend="aot_eager")
    v = torch.randn(sum(p.numel() for p in module.parameters()))
    compiled = hessian_operator(torch.compile(module, backend="aot_eager"), [(X, Y)])
    module.net._compiled_call_impl = None
    assert torch.equal(compiled.matvec(v), hessian_operator(module, [(X, Y)]).matvec(v))


def test_a_compiled_method_is_that_of_the_copy():
    module, plain = Task(mlp()), Task(mlp())
    plain.load_state_dict(module.state_dict())
    module.training_step = torch.compile(module.training_step, backend="eager")
    from_compiled(torch.compile(module, backend="eager"))  # as Lightning's Trainer does
    v = torch.randn(sum(p.numel() for p in module.parameters()))
    compiled = hessian_operator(module, [(X, Y)]).matvec(v)
    assert torch.equal(compiled, hessian_operator(plain, [(X, Y)]).matvec(v))


def test_attention_has_second_derivatives():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)

        def forward(self, x):
            return self.layer(x[:, None])[:, 0, :3]

    operator = hessian_operator(Task(Attention()), [(X, Y)], double=True)
    u, v = torch.randn(2, operator.size, dtype=torch.float64)
    assert (u @ operator.matvec(v)).item() == pytest.approx((v @ operator.matvec(u)).item(), rel=1e-8)


class InPlace(nn.Module):
    def forward(self, x):
        y = torch.sigmoid(x)
        y += 1
        return y


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Square(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 6)

    def forward(self, x):
        return x + self.bag(torch.zeros(len(x), 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (InPlace(), r"layer 'net\.1\.0' \(InPlace\) has none \(one of the variables.*without in-place"),
        (Square(), r"layer 'net\.1\.0' \(Square\) has none \(autograd function Once is marked once_differentiable"),
        (Bag(), r"layer 'net\.1\.0\.bag' \(EmbeddingBag\) has none \(.*_embedding_bag_backward"),
    ],
)
def test_a_layer_without_second_derivatives_is_named(layer, message):
    module = Task(nn.Sequential(nn.Linear(6, 6), nn.Sequential(layer, nn.Tanh()), nn.Linear(6, 3)))
    with pytest.raises(NoSecondDerivativeError, match=message):
        hessian_operator(module, [(X, Y)]).matvec(torch.ones(63 + 30 * isinstance(layer, Bag)))


def test_an_in_place_layer_that_spoils_another_is_named():
    module = Task(nn.Sequential(nn.Linear(6, 6), nn.Sigmoid(), nn.ReLU(inplace=True), nn.Linear(6, 3)))
    with pytest.raises(NoSecondDerivativeError, match=r"'net\.2' \(ReLU\) changes its input in place.*inplace=False"):
        hessian_operator(module, [(X, Y)]).matvec(torch.ones(63))


def test_in_place_layers_that_do_no_harm_are_fine():
    module = Task(nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)))
    other = Task(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))
    other.load_state_dict(module.state_dict())
    v = torch.randn(63)
    assert torch.equal(hessian_operator(module, [(X, Y)]).matvec(v), hessian_operator(other, [(X, Y)]).matvec(v))


def test_an_operation_of_the_step_itself_is_said_to_be_there():
    class InStep(Task):
        def training_step(self, batch, batch_idx):
            return Once.apply(super().training_step(batch, batch_idx))

    with pytest.raises(NoSecondDerivativeError, match="training_step or forward of InStep has none"):
        hessian_operator(InStep(mlp()), [(X, Y)]).matvec(torch.ones(74))


def test_a_step_without_a_loss_is_refused():
    class Nothing(Task):
        def training_step(self, batch):
            return None

    with pytest.raises(TypeError, match="training_step of Nothing must return the loss"):
        hessian_operator(Nothing(mlp()), [(X, Y)]).loss_and_gradient()
    with pytest.raises(TypeError, match="Only a LightningModule"):
        TaskLoss(mlp())


def test_a_loss_that_does_not_reach_the_parameters_is_refused():
    class Detached(Task):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    with pytest.raises(ValueError, match="does not depend on any trainable parameter"):
        hessian_operator(Detached(mlp()), [(X, Y)]).loss_and_gradient()


def test_a_closure_that_uses_the_module_itself_is_refused():
    """It would be analysed without the curvature in what the closure uses."""
    model = Task(mlp())
    model.net.register_forward_hook(lambda net, given, out: out * net[0].weight.mean())
    assert hessian_operator(model, [(X, Y)]).loss_and_gradient()[0] > 0
    model.net.register_forward_hook(lambda net, given, out: out * model.net[0].weight.mean())
    with pytest.raises(ValueError, match="function in Task uses its parameter net.0.weight, also in a copy"):
        hessian_operator(model, [(X, Y)]).loss_and_gradient()


def test_errors_of_the_module_itself_come_through():
    w = nn.Parameter(torch.ones(2))

    def broken(batch, index):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        HessianOperator(broken, [w], [torch.ones(1)], explain=lambda *args: AssertionError()).matvec(torch.ones(2))


def test_what_a_command_line_hands_over_need_not_be_copyable(tmp_path):
    module = Task(mlp())
    with (tmp_path / "log").open("w") as file:
        module.optimizer = partial(torch.optim.SGD, file)  # as jsonargparse's knows its parser
        loss = TaskLoss(module)
    assert loss.module is not module
    assert loss.module.optimizer is module.optimizer
    assert loss.module.net[0].weight is not module.net[0].weight


def test_the_loss_is_a_function_though_the_step_moves_the_module():
    module = Moving()
    loss = TaskLoss(module)
    with loss.settings():
        values = [loss((X, Y), 0).detach().item() for _ in range(3)]
    assert len(set(values)) == 1
    assert loss.module.calls == module.calls == 0
    assert torch.equal(loss.module.teacher.weight, module.teacher.weight)
    assert loss.module.queue.tolist() == [0.0, 0.0, 0.0]
