"""Checks of settings that raise errors which name the YAML key."""

from fedlight.penalties.numbers import Number as Number
from fedlight.penalties.numbers import check_hyperparameter as check_hyperparameter
from fedlight.penalties.numbers import check_number as check_number
from fedlight.penalties.numbers import current as current
from fedlight.penalties.numbers import largest as largest


def check_at_least_one(key: str, value: int) -> int:
    """Return ``value``, or raise a ValueError that names its key."""
    if value < 1:
        raise ValueError(f"{key} must be at least 1, got {value}.")
    return value
