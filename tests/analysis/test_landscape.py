import math

import numpy as np
import pytest
import torch
from torch import nn

from fedlight.analysis import HessianOperator
from fedlight.analysis.landscape import LossLine, filter_normalised_directions, loss_line, loss_surface
from tests.analysis.cases import case, operator, rng


def quadratic() -> HessianOperator:
    """L(w) = 3 w_0² + w_1² at (1, 2)."""
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    return HessianOperator(lambda batch, index: 3 * w[0] ** 2 + w[1] ** 2, [w], [torch.ones(2), torch.ones(1)])


def test_a_surface_is_the_loss_on_the_grid():
    op = quadratic()
    surface = loss_surface(op, torch.eye(2), radius=2.0, points=5)
    assert surface.a.tolist() == [-2, -1, 0, 1, 2]
    wanted = 3 * (1 + surface.a[:, None]) ** 2 + (2 + surface.b) ** 2
    torch.testing.assert_close(surface.loss, wanted)
    assert op.flat().tolist() == [1, 2]


def test_a_line_goes_through_both_models():
    op, seen = quadratic(), []
    start, end = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0])
    line = loss_line(op, start, end, points=7, margin=0.5, before_each=seen.append)
    assert seen == line.t.tolist()
    assert {0.0, 1.0, -0.5, 1.5} <= set(seen)
    torch.testing.assert_close(line.loss, 7 * line.t**2)
    assert line.barrier == 0


def test_the_barrier_is_the_height_above_the_chord():
    t = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], dtype=torch.float64)
    assert LossLine(t, torch.tensor([9.0, 1.0, 5.0, 3.0, 9.0], dtype=torch.float64)).barrier == 3
    assert math.isnan(LossLine(t, torch.tensor([9.0, 1.0, math.nan, 3.0, 9.0], dtype=torch.float64)).barrier)


def test_directions_have_the_length_of_every_filter():
    op = operator("cnn_max_pooling")
    directions = filter_normalised_directions(op.parameters, rng(), 2)
    assert directions.shape == (2, op.size)
    assert not torch.equal(directions[0], directions[1])
    assert torch.equal(directions, filter_normalised_directions(op.parameters, rng(), 2))
    for direction in directions:
        parts = direction.split_with_sizes([p.numel() for p in op.parameters])
        for p, part in zip(op.parameters, parts, strict=True):
            if p.ndim == 1:
                assert part.abs().max() == 0
            else:
                torch.testing.assert_close(part.view_as(p).flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))


def test_rescaling_a_relu_network_does_not_change_its_picture():
    """Li et al.'s reason for the normalisation, for a network without biases."""

    def surface(factor):
        w1 = nn.Parameter(torch.randn(4, 3, generator=rng(1), dtype=torch.float64) * factor)
        w2 = nn.Parameter(torch.randn(2, 4, generator=rng(2), dtype=torch.float64) / factor)
        x = torch.randn(10, 3, generator=rng(3), dtype=torch.float64)
        op = HessianOperator(lambda batch, index: ((batch @ w1.T).relu() @ w2.T).square().mean(), [w1, w2], [x])
        return loss_surface(op, filter_normalised_directions(op.parameters, rng(), 2), points=5).loss

    torch.testing.assert_close(surface(1.0), surface(7.0))


def test_both_are_saved(tmp_path):
    surface = loss_surface(quadratic(), torch.eye(2), points=3)
    surface.save(tmp_path / "surface.npz")
    loss_line(quadratic(), torch.zeros(2), torch.ones(2)).save(tmp_path / "deep" / "line.npz")
    assert np.load(tmp_path / "surface.npz")["loss"].shape == (3, 3)
    assert "t" in np.load(tmp_path / "deep" / "line.npz")


def test_what_is_out_of_range_is_refused():
    op = operator("mlp")
    with pytest.raises(ValueError, match="`points`"):
        loss_surface(op, torch.zeros(2, op.size), points=2)
    with pytest.raises(ValueError, match="`radius`"):
        loss_surface(op, torch.zeros(2, op.size), radius=0)
    with pytest.raises(ValueError, match="`margin`"):
        loss_line(op, op.flat(), op.flat(), margin=-1)
    with pytest.raises(ValueError, match=r"`end` has shape \(3,\), but the model has 74"):
        loss_line(op, op.flat(), torch.zeros(3))
    assert len(case("mlp")[3]) == 74
