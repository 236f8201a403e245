"""Checks of settings that raise errors which name the YAML key."""

import re
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.penalties.numbers import Number as Number
from fedlight.penalties.numbers import check_hyperparameter as check_hyperparameter
from fedlight.penalties.numbers import check_number as check_number
from fedlight.penalties.numbers import current as current
from fedlight.penalties.numbers import largest as largest


def check_whole(key: str, value: Any, least: int = 1) -> int:
    """Return a whole number, or raise a ValueError that names its key where it is none or too small."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{key} must be {f'at least {least}' if whole else 'a whole number'}, got {value!r}.")
    return int(value)


VARIABLE = r"\$[A-Za-z_{]"
"""Where a shell's variable begins, as a regular expression."""


def path_of(key: str, value: str | Path) -> Path:
    """A path of which ``~`` is the home; a MisconfigurationException names the key where a $VARIABLE stands in it."""
    path = Path(value).expanduser()
    if re.search(VARIABLE, str(value)) and not path.exists():
        raise MisconfigurationException(f"{key}={str(value)!r}: $VARIABLES are replaced by shells, not in files.")
    return path


def check_paths(given: Mapping[str, Any]) -> None:
    """Raise a MisconfigurationException with the key of an object whose folder has a ``~`` or $VARIABLE that stays."""
    for key, value in given.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            path = getattr(one, "save_dir", None) or getattr(one, "dirpath", None) or ""
            expands = type(one).__name__ == "TensorBoardLogger"
            if not expands and re.search(f"^~|{VARIABLE}", str(path)) and not Path(path).exists():
                what = f"{str(path)!r}: ~ and $VARIABLES are replaced by shells, not in files"
                raise MisconfigurationException(f"{key}: {type(one).__name__} writes to {what}.")


def check_objects(given: Mapping[str, Any]) -> None:
    """Raise a MisconfigurationException with the key where a class, or its name, stands for an object or among such."""
    for key, value in given.items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, str | type):
                name = one if isinstance(one, str) else one.__name__
                raise MisconfigurationException(f"{key}: {one!r} is no object. Give one of the class, as {name}().")
