"""All that the server knows between two rounds."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fedlight.perturbations.base import State

_BEGUN = "begun "
"""Before the names of what tells which entries of a buffer were infinite and are not any more."""


@dataclass
class ServerState:
    """All that the server knows after some rounds, besides the clients' rows.

    Attributes:
        round: rounds that are complete.
        global_step: local steps of all clients so far.
        algorithm: the algorithm's state; ``params`` is the server's model.
        perturbation: the perturbation's state.
        buffers: the model's buffers.
        views: the weights that are evaluated, by name, ``[P]`` each.
        latest_mean: ``params``, the mean over every client's latest model, ``[P]`` float64, and ``initial``, the model
            before the first round, ``[P]``; empty unless view ``all`` is kept.
        personal: ``initial``, the personal entries of a client that has not trained yet, and ``mean``, of those that
            trained in the last round, for evaluation, ``[P_own]`` each.
        swa: what :func:`summed_rounds` keeps for view ``swa``; empty before its first round.
        loss_scale: where 16-bit mixed precision starts in the next round.
    """

    round: int = 0
    global_step: int = 0
    algorithm: State = field(default_factory=dict)
    perturbation: State = field(default_factory=dict)
    buffers: State = field(default_factory=dict)
    views: State = field(default_factory=dict)
    latest_mean: State = field(default_factory=dict)
    personal: State = field(default_factory=dict)
    swa: State = field(default_factory=dict)
    loss_scale: float = 65536.0


def summed_rounds(old: State, params: Tensor, round: int, begin: int, every: int) -> State:
    """The sum of the server's models after the last rounds: ``sum`` ``[P]`` float64, their ``count``, the ``first``.

    Args:
        old: the same before this round; void if it holds models of before ``begin``, as ``max_rounds`` was another.
        params: the server's model after the round, ``[P]``.
        round: rounds that are complete.
        begin: after so many rounds no model counts yet.
        every: after so many more one does, and so on.

    Source: Caldarola et al., "Improving Generalization in Federated Learning by Seeking Flat Minima", ECCV 2022.
    """
    old = old if old and int(old["first"]) > begin else {}
    if round <= begin or (round - begin) % every:
        return old
    if not old and round > begin + every:
        rank_zero_info(f"trainer.views: swa begins late, with round {round} instead of {begin + every}.")
    total, count = (old["sum"], old["count"]) if old else (0.0, torch.tensor(0))
    return {"first": torch.tensor(round), **old, "sum": total + params.double(), "count": count + 1}


def buffer_moves(
    after: State, before: Callable[[str], Tensor], prefix: str, begin: Iterable[str] = ()
) -> tuple[State, State]:
    """How far buffers that are averaged over clients have moved, in float64 and by longer names, and the others.

    Of these (counters of batches) the largest is kept. What is infinite and stays so, as in a mask, has not moved. Of
    ``begin`` it may become finite, as the extrema that an observer sees: then it comes from 0, and is counted.
    """
    averaged = {k: v for k, v in after.items() if v.is_floating_point() or v.is_complex()}
    pairs = {k: (real(v).double(), real(before(k))) for k, v in averaged.items()}
    begun = {k: pairs[k][0].isfinite() & pairs[k][1].isinf() for k in begin if k in pairs}
    old = {k: was.masked_fill(begun[k], 0.0) if k in begun else was for k, (_, was) in pairs.items()}
    still = {k: (new == old[k]) | new.isinf() if k in begun else new == old[k] for k, (new, _) in pairs.items()}
    moves = {prefix + k: (new - old[k]).masked_fill_(still[k], 0.0) for k, (new, _) in pairs.items()}
    moves |= {_BEGUN + prefix + k: found.double() for k, found in begun.items()}
    return moves, {k: v for k, v in after.items() if k not in averaged}


def moved_buffers(old: State, total: State, prefix: str) -> State:
    """Buffers after a round in which they have moved by ``total`` over its weight."""
    found = State()
    for k in (k for k in old if prefix + k in total):
        was, step = real(old[k]), total[prefix + k] / total["weight"]
        found[k] = was + step
        if (begun := total.get(_BEGUN + prefix + k)) is not None:  # the mean over those who had a number
            found[k] = torch.where(begun > 0, total[prefix + k] / begun, found[k])
    return old | {k: like_real(v, old[k]) for k, v in found.items()}


def real(buffer: Tensor) -> Tensor:
    """A buffer in real numbers."""
    return torch.view_as_real(buffer) if buffer.is_complex() else buffer


def like_real(value: Tensor, buffer: Tensor) -> Tensor:
    """The inverse."""
    return torch.view_as_complex(value) if buffer.is_complex() else value


def like(state: State, old: State) -> State:
    """A state in the data types that it had, on its device."""
    return {k: v.to(old[k]) if k in old else v for k, v in state.items()}


def moved(state: State, device: torch.device | str) -> State:
    """A state on another device."""
    return {k: v.detach().to(device) for k, v in state.items()}


def num_bytes(tensors: Mapping[Any, Tensor]) -> int:
    """The size of some tensors."""
    return sum(v.numel() * v.element_size() for v in tensors.values())
