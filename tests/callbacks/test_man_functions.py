"""MAN sees functions: which ones, by which names, and with the values and gradients of modules in their place."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric

from fedlight.callbacks import MAN, penalized_step
from fedlight.penalties.layers import NAMES, SQUASHING, is_activation
from tests.callbacks.nets import Batches, Lit, Net, Recorder, batches, formula, gradient, is_untouched, silent_trainer

BATCH = batches(1)[0]
TOLERANCE = {"rtol": 1e-12, "atol": 1e-15}
ZETA = 0.3


class FunctionalNet(Net):
    """The same network with functions for its activation modules."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__(dtype)
        del self.relu, self.tanh

    def forward(self, x):
        return self.fc3(torch.tanh(self.fc2(F.relu(self.fc1(x)))))


class Functional(Lit):
    """:class:`Lit` with the functional network: the same weights, the same formula."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, lr: float = 0.1):
        super().__init__(dtype, seed, lr)
        net = FunctionalNet(dtype)
        net.load_state_dict(self.net.state_dict())
        self.net = net


class Wrapped(nn.Module):
    """A module to train whose loss is the sum of what a network gives."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch):
        return self.net(batch).double().sum()


def step(module, batch, man=None):
    """Measured norms, the penalty and the loss of two steps, which must agree."""
    man = man or MAN(ZETA)
    with man.attached(module) as wrapper:
        module.training_step(batch)
        first = man.norms(module), wrapper.penalty
        loss = module.training_step(batch)
        assert list(man.norms(module)) == list(first[0])
        assert torch.equal(wrapper.penalty, first[1])
        return man.norms(module), wrapper.penalty, loss


def ones(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# Values, gradients and names


@pytest.mark.parametrize(
    "spell", [F.relu, torch.relu, torch.Tensor.relu, lambda x: x.relu_(), lambda x: F.relu(x, True)]
)
def test_penalty_and_gradient_computed_by_hand(spell):
    # x W1ᵀ = [-1 4; 4 5], a1 = [0 4; 4 5], a1 W2ᵀ = [4 2; 9 -1.5], a2 = [4 2; 9 0]
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2, bias=False).double(), nn.Linear(2, 2, bias=False).double()

        def forward(self, x):
            return 0 * spell(self.second(spell(self.first(x))))

    module = Wrapped(Block())
    with torch.no_grad():
        module.net.first.weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 1.0]]))
        module.net.second.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 0.5]]))
    norms, penalty, loss = step(module, torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64), MAN(0.2))
    assert {name: norm.item() for name, norm in norms.items()} == {"net.relu": 57 / 4, "net.relu_2": 101 / 4}
    assert abs(penalty.item() - 3.95) < 1e-12
    first, second = gradient(loss, module)
    torch.testing.assert_close(first, torch.tensor([[1.95, -0.65], [2.55, 0.2]], dtype=torch.float64))
    torch.testing.assert_close(second, torch.tensor([[1.8, 3.05], [0.0, 0.4]], dtype=torch.float64))


def test_functions_give_the_loss_and_gradient_of_modules():
    module = Functional()
    with MAN(ZETA).attached(module):
        for batch in batches(3):
            loss, expected = module.training_step(batch, 0), formula(Lit(), batch, ZETA)
            torch.testing.assert_close(loss, expected, **TOLERANCE)
            for ours, theirs in zip(
                gradient(loss, module), gradient(formula(module, batch, ZETA), module), strict=True
            ):
                torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert is_untouched(module)


CLASSES = [
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.LogSigmoid, nn.Softsign, nn.Hardshrink, nn.Softshrink,
    nn.Tanhshrink, nn.GLU,
]  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES)
def test_every_function_is_known_by_its_modules_name(cls):
    name = next(name for name in NAMES.values() if name.replace("_", "") == cls.__name__.lower())
    function = getattr(F, name, None) or getattr(torch, name)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4).double()
            self.out = nn.Linear(2 if cls is nn.GLU else 4, 2).double()

        def forward(self, x):
            return self.out(function(self.fc(x)))

    module = Wrapped(Block())
    norms, penalty, _ = step(module, x := ones(5, 4))
    assert list(norms) == [f"net.{name}"]
    torch.testing.assert_close(penalty, ZETA / 2 * cls()(module.net.fc(x)).square().mean().detach(), **TOLERANCE)


