"""The loss along directions through parameter space: on a plane, and on the line between two models."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedlight.analysis.operators import HessianOperator
from fedlight.analysis.result import save_arrays
from fedlight.checks import check_number, check_whole


@dataclass(frozen=True)
class LossSurface:
    """The loss L(w + a·d_1 + b·d_2) on a grid.

    Attributes:
        a: coordinates along d_1, ``[n]``.
        b: coordinates along d_2, ``[n]``.
        loss: ``[n, n]``; the first index belongs to ``a``. Far from w it may be infinite.
        directions: what d_1 and d_2 are, for the picture.
    """

    a: Tensor
    b: Tensor
    loss: Tensor
    directions: str

    def save(self, path: str | Path) -> None:
        """Write the grid to an ``.npz`` file."""
        save_arrays(path, {"a": self.a, "b": self.b, "loss": self.loss})


@dataclass(frozen=True)
class LossLine:
    """The loss L((1 − t)·w_0 + t·w_1).

    Attributes:
        t: positions ``[n]``; 0 and 1 are the two models.
        loss: the loss there ``[n]``.
    """

    t: Tensor
    loss: Tensor

    @property
    def barrier(self) -> float:
        """The highest loss between the models above the straight line between their losses; 0 where it lies below."""
        inside = (self.t >= 0) & (self.t <= 1)
        t, loss = self.t[inside], self.loss[inside]
        return float((loss - (1 - t) * loss[0] - t * loss[-1]).max().clamp(min=0))

    def save(self, path: str | Path) -> None:
        """Write the line to an ``.npz`` file."""
        save_arrays(path, {"t": self.t, "loss": self.loss})


def filter_normalised_directions(parameters: Sequence[Tensor], generator: torch.Generator, count: int = 2) -> Tensor:
    """Random directions ``[count, P]`` in which every filter is as long as the filter of the model.

    The loss does not change when a ReLU layer is multiplied by a number and the next one divided by it; so normalised,
    neither does the picture (Li et al., 2018, "Visualizing the Loss Landscape of Neural Nets", section 4). A filter is
    a parameter's slice along its first dimension. Biases and the parameters of normalisation layers stay as they are.

    Args:
        parameters: of the model.
        generator: draws normal numbers, on the CPU.
        count: how many.
    """

    def normalised(p: Tensor) -> Tensor:
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        if p.ndim < 2:
            return torch.zeros_like(noise).reshape(-1)
        rows, weights = noise.flatten(1), p.detach().flatten(1)
        direction: Tensor = rows * (weights.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True))
        return direction.reshape(-1)

    return torch.stack([torch.cat([normalised(p) for p in parameters]) for _ in range(count)])


def loss_surface(
    operator: HessianOperator,
    directions: Tensor,
    *,
    radius: float = 1.0,
    points: int = 21,
    name: str = "two directions",
) -> LossSurface:
    """The loss on a plane through the operator's parameters: ``points``² evaluations over the data.

    Args:
        operator: gives the loss.
        directions: d_1 and d_2, ``[2, P]``.
        radius: the grid goes from −radius to radius in both directions.
        points: grid points in each direction; an odd number has the model itself in the middle.
        name: what the directions are.

    Raises:
        ValueError: if ``radius`` is not positive or ``points`` below 3.
    """
    check_number("`radius`", radius, positive=True)
    check_whole("`points`", points, 3)
    grid = torch.linspace(-radius, radius, points, dtype=torch.float64)
    here, (first, second) = operator.flat(), directions.to(operator.parameters[0])
    loss = [[operator.loss_at(here + float(a) * first + float(b) * second) for b in grid] for a in grid]
    return LossSurface(grid, grid.clone(), torch.tensor(loss, dtype=torch.float64), name)


def loss_line(
    operator: HessianOperator,
    start: Tensor,
    end: Tensor,
    *,
    points: int = 31,
    margin: float = 0.5,
    before_each: Callable[[float], None] | None = None,
) -> LossLine:
    """The loss on the line through two parameter vectors.

    Args:
        operator: gives the loss.
        start: w_0 ``[P]``, at t = 0.
        end: w_1 ``[P]``, at t = 1.
        points: of the line, ends included; 0 and 1 are always among them.
        margin: how far the line goes on beyond both ends.
        before_each: called with t before the loss there is taken, as to set buffers.

    Raises:
        ValueError: if the vectors do not fit the model, ``margin`` is negative or ``points`` below 3.
    """
    check_whole("`points`", points, 3)
    check_number("`margin`", margin)
    for name, vector in (("start", start), ("end", end)):
        if vector.shape != (operator.size,):
            raise ValueError(f"`{name}` has shape {tuple(vector.shape)}, but the model has {operator.size} parameters.")
    t = torch.linspace(-margin, 1 + margin, points, dtype=torch.float64)
    t = torch.unique(torch.cat([t, torch.tensor([0.0, 1.0], dtype=torch.float64)]))
    start, end = start.to(operator.parameters[0]), end.to(operator.parameters[0])
    loss = []
    for position in t.tolist():
        if before_each is not None:
            before_each(position)
        loss.append(operator.loss_at(torch.lerp(start, end, position)))
    return LossLine(t, torch.tensor(loss, dtype=torch.float64))
