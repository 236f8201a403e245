"""Hyperparameters: numbers that are checked, and that may follow the round."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Number = float | dict[str, Any]
"""A hyperparameter as it is given: a number, or ``{schedule: linear, from: 0, to: 0.05, rounds: 50}``."""
KEYS = {"schedule", "from", "to", "rounds"}
_KINDS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda a, b, part: a + (b - a) * part,
    "cosine": lambda a, b, part: a + (b - a) * (1 - math.cos(math.pi * part)) / 2,
    "exponential": lambda a, b, part: a * (b / a) ** part,
}


def check_number(
    key: str, value: Any, *, positive: bool = False, below: float = math.inf, at_most: float = math.inf
) -> float:
    """Return ``value`` if it is finite, not negative (with ``positive``: above 0) and within the upper limit.

    Args:
        key: the YAML key that the error names, as ``algorithm.alpha``.
        value: what was found.
        positive: whether 0 is refused too.
        below: an upper limit, exclusive.
        at_most: an upper limit, inclusive.

    Raises:
        ValueError: otherwise.
    """
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0) or number >= below or number > at_most:
        bound = f"{'above' if positive else 'at least'} 0" + f" and below {below:g}" * (below < math.inf)
        bound += f" and at most {at_most:g}" * (at_most < math.inf)
        raise ValueError(f"{key} must be a finite number {bound}, found {value!r}.")
    return number


def check_hyperparameter(key: str, value: Any, **limits: Any) -> float:
    """Return a number that :func:`check_number` lets pass, or for a schedule the tensor that :func:`follow` sets.

    The tensor is a scalar of float64, with which float32 gives the same bits; it is typed as what it stands for.

    Args:
        key: the YAML key, for errors and metrics.
        value: a number, a schedule, or the tensor of one, which is then shared.
        limits: as for :func:`check_number`; both ends of a schedule are checked, and all else lies between.

    Raises:
        ValueError: naming the key and the fix.
    """
    given: Any = settings_of(value) or value
    if not isinstance(given, Mapping):
        return check_number(key, value, **limits)
    if wrong := sorted(map(str, KEYS - given.keys() or given.keys() - KEYS - {"after"})):
        raise ValueError(
            f"{key}: the schedule {'lacks' if KEYS - given.keys() else 'has an unknown key'} {', '.join(wrong)}. Write"
            " {schedule: linear, from: 0, to: 0.05, rounds: 50}; `after: 10` lets 10 rounds pass before it moves."
        )
    ends = {end: check_number(f"{key}.{end}", given[end], **limits) for end in ("from", "to")}
    if (kind := given["schedule"]) not in _KINDS or (kind == "exponential" and not all(ends.values())):
        raise ValueError(f"{key}.schedule must be one of {', '.join(_KINDS)} (between numbers > 0), found {kind!r}.")
    for name, least in (("rounds", 1), ("after", 0)):
        if type(count := given.get(name, 0)) is not int or count < least:
            raise ValueError(f"{key}.{name} must be a whole number of at least {least}, found {count!r}.")
    if given is not value:
        return value  # type: ignore[no-any-return]
    tensor: Any = torch.tensor(ends["from"], dtype=torch.float64)
    tensor.key, tensor.schedule, tensor.round = key, dict(given, **ends), None
    return tensor  # type: ignore[no-any-return]


def settings_of(value: Any) -> dict[str, Any] | None:
    """The schedule that a tensor follows; None for anything else."""
    return getattr(value, "schedule", None) if isinstance(value, Tensor) else None


def largest(value: float) -> float:
    """A number, or the largest one of a schedule."""
    return value if (schedule := settings_of(value)) is None else max(schedule["from"], schedule["to"])


def current(value: float) -> float:
    """A number, or what a schedule has come to, without waiting for the device that has it."""
    return value if (schedule := settings_of(value)) is None else at(schedule, cast(Any, value).round or 0)


def at(schedule: Mapping[str, Any], round: int) -> float:
    """The value in a round, counted from 0: ``from`` until ``after`` rounds are over, and ``to`` ``rounds`` later."""
    part = (round - schedule.get("after", 0)) / schedule["rounds"]
    if 0 < part < 1:
        return _KINDS[schedule["schedule"]](schedule["from"], schedule["to"], part)
    return float(schedule["from"] if part <= 0 else schedule["to"])


def scheduled(*attributes: dict[str, Any]) -> list[Any]:
    """The tensors that follow a schedule among the attributes of objects, each once."""
    return list({id(v): v for v in tree_leaves(attributes) if settings_of(v) is not None}.values())


def follow(tensors: list[Any], round: int, device: torch.device | None = None) -> dict[str, float]:
    """Set what follows a schedule to its value in a round, in place, on a device; the values as metrics."""
    values: dict[str, float] = {}
    keys = [f"schedule/{tensor.key}" for tensor in tensors]
    for i, tensor in enumerate(tensors):
        if device is not None and device.type != "mps":  # which has no float64, and takes scalars from the CPU
            tensor.data = tensor.data.to(device)
        tensor.round, now = round, at(tensor.schedule, round)
        tensor.fill_(now)
        values[keys[i] + f"_{keys[: i + 1].count(keys[i])}" * (keys[i] in keys[:i])] = now
    return values
