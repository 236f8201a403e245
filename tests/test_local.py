"""The local step, by hand on a quadratic: L(w) = ½(w − c)ᵀA(w − c), whose gradient is A(w − c)."""

import pytest
import torch

from fedlight.local import ClientResult, GradientClip, LocalObjective, local_gradient
from fedlight.perturbations import SAM
from fedlight.perturbations.base import Perturbation

A = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
C = torch.tensor([1.0, -1.0], dtype=torch.float64)
W = torch.tensor([3.0, 2.0], dtype=torch.float64)
PLAIN = torch.tensor([2.0, 12.0], dtype=torch.float64)


def step(objective, perturbation=None, clip=None, state=None):
    """The gradient of one step, and the points and passes at which the loss gradient was taken."""
    seen = []

    def gradient(point, nth):
        seen.append((point.clone(), nth))
        return A @ (point - C)

    result, state = local_gradient(W, gradient, objective, perturbation, state or {}, clip)
    return result, seen, state


def test_without_anything_it_is_the_gradient():
    result, seen, state = step(LocalObjective(start=W))
    assert torch.equal(result, PLAIN)
    assert [nth for _, nth in seen] == [0]
    assert state == {}


def test_every_term_of_the_objective():
    linear, anchor = torch.tensor([0.5, -0.5], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    objective = LocalObjective(start=W, anchor=anchor, proximal=0.1, linear=linear, gradient_scale=2.0)
    assert step(objective)[0].tolist() == pytest.approx([4 + 0.5 + 0.3, 24 - 0.5 + 0.2])
    scaled = LocalObjective(start=W, anchor=anchor, proximal=torch.tensor(0.1), gradient_scale=torch.tensor(2.0))
    assert step(scaled)[0].tolist() == pytest.approx([4.3, 24.2])
    assert torch.equal(step(LocalObjective(start=W, anchor=anchor))[0], PLAIN)


def test_clipping_comes_last():
    objective = LocalObjective(start=W, linear=torch.tensor([1.0, -8.0], dtype=torch.float64))  # (3, 4): norm 5
    assert step(objective, clip=GradientClip(1.0))[0].tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
    assert torch.equal(step(objective, clip=GradientClip(6.0))[0], step(objective)[0])
    assert step(objective, clip=GradientClip(3.5, "value"))[0].tolist() == [3.0, 3.5]
    zero = GradientClip(1.0)(torch.zeros(3))
    assert torch.equal(zero, torch.zeros(3))


def test_a_perturbation_takes_the_gradient_elsewhere_and_corrects_here():
    anchor = torch.zeros(2, dtype=torch.float64)
    result, seen, _ = step(LocalObjective(start=W, anchor=anchor, proximal=1.0), SAM(0.5))
    epsilon = 0.5 * PLAIN / PLAIN.norm()
    torch.testing.assert_close(seen[1][0], W + epsilon, rtol=0, atol=1e-15)
    assert [nth for _, nth in seen] == [0, 1]
    torch.testing.assert_close(result, A @ (W + epsilon - C) + W, rtol=0, atol=1e-14)


def test_a_perturbation_that_needs_no_gradient_costs_one_pass():
    class Fixed(Perturbation):
        needs_gradient = False

        def epsilon(self, params, gradient, state):
            assert gradient is None
            return torch.ones_like(params), {"steps": state["steps"] + 1}

    result, seen, state = step(LocalObjective(start=W), Fixed(), state={"steps": 2})
    assert [nth for _, nth in seen] == [0]
    assert result.tolist() == [3.0, 16.0]
    assert state == {"steps": 3}


def test_the_update_of_a_result():
    result = ClientResult(0, start=W, params=W + 1, num_samples=1, weight=1.0, num_steps=1, lr_sum=0.1)
    assert result.update.tolist() == [1.0, 1.0]