def test_functions_with_parameters_of_their_own_and_all_spellings():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.slope = nn.Linear(4, 4).double(), nn.Parameter(torch.tensor([0.2], dtype=torch.float64))

        def forward(self, x):
            x = F.prelu(self.fc(x), self.slope)
            x = F.rrelu(self.fc(x), 0.1, 0.1, training=True)
            x = F.threshold(self.fc(x), 0.1, 0.2)
            return self.fc(torch.special.expit(self.fc(x)).sigmoid())

    norms, _, _ = step(Wrapped(Block()), ones(3, 4))
    assert list(norms) == ["net.prelu", "net.rrelu", "net.threshold", "net.sigmoid", "net.sigmoid_2"]


class Changing(nn.Module):
    """Changes what an activation has put out."""

    def __init__(self, change, activation):
        super().__init__()
        self.change, self.act = change, activation
        self.fc1, self.fc2 = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, batch):
        return self.fc2(self.change(self.act(self.fc1(batch[0])))).square().mean()


def _add(a):
    a += 1
    return a


def _set(a):
    a[0] = 2
    return a


@pytest.mark.parametrize("activation", [nn.SiLU(), F.silu])
@pytest.mark.parametrize(
    ("change", "alike"),
    [
        (lambda a: a.mul_(2), lambda a: 2 * a),
        (_add, lambda a: a + 1),
        (_set, lambda a: torch.cat([torch.full_like(a[:1], 2), a[1:]])),
        (lambda a: a.flatten().neg_().view_as(a), lambda a: -a),
        (nn.Dropout(1.0, inplace=True), lambda a: 0 * a),
    ],
)
def test_what_is_changed_in_place_after_it_was_measured_counts_as_it_was(change, alike, activation):
    module, twin = Wrapped(Changing(change, activation)), Wrapped(Changing(alike, activation))
    twin.load_state_dict(module.state_dict())
    found, expected = step(module, BATCH), step(twin, BATCH)
    torch.testing.assert_close([*found[0].values(), *found[1:]], [*expected[0].values(), *expected[1:]], **TOLERANCE)
    for ours, right in zip(gradient(found[2], module), gradient(expected[2], twin), strict=True):
        torch.testing.assert_close(ours, right, **TOLERANCE)


def test_softmax_attention_and_what_a_function_calls_itself_are_no_layers():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, dtype=torch.float64)

        def forward(self, x):
            x, _ = self.attention(x, x, x)
            x = F.softmax(x, -1) + x.log_softmax(-1)
            return F.scaled_dot_product_attention(x, x, F.gelu(x))

    assert list(step(Wrapped(Block()), ones(3, 2, 4))[0]) == ["net.gelu"]
    assert {"relu", "gelu", "silu", "tanh", "glu", "logsigmoid"} <= set(NAMES.values())
    assert not {"softmax", "dropout", "linear"} & set(NAMES)
    assert set(SQUASHING) == {"sigmoid", "hardsigmoid", "tanh", "hardtanh", "softsign"}


