"""What a client does in a round: its objective, its gradient, its result. Written once, for every engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fedlight.perturbations.base import Perturbation, Sender, State


@dataclass(frozen=True)
class LocalObjective:
    """What an algorithm asks of one client in one round.

    The client starts at ``start`` and follows ``gradient_scale·g + linear + proximal·(w - anchor)``, where g is the
    gradient of its loss and penalties. That is the gradient of

        gradient_scale·(loss + penalties)(w) + ⟨linear, w⟩ + proximal/2·‖w - anchor‖².

    With ``other``, g is taken at a mixture of two models, share·w + (1 − share)·other.

    Attributes:
        start: the parameters that training starts from, ``[P]``.
        anchor: what ``proximal`` pulls towards, ``[P]``; required where ``proximal`` is not 0.
        proximal: weight of the quadratic term; a scalar tensor where it is an input of a recorded program.
        linear: a constant added to the gradient, ``[P]``.
        gradient_scale: factor of the loss gradient; may be a scalar tensor, too.
        optimizer: what the optimizer's state begins with instead of zeros, by the names that it has in torch
            (``exp_avg_sq``): ``[P]``, or a scalar for all parameters (``step``); see ``Algorithm.optimizer_state``.
        drift: what each step of the optimizer is followed by: w ← w − lr·drift, ``[P]``, with the first group's rate.
        references: other models that penalties compare the client's with, ``[P]`` each, besides ``start``.
        other: the model that w is mixed with where the loss is taken, ``[P]``.
        share: what w has of the mixture.
        frozen: entries that stay as they are, ``[P]`` bool: they have no gradient, nor a part in its norm, they are not
            perturbed, and no step of the optimizer moves them.
    """

    start: Tensor
    anchor: Tensor | None = None
    proximal: float | Tensor = 0.0
    linear: Tensor | None = None
    gradient_scale: float | Tensor = 1.0
    optimizer: State = field(default_factory=dict)
    drift: Tensor | None = None
    references: State = field(default_factory=dict)
    other: Tensor | None = None
    share: float | Tensor = 1.0
    frozen: Tensor | None = None

    @classmethod
    def of(cls, start: Tensor, parts: Mapping[str, Any]) -> "LocalObjective":
        """The objective of these :meth:`parts`; what else is there is left out."""
        names = ("anchor", "proximal", "linear", "gradient_scale", "other", "share", "frozen")
        given = {name: parts[name] for name in names if name in parts}
        models = {name.removeprefix(_MODEL): value for name, value in parts.items() if name.startswith(_MODEL)}
        return cls(start, **given, references=models)

    @property
    def pulls(self) -> bool:
        """Whether a parameter that the loss does not depend on has a gradient, too."""
        return self.linear is not None or not (self.anchor is None or _is_constant(self.proximal, 0.0))

    def point(self, params: Tensor) -> Tensor:
        """Where the loss is taken, ``[P]``."""
        return params if self.other is None else self.other + self.share * (params - self.other)

    def correct(self, gradient: Tensor, params: Tensor) -> Tensor:
        """The corrected gradient ``[P]`` (a new tensor, or ``gradient`` itself where nothing is to be corrected)."""
        out = gradient
        if not _is_constant(self.gradient_scale, 1.0):
            out = out * self.gradient_scale
        if self.linear is not None:
            out = out + self.linear
        if self.anchor is not None and not _is_constant(self.proximal, 0.0):
            out = out + self.proximal * (params - self.anchor)
        return self.moving(out)

    def moving(self, vector: Tensor) -> Tensor:
        """A vector ``[P]``, 0 where entries are frozen."""
        return vector if self.frozen is None else vector.masked_fill(self.frozen, 0.0)

    def parts(self) -> dict[str, Tensor | float]:
        """What a local step reads, by name; nothing where there is nothing to correct or to compare with."""
        parts: dict[str, Tensor | float] = {_MODEL + name: value for name, value in self.references.items()}
        if self.anchor is not None and not _is_constant(self.proximal, 0.0):
            parts |= {"anchor": self.anchor, "proximal": self.proximal}
        if self.linear is not None:
            parts["linear"] = self.linear
        if self.other is not None:
            parts |= {"other": self.other, "share": self.share}
        if not _is_constant(self.gradient_scale, 1.0):
            parts["gradient_scale"] = self.gradient_scale
        # A schedule's number is of float64.
        parts = {k: v.to(self.start) if isinstance(v, Tensor) else v for k, v in parts.items()}
        return parts if self.frozen is None else {**parts, "frozen": self.frozen}


_MODEL = "references/"


def _is_constant(value: float | Tensor, constant: float) -> bool:
    # A tensor is an input of a captured or batched program: its value must not be looked at.
    return not isinstance(value, Tensor) and value == constant


@dataclass(frozen=True)
class GradientClip:
    """Clipping of the corrected gradient, as ``trainer.gradient_clip_val`` and ``trainer.gradient_clip_algorithm``."""

    value: float
    algorithm: str = "norm"

    def __call__(self, gradient: Tensor) -> Tensor:
        """Clip ``[P]`` by its norm, or each entry by value."""
        if self.algorithm == "value":
            return gradient.clamp(-self.value, self.value)
        shrink: Tensor = (self.value / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1.0)
        return gradient * shrink


def local_gradient(
    params: Tensor,
    gradient: Callable[[Tensor, int], Tensor],
    objective: LocalObjective,
    perturbation: Perturbation | None,
    state: State,
    clip: GradientClip | None,
) -> tuple[Tensor, State]:
    """The gradient that the optimizer receives in one local step: the only place where a local step is defined.

    Args:
        params: w, ``[P]``.
        gradient: maps a point ``[P]`` and the number of the step's pass, from 0, to ∇(loss + penalties) there, on the
            step's batch. Its result may be overwritten by its next call.
        objective: the correction that the algorithm asks for.
        perturbation: where the gradient is taken, or None for w itself.
        state: the perturbation's state in this round.
        clip: clipping of the corrected gradient, or None.

    Returns:
        The gradient ``[P]`` and the perturbation's new state.
    """
    point, passes = objective.point(params), count()

    def at(epsilon: Tensor | None) -> Tensor:
        here = point if epsilon is None else point + objective.moving(epsilon)
        return objective.moving(gradient(here, next(passes)))

    g, state = (at(None), state) if perturbation is None else perturbation.gradient(point, at, state)
    g = objective.correct(g, params)
    return (g if clip is None else clip(g)), state


@dataclass(frozen=True, kw_only=True)
class ClientResult(Sender):
    """What comes back from a client's local training, with the client's figures.

    Attributes:
        start: the parameters it started from, ``[P]``.
        params: the parameters it ended with, ``[P]``.
        buffers: the module's buffers after training.
        perturbation: the perturbation's state after the last step.
        optimizer: what ``Algorithm.optimizer_state`` names of the optimizer's state after the last step, ``[P]`` each.
        metrics: logged sums, as ``name -> (weighted sum, weight)``.
        reductions: how each logged name is combined (mean, sum, min, max).
        loss_scale: the scale that 16-bit mixed precision ended with; None in other precisions.
        loss: of the model that it started from on all its data, where the algorithm ``needs_loss``.
    """

    start: Tensor
    params: Tensor
    buffers: State = field(default_factory=dict)
    perturbation: State = field(default_factory=dict)
    optimizer: State = field(default_factory=dict)
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    reductions: dict[str, str] = field(default_factory=dict)
    loss_scale: Tensor | None = None
    loss: float = 0.0

    @property
    def update(self) -> Tensor:
        """Δ_i, ``[P]``."""
        return self.params - self.start
