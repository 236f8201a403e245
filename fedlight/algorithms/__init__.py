"""Federated algorithms. Every module of this package is imported: a new file is a new algorithm."""

import sys
from typing import Any

from fedlight.algorithms.base import Algorithm, Message
from fedlight.plugins import discover

_found = discover(sys.modules[__name__], Algorithm)
globals().update(_found)
__all__ = ["Message", *_found]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"there is no algorithm {name!r}; known are {', '.join(_found)}")
