"""Checks of settings that raise errors which name the YAML key."""

import math


def check_at_least_one(key: str, value: int) -> int:
    """Return ``value``, or raise a ValueError that names its key."""
    if value < 1:
        raise ValueError(f"{key} must be at least 1, got {value}.")
    return value


def check_hyperparameter(
    key: str, value: float, *, positive: bool = False, below: float = math.inf, at_most: float = math.inf
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
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0 or (positive and number == 0) or number >= below or number > at_most:
        bound = f"{'above' if positive else 'at least'} 0"
        if below < math.inf:
            bound += f" and below {below:g}"
        if at_most < math.inf:
            bound += f" and at most {at_most:g}"
        raise ValueError(f"{key} must be a finite number {bound}, found {value!r}.")
    return number
