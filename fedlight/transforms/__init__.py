"""Transforms of messages. Every module of this package is imported: a new file is a new transform."""

import sys
from typing import Any

from fedlight.plugins import discover
from fedlight.transforms.base import Transform

_found = discover(sys.modules[__name__], Transform)
globals().update(_found)
__all__ = [*_found]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"there is no transform {name!r}; known are {', '.join(_found)}")
