"""MAN: the formula, its gradient, which layers it takes, and that it can be batched, compiled and copied."""

import copy
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from fedlight.callbacks import MAN, penalized_step
from fedlight.penalties.man import mean_square
from tests.callbacks.nets import Lit, batches, formula, gradient, is_untouched, norms

BATCH = batches(1)[0]
TOLERANCE = {"rtol": 1e-12, "atol": 1e-15}


class Plain(nn.Module):
    """A module without a trainer: the sum of the outputs is its loss."""

    def __init__(self, *layers: nn.Module, **named: nn.Module):
        super().__init__()
        self.net = nn.Sequential(*layers)
        for name, layer in named.items():
            self.add_module(name, layer)

    def training_step(self, batch):
        return self.net(batch).sum()


def observed(man, module):
    return list(man.observe(module))


# The formula


def test_penalty_and_gradient_of_a_network_computed_by_hand():
    # x W1ᵀ = [-1 4; 4 5], a1 = [0 4; 4 5], a1 W2ᵀ = [4 2; 9 -1.5], a2 = [4 2; 9 0]
    module = Plain(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False), nn.ReLU()).double()
    with torch.no_grad():
        module.net[0].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 1.0]]))
        module.net[2].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 0.5]]))
    module.training_step = lambda batch: 0 * module.net(batch).sum() + 3  # no gradient of its own
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    man = MAN(zeta=0.2)
    with man.attached(module) as step:
        loss = module.training_step(x)
        loss.backward()
    # mean(a1²) = (16 + 16 + 25)/4, mean(a2²) = (16 + 4 + 81)/4, penalty 0.1·(14.25 + 25.25)
    assert abs(step.penalty.item() - 3.95) < 1e-12
    assert abs(loss.item() - 6.95) < 1e-12
    # d/da2 = 0.05·a2 = [.2 .1; .45 0]; d/da1 = 0.05·a1 + (0.05·a2) W2 = [. .45; .65 .7]
    w1 = torch.tensor([[1.95, -0.65], [2.55, 0.2]], dtype=torch.float64)
    w2 = torch.tensor([[1.8, 3.05], [0.0, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(module.net[0].weight.grad, w1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.net[2].weight.grad, w2, rtol=1e-12, atol=1e-12)


def test_penalty_norms_and_gradient_are_those_of_the_formula():
    module, man, zeta = Lit(), MAN(0.3), 0.3
    expected = formula(module, BATCH, zeta)
    with man.attached(module) as step:
        loss = module.training_step(BATCH, 0)
        measured = man.norms(module)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(step.task_loss, formula(module, BATCH, 0).detach(), **TOLERANCE)
    for ours, theirs in zip(gradient(loss, module), gradient(expected, module), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert list(measured) == ["net.relu", "net.tanh"]
    for ours, theirs in zip(measured.values(), norms(module.net, BATCH[0]), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), **TOLERANCE)
    assert man.norms(module) == {}


def test_the_mean_runs_over_channels_and_positions():
    module = Plain(nn.Conv2d(3, 4, 3), nn.ReLU())
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    with MAN(2.0).attached(module) as step:
        module.training_step(x)
    torch.testing.assert_close(step.penalty, F.relu(module.net[0](x)).square().sum().detach() / (2 * 4 * 3 * 3))


def test_zero_zeta_reports_and_changes_nothing():
    module, man = Lit(), MAN(0)
    task = module.training_step(BATCH, 0)
    with man.attached(module) as step:
        loss = module.training_step(BATCH, 0)
        assert step.penalty == 0
        assert man.norms(module)["net.relu"] > 0
    assert torch.equal(loss, task)
    assert all(torch.equal(a, b) for a, b in zip(gradient(loss, module), gradient(task, module), strict=True))


def test_zero_zeta_is_zero_where_squares_overflow():
    module = Plain(nn.Linear(2, 2), nn.ReLU())
    x = torch.full((1, 2), 1e30)
    module.training_step(x).backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    with MAN(0).attached(module) as step:
        module.training_step(x).backward()
        assert step.penalty == 0
    assert all(torch.equal(p.grad, e) for p, e in zip(module.parameters(), expected, strict=True))


def test_a_module_that_is_called_again_counts_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(3, 3).double(), nn.Tanh()

        def training_step(self, batch):
            return self.act(self.fc(self.act(self.fc(self.act(self.fc(batch)))))).sum()

    module, man = Twice(), MAN(0.5)
    x = BATCH[0][:, :3]
    a1 = torch.tanh(module.fc(x))
    a2 = torch.tanh(module.fc(a1))
    a3 = torch.tanh(module.fc(a2))
    expected = a3.sum() + 0.25 * sum(a.square().mean() for a in (a1, a2, a3))
    with man.attached(module):
        loss = module.training_step(x)
        assert list(man.norms(module)) == ["act", "act_2", "act_3"]
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    for ours, theirs in zip(gradient(loss, module), gradient(expected, module), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_metrics_are_named_by_layer():
    assert MAN().metrics({"net.relu": torch.ones(()), "net.relu_2": torch.ones(())}).keys() == {
        "man/net.relu",
        "man/net.relu_2",
    }


def test_an_activation_under_no_grad_does_not_count():
    class Distilled(Lit):
        def __init__(self):
            super().__init__()
            self.teacher = Lit(seed=5).net

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                target = self.teacher(batch[0])
            return F.mse_loss(self(batch[0]), target)

    module, man = Distilled(), MAN(1.0)
    with man.attached(module):
        with pytest.warns(UserWarning, match=r"MAN leaves out 'teacher.(relu|tanh)'"):
            module.training_step(BATCH, 0)
        module.training_step(BATCH, 0)  # said once
        assert list(man.norms(module)) == ["net.relu", "net.tanh"]
        with torch.no_grad():  # a loss that is only looked at has all of them
            module.training_step(BATCH, 0)
        assert len(man.norms(module)) == 4


def test_an_activation_inside_of_a_transform_does_not_count():
    class Weighted(Lit):
        def training_step(self, batch, batch_idx):
            each = torch.func.vmap(lambda x: self.net(x[None])[0])(batch[0])
            return F.mse_loss(self(batch[0]), each.detach())

    module, man = Weighted(), MAN(1.0)
    with man.attached(module):
        with pytest.warns(UserWarning, match=r"MAN leaves out 'net.(relu|tanh)' inside of torch.func transforms"):
            module.training_step(BATCH, 0)
        assert list(man.norms(module)) == ["net.relu", "net.tanh"]


# mean(a²)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5)])
def test_mean_square_has_first_and_second_derivatives(shape):
    a = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(mean_square(a), a.square().mean(), **TOLERANCE)
    assert torch.autograd.gradcheck(mean_square, a)
    assert torch.autograd.gradgradcheck(mean_square, a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mean_square_of_a_nested_tensor_is_that_of_all_its_entries(dtype):
    parts = [torch.full((n, 3), 2.0 * n, dtype=dtype) for n in (1, 3)]
    found = mean_square(torch.nested.nested_tensor(parts, layout=torch.jagged))
    assert float(found) == pytest.approx((1 * 4 + 3 * 36) / 4)


def test_mean_square_can_be_batched():
    a = torch.randn(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vmap(mean_square)(a), a.square().mean(dim=(1, 2)), **TOLERANCE)
    slopes, values = vmap(grad_and_value(mean_square))(a)
    torch.testing.assert_close(slopes, a / 6, **TOLERANCE)
    torch.testing.assert_close(values, a.square().mean(dim=(1, 2)), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_16_bit_activations_are_taken_in_float32(dtype):
    a = torch.full((4, 1000), 300.0, dtype=dtype, requires_grad=True)  # 300² is beyond float16
    value = mean_square(a)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, a.detach().float().square().mean())
    (value * 2000).backward()
    assert a.grad.dtype == dtype
    torch.testing.assert_close(a.grad, a.detach())  # 2000·2a/4000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_types_keep_their_own(dtype):
    assert mean_square(torch.ones(3, 2, dtype=dtype)).dtype == dtype


def test_memory_format_and_empty_batches():
    a = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_square(a.to(memory_format=torch.channels_last)), a.square().mean())
    assert mean_square(torch.zeros(0, 3)) == 0


# Which layers


def test_by_default_all_activation_modules_without_softmax_and_attention():
    class Mine(nn.GELU):
        pass

    module = Plain(
        nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.PReLU(), nn.Dropout(), Mine(), nn.Softmax(dim=1),
        attention=nn.MultiheadAttention(4, 2), log=nn.LogSoftmax(dim=1), min=nn.Softmin(dim=1), map=nn.Softmax2d(),
        sigmoid=nn.Sigmoid(),
    )  # fmt: skip
    assert observed(MAN(), module) == ["net.1", "net.3", "net.5", "sigmoid"]


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


LAYERS = [
    ([nn.ReLU], ["net.0", "net.3"]),
    ([nn.ReLU, nn.Tanh], ["net.0", "net.1", "net.3"]),
    (["torch.nn.ReLU"], ["net.0", "net.3"]),
    (["torch.nn.modules.activation.Tanh"], ["net.1"]),
    (["ReLU"], ["net.0", "net.3"]),
    ([f"{__name__}.Swish"], ["net.2"]),
    ([Swish], ["net.2"]),
    (["net.2"], ["net.2"]),
    ([r"net\.[12]"], ["net.1", "net.2"]),
    (["net.3", "net.0"], ["net.0", "net.3"]),
    (["Tanh", r".*\.1", "net.3"], ["net.1", "net.3"]),
    (["net"], ["net"]),
    (["head.*"], ["head1"]),
]


@pytest.mark.parametrize(("layers", "expected"), LAYERS)
def test_layers_by_class_path_name_and_regular_expression(layers, expected):
    module = Plain(nn.ReLU(), nn.Tanh(), Swish(), nn.ReLU(), head1=nn.Linear(2, 2))
    assert observed(MAN(layers=layers), module) == expected


def test_a_name_is_matched_in_full_and_before_a_class_of_the_same_name():
    module = Plain(nn.Identity(), ReLU=nn.Tanh(), relu=nn.ReLU(), relu2=nn.ReLU())
    assert observed(MAN(layers=["ReLU"]), module) == ["ReLU"]
    assert observed(MAN(layers=["relu"]), module) == ["relu"]


def test_a_shared_module_has_one_hook_and_any_of_its_names():
    act = nn.ReLU()
    module = Plain(act, nn.Linear(2, 2), act, alias=act)
    assert observed(MAN(), module) == ["net.0"]
    assert observed(MAN(layers=["alias"]), module) == ["net.0"]
    man = MAN()
    with man.attached(module):
        module.training_step(torch.ones(1, 2))
        assert list(man.norms(module)) == ["net.0", "net.0_2"]


def test_names_do_not_show_wrappers():
    module = Plain(nn.Linear(2, 2), nn.ReLU())
    module.net = torch.compile(module.net, backend="eager")
    assert observed(MAN(), module) == ["net.1"]
    relu = module.net._orig_mod[1]
    module.net._orig_mod[1] = torch.compile(relu, backend="eager")
    assert MAN(layers=["net.1"]).observe(module)["net.1"] is relu


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        (["Tanh"], "`layers`: 'Tanh' matches nothing in Plain"),
        (["net.0", "net.9"], "`layers`: 'net.9' matches nothing in Plain"),
        ([nn.Tanh], "`layers`: <class 'torch.nn.modules.activation.Tanh'> matches nothing in Plain"),
    ],
)
def test_nothing_matched_lists_what_there_is(layers, problem):
    module = Plain(nn.Linear(2, 2), nn.Flatten())
    with pytest.raises(MisconfigurationException) as caught:
        MAN(layers=layers).attach(module)
    message = str(caught.value)
    assert message.startswith(problem)
    assert "net (Sequential), net.0 (Linear), net.1 (Flatten)" in message
    assert "torch.nn.functional.relu" in message
    assert is_untouched(module)


def test_no_activation_at_all_is_an_error_of_the_first_step():
    module = Plain(*[nn.Linear(1, 1) for _ in range(40)])
    with (
        MAN().attached(module),
        pytest.raises(MisconfigurationException, match=r"MAN found no activation.*net\.28 \(Linear\) and 11 more\."),
    ):
        module.training_step(torch.ones(1, 1))
    assert is_untouched(module)
    empty = nn.Module()
    empty.training_step = lambda batch: batch
    with pytest.raises(MisconfigurationException, match="Its submodules are: none"):
        MAN(layers=["a"]).attach(empty)


def test_a_layer_that_returns_no_tensor_is_named():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(2, 2)

        def training_step(self, batch):
            return self.rnn(batch)[0].sum()

    module = Recurrent()
    with (
        MAN(layers=["rnn"]).attached(module),
        pytest.raises(TypeError, match="`layers` names a module that returns tuple"),
    ):
        module.training_step(torch.ones(1, 1, 2))


# Arguments


@pytest.mark.parametrize("zeta", [-0.1, float("nan"), float("inf")])
def test_zeta_must_be_a_number_of_at_least_zero(zeta):
    with pytest.raises(ValueError, match=rf"MAN\.zeta must be a finite number at least 0, found {zeta}"):
        MAN(zeta=zeta)


@pytest.mark.parametrize("zeta", ["0.1", None, True])
def test_zeta_of_another_type(zeta):
    with pytest.raises(ValueError, match=f"MAN.zeta must be a finite number at least 0, found {zeta!r}"):
        MAN(zeta=zeta)


@pytest.mark.parametrize("layers", ["ReLU", [], nn.ReLU, [3], [nn.ReLU()], [int]])
def test_layers_of_another_type(layers):
    with pytest.raises(TypeError, match="`layers`"):
        MAN(layers=layers)


def test_an_invalid_regular_expression_is_named():
    with pytest.raises(ValueError, match=r"`layers` has 'net\.\[', an invalid regular expression"):
        MAN(layers=["net.["])


def test_state_keys_differ_between_settings():
    assert MAN(0.1).state_key != MAN(0.2).state_key != MAN(0.2, layers=["ReLU"]).state_key


# Copies, batches, compilers


def test_two_of_them_add_up():
    module = Lit()
    one, two = MAN(0.2, layers=["net.relu"]), MAN(0.4, layers=["net.tanh"])
    first, second = norms(module.net, BATCH[0])
    with one.attached(module), two.attached(module) as step:
        module.training_step(BATCH, 0)
        assert list(one.norms(module)) == ["net.relu"]
        assert list(two.norms(module)) == ["net.tanh"]
    torch.testing.assert_close(step.penalty, (0.1 * first + 0.2 * second).detach(), **TOLERANCE)


def test_a_layer_in_two_of_them_is_said(monkeypatch):
    said, module = [], Lit()
    monkeypatch.setattr("fedlight.penalties.step.rank_zero_info", said.append)
    with MAN(0.2, layers=["net.relu"]).attached(module), MAN(0.4).attached(module):
        for _ in range(2):
            module.training_step(BATCH, 0)
    assert said == ["MAN: net.relu is measured by two that are attached, and both are added to the loss."]


def test_a_later_step_without_a_layer_has_no_penalty():
    class Branching(Lit):
        def training_step(self, batch, batch_idx):
            return self.net.fc1(batch[0]).square().mean() if batch_idx else super().training_step(batch, batch_idx)

    module = Branching()
    with MAN(0.3).attached(module) as step:
        module.training_step(BATCH, 0)
        torch.testing.assert_close(module.training_step(BATCH, 1), step.task_loss, **TOLERANCE)
        assert step.penalty == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda man: pickle.loads(pickle.dumps(man))])
