"""Perturbations. Every module of this package is imported: a new file is a new perturbation."""

import sys
from typing import Any

from fedlight.perturbations.base import Perturbation
from fedlight.plugins import discover

_found = discover(sys.modules[__name__], Perturbation)
globals().update(_found)
__all__ = [*_found]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"there is no perturbation {name!r}; known are {', '.join(_found)}")
