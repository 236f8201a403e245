"""ε of every perturbation, and the second gradient, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fedlight import perturbations
from fedlight.local import LocalObjective, local_gradient
from fedlight.module.parameters import ParameterLayout
from fedlight.perturbations import ASAM, LESAM, SAM, DualSAM
from fedlight.perturbations.base import unit
from tests.helpers.tiny import Clients, Regression, quiet_trainer

TENSOR = {"dtype": torch.float64}


def vector(*values):
    return torch.tensor(values, **TENSOR)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def received(perturbation, client, params, server=None):
    """What a round begins with that starts from the model that was received."""
    return perturbation.begin({**(server or {}), "params": params}, client, params)


def two_parameters():
    """One weight and one bias."""
    return ParameterLayout.of(nn.Linear(1, 1).double())


def test_sam_steps_rho_along_the_gradient():
    epsilon, state = SAM(rho=0.5).epsilon(vector(9.0, 9.0), vector(3.0, -4.0), {})
    close(epsilon, vector(0.3, -0.4))
    assert state == {}


def test_asam_scales_weights_and_leaves_biases():
    """T = (|−1.8| + 0.2, 1) and g = (3, 8): T g = (6, 8) of norm 10, T² g = (12, 8)."""
    asam = ASAM(rho=0.5, eta=0.2)
    asam.setup(two_parameters())
    w = vector(-1.8, 7.0)
    state = asam.begin({}, {}, w)
    epsilon, after = asam.epsilon(w, vector(3.0, 8.0), state)
    close(epsilon, vector(0.6, 0.4))
    assert after is state


def test_asam_treats_the_parameters_of_norms_as_biases():
    asam = ASAM(rho=1.0, eta=0.5)
    asam.setup(ParameterLayout.of(nn.Sequential(nn.Linear(1, 1, bias=False), nn.GroupNorm(1, 1)).double()))
    w = vector(1.5, 5.0, 5.0)
    epsilon, _ = asam.epsilon(w, vector(1.0, 2.0, 1.0), asam.begin({}, {}, w))
    close(epsilon, vector(4.0, 2.0, 1.0) / 3)


def test_lesam_points_from_the_model_received_now_to_the_one_before():
    lesam = LESAM(rho=0.5)
    first = lesam.init_client(vector(0.0, 0.0))
    state = received(lesam, first, vector(3.0, 4.0))
    assert torch.equal(state["epsilon"], vector(0.0, 0.0))  # nothing was received before
    client, sent = lesam.client_update(first, state, vector(3.0, 4.0))
    assert sent == {}
    epsilon, _ = lesam.epsilon(vector(8.0, 8.0), None, received(lesam, client, vector(0.0, 8.0)))
    close(epsilon, vector(0.3, -0.4))
    assert not lesam.needs_gradient


def test_dual_sam_moves_the_dual_variable_in_every_step():
    """s = (5, 5) − (1, 0) − (1, 1) = (3, 4), so ε = (0.3, 0.4), and μ_i = (1, 0) + (0.3, 0.4) − (1, 1)."""
    dual = DualSAM(rho=0.5)
    server, client = {"perturbation": vector(1.0, 1.0)}, {"dual": vector(1.0, 0.0)}
    epsilon, state = dual.epsilon(vector(0.0, 0.0), vector(5.0, 5.0), dual.begin(server, client, vector(0.0, 0.0)))
    close(epsilon, vector(0.3, 0.4))
    close(state["dual"], vector(0.3, -0.6))
    for tensors in dual.client_update(client, state, vector(0.0, 0.0)):  # what is kept, and what is sent
        assert list(tensors) == ["dual"]
        close(tensors["dual"], vector(0.3, -0.6))
    after = dual.aggregate(server, {"dual": vector(6.0, 8.0), "clients": 2})
    close(after["perturbation"], vector(0.3, 0.4))


HESSIAN = torch.tensor([[2.0, 1.0], [1.0, 3.0]], **TENSOR)


def second_gradient(perturbation, w, server=None, client=None):
    """The gradient that the optimizer gets for L(w) = ½wᵀHw."""
    perturbation.setup(two_parameters())
    state = received(perturbation, client or {}, w, server)
    passes = []

    def gradient(point, nth):
        passes.append(nth)
        return HESSIAN @ point

    out, _ = local_gradient(w, gradient, LocalObjective(start=w), perturbation, state, None)
    return out, passes


def test_second_gradient_of_sam():
    """w = (1.2, 0.6): Hw = (3, 3), ε = 0.1/√2·(1, 1), Hε = 0.1/√2·(3, 4)."""
    out, passes = second_gradient(SAM(rho=0.1), vector(1.2, 0.6))
    close(out, vector(3 + 0.3 / math.sqrt(2), 3 + 0.4 / math.sqrt(2)))
    assert passes == [0, 1]


def test_second_gradient_of_asam():
    """w = (1.2, 0.6), η = 0.8: T = (2, 1), T g = (6, 3) of norm √45, ε = 0.1·(12, 3)/√45, Hε = 0.1·(27, 21)/√45."""
    out, passes = second_gradient(ASAM(rho=0.1, eta=0.8), vector(1.2, 0.6))
    close(out, vector(3 + 2.7 / math.sqrt(45), 3 + 2.1 / math.sqrt(45)))
    assert passes == [0, 1]


def test_second_gradient_of_lesam_takes_one_pass():
    """d = (4.2, 4.6) − (1.2, 0.6) = (3, 4), ε = (0.06, 0.08), Hε = (0.2, 0.3)."""
    client = {"received": vector(4.2, 4.6), "has_received": torch.ones((), **TENSOR)}
    out, passes = second_gradient(LESAM(rho=0.1), vector(1.2, 0.6), client=client)
    close(out, vector(3.2, 3.3))
    assert passes == [0]


def test_second_gradient_of_dual_sam():
    """g = (3, 3), μ_i = (1, 0), μ = (−1, −1): s = (3, 4), ε = (0.06, 0.08), Hε = (0.2, 0.3)."""
    out, passes = second_gradient(
        DualSAM(rho=0.1), vector(1.2, 0.6), {"perturbation": vector(-1.0, -1.0)}, {"dual": vector(1.0, 0.0)}
    )
    close(out, vector(3.2, 3.3))
    assert passes == [0, 1]


def prepared(perturbation, dtype=torch.float64):
    """A perturbation with the state that its first round begins with."""
    w = torch.tensor([1.2, 0.6], dtype=dtype)
    perturbation.setup(two_parameters())
    return w, received(perturbation, perturbation.init_client(w), w, perturbation.init_server(w))


ALL = [SAM, ASAM, LESAM, DualSAM]


def test_all_perturbations_are_tested():
    assert {cls.__name__ for cls in ALL} == set(perturbations.__all__) - {"Perturbation"}


@pytest.mark.parametrize("cls", ALL)
def test_zero_gradient_gives_zero(cls):
    perturbation = cls()
    w, state = prepared(perturbation)
    epsilon, after = perturbation.epsilon(w, torch.zeros_like(w), state)
    assert torch.equal(epsilon, torch.zeros_like(w))
    assert all(torch.isfinite(value).all() for value in after.values())


@pytest.mark.parametrize("cls", ALL)
def test_a_radius_of_zero_gives_zero_and_one_pass(cls):
    perturbation = cls(rho=0)
    w, state = prepared(perturbation)
    passes = []

    def gradient(point, nth):
        passes.append(nth)
        return HESSIAN @ point

    out, _ = local_gradient(w, gradient, LocalObjective(start=w), perturbation, state, None)
    assert torch.equal(out, HESSIAN @ w)
    assert passes == [0]


@pytest.mark.parametrize("rho", [0.05, 1e3])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-10, 1.0, 1e15])
@pytest.mark.parametrize("cls", [SAM, DualSAM])
def test_the_perturbation_never_leaves_its_radius_in_float32(cls, size, rho):
    """The square of 1e-30 is no float32: the norm is 0 while the gradient is not."""
    perturbation = cls(rho=rho)
    w, state = prepared(perturbation, torch.float32)
    epsilon, _ = perturbation.epsilon(w, torch.tensor([3 * size, 4 * size]), state)
    assert torch.isfinite(epsilon).all()
    assert epsilon.norm() <= rho * 1.001
    if size >= 1e-10:
        torch.testing.assert_close(epsilon, rho * torch.tensor([0.6, 0.8]))


def test_an_overflowed_gradient_does_not_stay_in_the_dual_variable():
    dual = DualSAM(rho=0.5)
    w, state = prepared(dual)
    epsilon, after = dual.epsilon(w, vector(math.inf, 1.0), state)
    assert not torch.isfinite(epsilon).all()  # the step is skipped as without a perturbation
    assert torch.equal(after["dual"], state["dual"])


@pytest.mark.parametrize("cls", ALL)
def test_vmap_over_clients_gives_what_each_client_gets(cls):
    perturbation = cls(rho=0.3)
    perturbation.setup(two_parameters())
    rng = torch.Generator().manual_seed(0)
    params, gradients, starts = (torch.randn(3, 2, generator=rng, **TENSOR) for _ in range(3))
    server = perturbation.init_server(params[0])
    clients = [perturbation.init_client(params[0]) for _ in range(3)]
    clients = [perturbation.client_update(c, received(perturbation, c, p, server), p)[0]
               for c, p in zip(clients, params, strict=True)]  # fmt: skip
    states = [received(perturbation, c, s, server) for c, s in zip(clients, starts, strict=True)]
    stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    batched, after = torch.func.vmap(perturbation.epsilon)(params, gradients, stacked)
    for i in range(3):
        epsilon, state = perturbation.epsilon(params[i], gradients[i], states[i])
        close(batched[i], epsilon)
        for name, value in state.items():
            torch.testing.assert_close(after[name][i], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("cls", ALL)
def test_negative_and_unreal_radii_are_refused_by_key(cls, value):
    with pytest.raises(ValueError, match=r"perturbation\.rho must be a finite number at least 0, found"):
        cls(rho=value)


def test_a_negative_eta_is_refused_by_key():
    with pytest.raises(ValueError, match=r"perturbation\.eta must be a finite number at least 0, found -1"):
        ASAM(eta=-1)


def test_an_unknown_perturbation_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"no perturbation 'Sam'; known are .*SAM"):
        _ = perturbations.Sam


def test_unit_has_length_one_or_zero():
    assert unit(vector(0.0, 0.0)).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(unit(vector(3.0, 4.0)).numpy(), [0.6, 0.8], atol=1e-15)


@pytest.mark.parametrize(
    ("perturbation", "gradients"), [(None, 8), (SAM(rho=0.1), 16), (SAM(rho=0.0), 8), (LESAM(rho=0.1), 8)]
)
def test_the_gradients_that_clients_compute_are_counted(perturbation, gradients, tmp_path):
    """Clients of 5, 12, 8 and 3 samples take 2 + 3 + 2 + 1 batches of 4."""
    trainer = quiet_trainer(tmp_path, perturbation=perturbation, max_rounds=1, clients_per_round=4)
    trainer.fit(Regression(), Clients())
    assert trainer.callback_metrics["clients/gradients"] == gradients