@pytest.mark.parametrize("attached", [False, True])
def test_copies_of_the_callback(copied, attached):
    module, man = Lit(), MAN(0.3, layers=[nn.ReLU, "net.tanh"])
    if attached:
        man.attach(module)
        module.training_step(BATCH, 0)
    clone = copied(man)
    assert (clone.zeta, clone.layers) == (man.zeta, man.layers)
    assert clone.norms(module) == {}
    man.detach(module)
    with clone.attached(module):
        torch.testing.assert_close(module.training_step(BATCH, 0), formula(module, BATCH, 0.3), **TOLERANCE)


def test_a_copy_of_an_attached_module_follows_its_own_weights():
    module, man = Lit(), MAN(0.3)
    man.attach(module)
    clone = copy.deepcopy(module)
    with torch.no_grad():
        for p in clone.parameters():
            p.mul_(1.5)
    for m in (module, clone):
        loss, expected = m.training_step(BATCH, 0), formula(m, BATCH, 0.3)
        for ours, theirs in zip(gradient(loss, m), gradient(expected, m), strict=True):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert man.norms(module)["net.relu"] != man.norms(clone)["net.relu"]


def test_a_part_of_an_attached_module_is_copied_again_and_again():
    module = Lit()
    with MAN(0.3).attached(module):
        twice = copy.deepcopy(copy.deepcopy(module.net))  # of an average of the weights, say, when the module is copied
    assert torch.equal(twice(BATCH[0]), module(BATCH[0]))


