"""All that the server knows between two rounds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fedlight.perturbations.base import State

BUFFERS = "buffers/"
_BEGUN = "begun buffers/"
"""Before the names of what tells which entries of a buffer were infinite and are not any more."""


@dataclass
class ServerState:
    """All that the server knows after some rounds, besides the clients' rows."""

    round: int = 0  # rounds that are complete
    global_step: int = 0  # local steps of all clients so far
    algorithm: State = field(default_factory=dict)  # its `params` are the server's model
    perturbation: State = field(default_factory=dict)
    buffers: State = field(default_factory=dict)
    views: State = field(default_factory=dict)  # the weights that are evaluated, [P] each
    # Of view `all`, if it is kept: `params`, the mean over every client's latest model, [P] float64, and `initial`, the
    # model before the first round, [P].
    latest_mean: State = field(default_factory=dict)
    # `initial`, the personal entries of a client that has not trained yet, and `mean`, of those that trained in the
    # last round, for evaluation, [P_own] each.
    personal: State = field(default_factory=dict)
    swa: State = field(default_factory=dict)  # what `summed_rounds` keeps; empty before its first round
    loss_scale: float = 65536.0  # where 16-bit mixed precision starts in the next round


def summed_rounds(old: State, params: Tensor, round: int, begin: int, every: int) -> State:
    """The sum of the server's models after the last rounds: ``sum`` ``[P]`` float64, their ``count``, the ``first``.

    After ``begin`` rounds no model counts yet, and after ``every`` further ones it does: ``params`` if one is due. What
    was before, ``old``, is void if it holds models of before ``begin``, as ``max_rounds`` was another.

    Source: Caldarola et al., "Improving Generalization in Federated Learning by Seeking Flat Minima", ECCV 2022.
    """
    old = old if old and int(old["first"]) > begin else {}
    if round <= begin or (round - begin) % every:
        return old
    if not old and round > begin + every:
        rank_zero_info(f"trainer.views: swa begins late, with round {round} instead of {begin + every}.")
    total, count = (old["sum"], old["count"]) if old else (0.0, torch.tensor(0))
    return {"first": torch.tensor(round), **old, "sum": total + params.double(), "count": count + 1}


def buffer_moves(after: State, before: Callable[[str], Tensor], begin: Iterable[str]) -> tuple[State, State]:
    """How far buffers that are averaged over clients have moved, in float64 and by longer names, and the others.

    Of these (counters of batches) the largest is kept. What is infinite and stays so, as in a mask, has not moved. Of
    ``begin`` it may become finite, as the extrema that an observer sees: then it comes from 0, and is counted.
    """
    averaged = {k: v for k, v in after.items() if v.is_floating_point() or v.is_complex()}
    pairs = {k: (real(v).double(), real(before(k))) for k, v in averaged.items()}
    begun = {k: pairs[k][0].isfinite() & pairs[k][1].isinf() for k in begin if k in pairs}
    old = {k: was.masked_fill(begun[k], 0.0) if k in begun else was for k, (_, was) in pairs.items()}
    still = {k: (new == old[k]) | new.isinf() if k in begun else new == old[k] for k, (new, _) in pairs.items()}
    moves = {BUFFERS + k: (new - old[k]).masked_fill_(still[k], 0.0) for k, (new, _) in pairs.items()}
    moves |= {_BEGUN + k: found.double() for k, found in begun.items()}
    return moves, {k: v for k, v in after.items() if k not in averaged}


def begun_by_enough(sent: Sequence[State], tolerated: int) -> Sequence[State]:
    """What clients sent, where no hostile ones decide whether a buffer begins to have a number, nor others weigh 0.

    An entry begins where more than ``tolerated`` clients have one; the others then have the (lower) median of these.
    """
    for key in sorted({key for state in sent for key in state if key.startswith(_BEGUN)}):
        name, has = BUFFERS + key.removeprefix(_BEGUN), torch.stack([state[key] for state in sent]).bool()
        if not (anyone := has.any(0)).any():
            continue
        values, begins = torch.stack([state[name] for state in sent]), has.sum(0) > tolerated
        values = torch.where(has | ~anyone, values, values.masked_fill(~has, torch.nan).nanmedian(0).values)
        values = values.masked_fill(anyone & ~begins, 0.0)
        sent = [{**state, name: v, key: begins.double()} for state, v in zip(sent, values, strict=True)]
    return sent


def moved_buffers(old: State, total: State) -> State:
    """Buffers after a round in which they have moved by ``total`` over its weight."""
    found = State()
    for k in (k for k in old if BUFFERS + k in total):
        found[k] = real(old[k]) + total[BUFFERS + k] / total["weight"]
        if (begun := total.get(_BEGUN + k)) is not None:  # the mean over those who had a number
            found[k] = torch.where(begun > 0, total[BUFFERS + k] / begun, found[k])
    return old | {k: torch.view_as_complex(v) if old[k].is_complex() else v for k, v in found.items()}


def real(buffer: Tensor) -> Tensor:
    """A buffer in real numbers."""
    return torch.view_as_real(buffer) if buffer.is_complex() else buffer


def like(state: State, old: State) -> State:
    """A state in the data types that it had, on its device."""
    return {k: v.to(old[k]) if k in old else v for k, v in state.items()}


def tensors(found: Any, owner: object, method: str, like: State | None = None, exact: bool = False) -> State:
    """What a method has given, which must be tensors by name, and those of ``like`` among them, in their shapes.

    Raises:
        MisconfigurationException: naming the method, and what it gives instead.
    """
    by_name, like, wrong = isinstance(found, Mapping), like or {}, ""
    odd = [k for k, v in found.items() if not isinstance(v, Tensor)] if by_name else []
    if not by_name or odd:
        wrong = (
            f"{type(found[odd[0]] if odd else found).__name__}{f' as {odd[0]!r}' if odd else ''}: give tensors by name"
        )
    elif differing := [k for k, v in like.items() if k not in found or found[k].shape != v.shape]:
        has = {k: list(found[k].shape) if k in found else None for k in differing}
        wanted = {k: list(like[k].shape) for k in differing}
        wrong = f"{has}; it must be {wanted}"
    elif exact and (more := sorted(found.keys() - like.keys())):
        wrong = f"{more}, which no checkpoint could be continued with. Let init_server begin it"
    if wrong:
        raise MisconfigurationException(f"algorithm: {type(owner).__name__}.{method} gives {wrong}.")
    return State(found)


def moved(state: State, device: torch.device | str) -> State:
    """A state on another device."""
    return {k: v.detach().to(device) for k, v in state.items()}


def num_bytes(tensors: Mapping[Any, Tensor]) -> int:
    """The size of some tensors."""
    return sum(v.numel() * v.element_size() for v in tensors.values())