class Mixed(nn.Module):
    """A module and functions, nested, one of them shared by two modules, and called again."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([FunctionalNet(), FunctionalNet()])
        self.act, self.fc = nn.ReLU(), nn.Linear(3, 4).double()

    def forward(self, x):
        x = self.act(self.fc(self.inner[0](x)))
        return F.silu(self.fc(self.inner[1](torch.relu(x))))


def test_names_are_those_of_the_calling_module_and_a_module_counts_once():
    module = Wrapped(Mixed())
    norms, penalty, _ = step(module, ones(6, 4))
    names = ["inner.0.relu", "inner.0.tanh", "act", "relu", "inner.1.relu", "inner.1.tanh", "silu"]
    assert list(norms) == [f"net.{name}" for name in names]
    torch.testing.assert_close(penalty, ZETA / 2 * sum(norms.values()), **TOLERANCE)
    hooked = {name for name, child in module.named_modules() if child._forward_hooks or child._forward_pre_hooks}
    assert hooked == set()


def test_after_the_first_step_only_what_is_needed_has_hooks():
    module, plain = Wrapped(Mixed()), Lit()
    with MAN(ZETA).attached(module), MAN(ZETA).attached(plain):
        assert plain.net.fc1._forward_pre_hooks
        module.training_step(ones(6, 4)), plain.training_step(BATCH, 0)
        hooked = {name for name, child in module.named_modules() if child._forward_pre_hooks}
        assert hooked == {"net", "net.act", "net.inner.0", "net.inner.1"}
        assert not any(child._forward_pre_hooks for child in plain.modules())
        assert {name for name, child in plain.named_modules() if child._forward_hooks} == {"net.relu", "net.tanh"}


def test_the_root_and_training_step_itself():
    class Inline(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5).double(), nn.Linear(5, 1).double()

        def forward(self, x):
            return self.fc2(torch.sigmoid(self.fc1(x)))

        def training_step(self, batch):
            logits = self(F.elu(batch))
            self.accuracy = (torch.sigmoid(logits.detach()) > 0.5).double().mean()
            with torch.no_grad():
                F.relu(logits)
            return F.softplus(-logits).mean() - F.logsigmoid(logits).mean()

    assert list(step(Inline(), ones(6, 4))[0]) == ["elu", "sigmoid"]


class Bayesian(nn.Module):
    """Its weights are positive, each with a scale that is a softplus of a parameter; it takes rows by their numbers."""

    def __init__(self):
        super().__init__()
        self.linear, self.rho = nn.Linear(4, 4), nn.Parameter(torch.zeros(4, 4))
        parametrize.register_parametrization(self.linear, "weight", nn.ReLU())

    def forward(self, x):
        return F.elu(F.linear(x[F.relu(torch.arange(6) - 3)], self.linear.weight * F.softplus(self.rho.T - 1)))


class Rectified(Bayesian):
    def forward(self, x):
        return F.softplus(super().forward(x))


def test_what_is_made_of_a_parameter_alone_is_a_weight_and_no_layer(messages):
    assert list(step(Wrapped(Bayesian().double()), ones(6, 4))[0]) == ["net.elu"]
    weights = "as functions of a parameter alone: net.linear.parametrizations.weight.0"
    assert messages == [f"MAN: 1 layer: net.elu. Left out, {weights}, net.softplus."]
    assert list(step(Wrapped(Rectified().double()), ones(6, 4))[0]) == ["net.softplus", "net.elu", "net.softplus_2"]


def test_a_loss_and_a_metric_are_no_layers(messages):
    class Hinge(nn.Module):
        def forward(self, x):
            return F.relu(1 - x).mean()

    class Positive(Metric):
        def __init__(self):
            super().__init__()
            self.add_state("total", torch.zeros(()))

        def update(self, x):
            self.total += x.sigmoid().sum()

        def compute(self):
            return self.total

    class Scored(Wrapped):
        def __init__(self):
            super().__init__(FunctionalNet())
            self.loss, self.metric = Hinge(), Positive()

        def training_step(self, batch):
            out = self.net(batch)
            self.metric(out)
            return self.loss(out)

    assert list(step(Scored(), ones(6, 4))[0]) == ["net.relu", "net.tanh"]
    assert messages == ["MAN: 2 layers: net.relu, net.tanh. Left out, as parts of the loss: loss.relu."]


def test_a_hinge_at_the_end_of_the_step_is_the_loss_and_what_comes_before_weights_is_a_layer(messages):
    class Margin(Wrapped):
        def training_step(self, batch):
            return F.relu(1 - self.net(batch)).sum()

    class Bare(Margin):
        def __init__(self, net):
            super().__init__(net)
            self.weight = nn.Parameter(torch.ones(4, 6, dtype=torch.float64))

        def training_step(self, batch):
            return super().training_step(F.relu(batch @ self.weight) @ self.weight.T)

    assert list(step(Margin(FunctionalNet()), ones(6, 4))[0]) == ["net.relu", "net.tanh"]
    assert messages == ["MAN: 2 layers: net.relu, net.tanh. Left out, as parts of the loss: relu."]
    assert list(step(Bare(FunctionalNet()), ones(6, 4))[0]) == ["relu", "net.relu", "net.tanh", "relu_2"]


# Gates


@pytest.fixture
def messages(monkeypatch):
    """What is said."""
    said = []
    monkeypatch.setattr("fedlight.penalties.observation.rank_zero_info", said.append)
    return said


class Squeeze(nn.Module):
    """Squeeze-excite, with the usual reshaping between the gate and the product."""

    def __init__(self, modules):
        super().__init__()
        self.down, self.up = nn.Linear(4, 2).double(), nn.Linear(2, 4).double()
        if modules:
            self.act, self.gate = nn.ReLU(), nn.Sigmoid()
        else:
            self.act, self.gate = F.relu, torch.sigmoid

    def forward(self, x):
        weights = self.gate(self.up(self.act(self.down(x.mean((2, 3)))))).view(len(x), 4, 1, 1)
        return x * weights.expand_as(x)


class Excited(nn.Module):
    def __init__(self, modules):
        super().__init__()
        self.conv, self.se = nn.Conv2d(3, 4, 1).double(), Squeeze(modules)

    def forward(self, x):
        return self.se(F.gelu(self.conv(x)))


@pytest.mark.parametrize("modules", [False, True])
def test_the_gate_of_squeeze_excite_is_no_layer_and_is_named(modules, messages):
    norms, penalty, _ = step(module := Wrapped(Excited(modules)), x := ones(2, 3, 5, 5))
    relu, gate = ("net.se.act", "net.se.gate") if modules else ("net.se.relu", "net.se.sigmoid")
    assert list(norms) == ["net.gelu", relu]
    a1 = F.gelu(module.net.conv(x))
    a2 = F.relu(module.net.se.down(a1.mean((2, 3))))
    expected = ZETA / 2 * (a1.square().mean() + a2.square().mean())
    torch.testing.assert_close(penalty, expected.detach(), **TOLERANCE)
    left_out = f"Left out, as gates, which multiply something: {gate}."
    assert messages == [f"MAN: 2 layers: net.gelu, {relu}. {left_out}"]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights, self.out = nn.Linear(8, 16).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        h = c = torch.zeros_like(x[0])
        for step in x:
            i, f, o, g = self.weights(torch.cat([step, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.out(F.relu(h))


def test_the_gates_of_an_lstm_are_no_layers(messages):
    assert list(step(Wrapped(Recurrent()), ones(3, 2, 4))[0]) == ["net.relu"]
    assert messages[0].endswith("Left out, as gates, which multiply something: net.sigmoid, net.tanh.")


def test_gated_units_count_by_the_function_that_is_no_gate(messages):
    class SwiGLU(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

        def forward(self, x):
            x = F.silu(self.gate(x)) * self.up(x)
            return x * torch.sigmoid(x)  # SiLU by hand

    assert list(step(Wrapped(SwiGLU()), ones(2, 4))[0]) == ["net.silu"]
    assert messages[0].endswith(": net.sigmoid.")


def test_a_squashing_layer_that_multiplies_nothing_is_a_layer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4).double()

        def forward(self, x):
            x = 2 * torch.sigmoid(self.fc(x))
            return self.fc(F.dropout(torch.tanh(self.fc(x)), 0.0).view(-1, 4)).sigmoid()

    assert list(step(Wrapped(Block()), ones(2, 4))[0]) == ["net.sigmoid", "net.tanh", "net.sigmoid_2"]


# Activation classes of other libraries


class Swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Unit(nn.Module):
    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class MyGLU(nn.Module):
    def forward(self, x, dim=1):
        a, b = x.chunk(2, dim)
        return a * b


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Swish(), True),
        (Lambda(torch.nn.functional.relu), True),
        (Lambda(lambda x: x.clamp(min=0)), True),
        (Lambda(lambda x: 2 * x + 1), False),
        (Lambda(lambda x: x.flip(0)), False),
        (Lambda(lambda x: x.softmax(-1)), False),
        (Lambda(lambda x: x.flatten(1)), False),
        (Lambda(lambda x, y: x + y), False),
        (Noise(), False),
        (Unit(), False),
        (nn.Dropout(), False),
        (nn.Identity(), False),
        (nn.LayerNorm(4), False),
        (nn.Softmax(), False),
        (nn.GELU(), True),
        (type("GLUActivation", (MyGLU,), {})(), True),
    ],
)
def test_activation_classes_are_known_by_name_and_by_what_they_compute(module, expected):
    before = torch.get_rng_state()
    assert is_activation(module) is expected
    assert torch.equal(torch.get_rng_state(), before)


def test_a_class_of_ones_own_counts_once():
    module = Wrapped(nn.Sequential(nn.Linear(4, 4).double(), Swish(), nn.Linear(4, 2).double()))
    norms, _, _ = step(module, x := ones(3, 4))
    assert list(norms) == ["net.1"]
    torch.testing.assert_close(norms["net.1"], module.net[1](module.net[0](x)).square().mean().detach(), **TOLERANCE)


# Choosing


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (["net.relu"], ["net.relu"]),
        ([r".*\.relu"], ["net.inner.0.relu", "net.relu", "net.inner.1.relu"]),
        (["ReLU", "net.inner.1.tanh"], ["net.act", "net.inner.1.tanh"]),
        (["net.act"], ["net.act"]),
    ],
)
def test_layers_choose_functions_by_name(layers, expected):
    assert list(step(Wrapped(Mixed()), ones(6, 4), MAN(ZETA, layers))[0]) == expected


def test_layers_choose_gates_too():
    layers = ["net.se.gate"]
    assert list(step(Wrapped(Excited(True)), ones(2, 3, 5, 5), MAN(ZETA, layers))[0]) == layers
    layers = ["net.se.sigmoid"]
    assert list(step(Wrapped(Excited(False)), ones(2, 3, 5, 5), MAN(ZETA, layers))[0]) == layers


def test_a_name_that_no_function_can_have_is_an_error():
    with pytest.raises(MisconfigurationException, match="`layers`: 'net.rellu' matches nothing in Wrapped"):
        MAN(layers=["net.rellu"]).attach(Wrapped(Mixed()))
    module = Wrapped(FunctionalNet())
    with (
        MAN(layers=["net.gelu"]).attached(module),
        pytest.raises(MisconfigurationException, match="found no activation"),
    ):
        module.training_step(ones(6, 4))


def test_it_is_said_once_in_one_line_which_layers_there_are(messages):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4).double()

        def forward(self, x):
            for _ in range(12):
                x = F.relu(self.fc(x))
            return x

    step(Wrapped(Deep()), ones(2, 4))
    names = ", ".join(["net.relu"] + [f"net.relu_{i}" for i in range(2, 9)])
    assert messages == [f"MAN: 12 layers: {names} and 4 more."]


def test_a_layer_that_the_first_step_skips_counts_when_it_is_called():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.skip = nn.ModuleList([FunctionalNet(), FunctionalNet()]), True
            self.fc = nn.Linear(3, 4).double()

        def forward(self, x):
            x = self.blocks[0](x)
            return x if self.skip else self.blocks[1](self.fc(x))

    module, man = Wrapped(Dropped()), MAN(ZETA)
    with man.attached(module):
        module.training_step(ones(2, 4))
        assert list(man.norms(module)) == ["net.blocks.0.relu", "net.blocks.0.tanh"]
        module.net.skip = False
        module.training_step(ones(2, 4))
        assert list(man.norms(module))[2:] == ["net.blocks.1.relu", "net.blocks.1.tanh"]


# Places that it has to work in


def test_copies_share_what_was_found_and_follow_their_own_weights(messages):
    module, man = Functional(), MAN(ZETA)
    man.attach(module)
    early = copy.deepcopy(module)
    module.training_step(BATCH, 0)
    clones = [early, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    for i, clone in enumerate(clones):
        with torch.no_grad():
            for p in clone.parameters():
                p.mul_(1.5 + i)
        loss, expected = clone.training_step(BATCH, 0), formula(clone, BATCH, ZETA)
        for ours, theirs in zip(gradient(loss, clone), gradient(expected, clone), strict=True):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)
        penalized_step(clone).penalties[0].detach(clone)
        assert is_untouched(clone) or i == 2
    assert len(messages) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    class Checkpointed(Functional):
        def forward(self, x):
            return checkpoint(self.net, x.requires_grad_(), use_reentrant=use_reentrant)

    module, plain = Checkpointed(), Lit()
    with MAN(ZETA).attached(module):
        if use_reentrant:
            with (
                pytest.warns(UserWarning, match=r"leaves out 'net.(relu|tanh)'.*use_reentrant=False"),
                pytest.raises(MisconfigurationException, match="found no activation"),
            ):
                module.training_step(BATCH, 0)
            return
        for batch in batches(2):
            module.zero_grad()
            module.training_step(batch, 0).backward()
            expected = gradient(formula(plain, batch, ZETA), plain)
            for p, theirs in zip(module.parameters(), expected, strict=True):
                torch.testing.assert_close(p.grad, theirs, **TOLERANCE)


@pytest.mark.parametrize("module", [False, True])
def test_gates_inside_activation_checkpointing(module):
    net = Excited(module)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(self.net, x.requires_grad_(), use_reentrant=False)

    outer, inner, x = Wrapped(Checkpointed()), Wrapped(copy.deepcopy(net)), ones(2, 3, 5, 5)
    with MAN(ZETA).attached(outer), MAN(ZETA).attached(inner):
        for _ in range(2):
            outer.zero_grad(), inner.zero_grad()
            outer.training_step(x).backward(), inner.training_step(x).backward()
            for ours, theirs in zip(outer.parameters(), inner.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, **TOLERANCE)


def test_under_autocast_squares_are_taken_in_float32():
    module = Functional(torch.float32)
    with MAN(ZETA).attached(module), torch.autocast("cpu", torch.bfloat16):
        module.training_step(batches(1, dtype=torch.float32)[0], 0)
        norms = penalized_step(module).measured(penalized_step(module).penalties[0])
    assert {norm.dtype for norm in norms.values()} == {torch.float32}


class Redirected(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module.training_step(*args)


COMPILED = pytest.param("aot_eager", marks=pytest.mark.slow)


@pytest.mark.parametrize("backend", [None, COMPILED])
def test_clients_can_be_batched(backend):
    modules, data = [Functional(seed=i) for i in range(3)], batches(3)
    stacked = {k: torch.stack([m.get_parameter(k).detach() for m in modules]) for k, _ in modules[0].named_parameters()}
    batch = tuple(torch.stack(part) for part in zip(*data, strict=True))
    module = Functional()
    with MAN(ZETA).attached(module) as wrapper:
        redirected = Redirected(module)

        def client(params, batch):
            loss = functional_call(redirected, {f"module.{k}": v for k, v in params.items()}, (batch, 0))
            wrapper.forget()
            return loss

        function = vmap(grad_and_value(client))
        if backend is not None:
            function = torch.compile(function, backend=backend, fullgraph=True)
        for _ in range(2):
            gradients, losses = function(stacked, batch)
    for i, (m, own) in enumerate(zip(modules, data, strict=True)):
        expected = formula(m, own, ZETA)
        torch.testing.assert_close(losses[i], expected.detach(), **TOLERANCE)
        for ours, theirs in zip(gradients.values(), gradient(expected, m), strict=True):
            torch.testing.assert_close(ours[i], theirs, **TOLERANCE)


# Dynamo looks at `.grad` of what comes into a graph, with or without hooks.
DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
INDUCTOR = pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")])


@DYNAMO
@pytest.mark.parametrize("part", ["net", "module", "step"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_compiled(part, backend, monkeypatch):
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # the compiler sets it: gone after the test
    module, man = Functional(), MAN(ZETA)
    with man.attached(module):
        call = module.training_step
        if part == "step":
            call = torch.compile(call, backend=backend, fullgraph=True)
        else:
            (module.net if part == "net" else module).compile(backend=backend)
        for batch in batches(3):
            loss, expected = call(batch, 0), formula(Lit(), batch, ZETA)
            torch.testing.assert_close(loss, expected, **TOLERANCE)
            assert list(man.norms(module)) == ["net.relu", "net.tanh"]
            ours, theirs = gradient(loss, module), gradient(formula(lit := Lit(), batch, ZETA), lit)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, **TOLERANCE)


@DYNAMO
def test_a_graph_break_in_compiled_code():
    class Broken(FunctionalNet):
        def forward(self, x):
            x = F.relu(self.fc1(x))
            torch._dynamo.graph_break()
            return self.fc3(torch.tanh(self.fc2(x)))

    module = Functional()
    net = Broken()
    net.load_state_dict(module.net.state_dict())
    module.net = net
    module.net.compile(backend="aot_eager")
    with MAN(ZETA).attached(module):
        for batch in batches(3):
            torch.testing.assert_close(module.training_step(batch, 0), formula(Lit(), batch, ZETA), **TOLERANCE)


@pytest.mark.parametrize("compiled", [None, "aot_eager"])
def test_in_a_stock_trainer(compiled):
    data, module, twin = batches(3), Functional(), Lit()
    recorder = Recorder()
    trainer = silent_trainer(MAN(ZETA), recorder)
    trainer.fit(module if compiled is None else torch.compile(module, backend=compiled), Batches(data))
    for ours, batch in zip(recorder.gradients, data, strict=True):
        expected = gradient(formula(twin, batch, ZETA), twin)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            for p, g in zip(twin.parameters(), expected, strict=True):
                p.sub_(twin.lr * g)
    assert trainer.callback_metrics.keys() == {"train/penalty", "man/net.relu", "man/net.tanh"}
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())
    assert penalized_step(module) is None