def test_layers_beside_torchscript_and_around_compiled_modules():
    module = Lit()
    module.wrapped = torch.compile(module.net, backend="eager")  # which has no len(), that a truth value asks for
    with pytest.warns((FutureWarning, DeprecationWarning), match="jit"):  # the latter by torch 2.11
        module.traced = torch.jit.script(nn.ReLU())
    with MAN(0.3).attached(module):
        torch.testing.assert_close(module.training_step(BATCH, 0), formula(module, BATCH, 0.3), **TOLERANCE)


class Redirected(nn.Module):
    """``functional_call`` calls ``forward``; this leads it to ``training_step``."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module.training_step(*args)


def batched_step(module):
    """∇(loss + penalty) of a client, and its task loss and penalty: what an engine runs for all clients at once."""
    redirected, step = Redirected(module), penalized_step(module)

    def client(params, batch):
        loss = functional_call(redirected, {f"module.{k}": v for k, v in params.items()}, (batch, 0))
        report = step.task_loss, step.penalty
        step.forget()
        return loss, report

    return vmap(grad_and_value(client, has_aux=True))


@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_clients_can_be_batched(backend):
    clients = 3
    modules, data = [Lit(seed=i) for i in range(clients)], batches(clients)
    stacked = {k: torch.stack([m.get_parameter(k).detach() for m in modules]) for k, _ in modules[0].named_parameters()}
    batch = tuple(torch.stack(part) for part in zip(*data, strict=True))
    module = Lit()
    with MAN(0.3).attached(module):
        function = batched_step(module)
        if backend is not None:
            function = torch.compile(function, backend=backend, fullgraph=True)
        gradients, (losses, (task, penalty)) = function(stacked, batch)
    for i, (m, own) in enumerate(zip(modules, data, strict=True)):
        expected = formula(m, own, 0.3)
        torch.testing.assert_close(losses[i], expected.detach(), **TOLERANCE)
        torch.testing.assert_close(task[i], formula(m, own, 0).detach(), **TOLERANCE)
        torch.testing.assert_close(penalty[i], (expected - formula(m, own, 0)).detach(), rtol=1e-10, atol=0)
        for ours, theirs in zip(gradients.values(), gradient(expected, m), strict=True):
            torch.testing.assert_close(ours[i], theirs, **TOLERANCE)


@pytest.mark.parametrize("before", [False, True], ids=["fresh", "compiled-before"])
def test_a_compiled_submodule(before):
    module = Lit()
    expected = formula(module, BATCH, 0.3)
    plain = gradient(formula(module, BATCH, 0), module)
    module.net.compile(backend="aot_eager")
    if before:  # the code that this compiles knows of no hook
        module.training_step(BATCH, 0)
    man = MAN(0.3)
    with man.attached(module):
        loss = module.training_step(BATCH, 0)
        assert list(man.norms(module)) == ["net.relu", "net.tanh"]
        for ours, theirs in zip(gradient(loss, module), gradient(expected, module), strict=True):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)
    for ours, theirs in zip(gradient(module.training_step(BATCH, 0), module), plain, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


# Inductor looks through all modules that are loaded, and so meets their deprecations.
INDUCTOR = pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")])


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_whole_step_compiles_into_one_graph(backend, monkeypatch):
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # the compiler sets it: gone after the test
    module = Lit()
    expected = formula(module, BATCH, 0.3)
    with MAN(0.3).attached(module) as step:
        loss = torch.compile(module.training_step, backend=backend, fullgraph=True)(BATCH, 0)
        torch.testing.assert_close(step.task_loss, formula(module, BATCH, 0).detach(), **TOLERANCE)
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    for ours, theirs in zip(gradient(loss, module), gradient(expected, module), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
