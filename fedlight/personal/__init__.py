"""Personal models. Every module of this package is imported: a new file is a new method."""

import sys
from typing import Any

from fedlight.personal.base import Personalization
from fedlight.plugins import discover

_found = discover(sys.modules[__name__], Personalization)
globals().update(_found)
__all__ = [*_found]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"there is no personalization {name!r}; known are {', '.join(_found)}")
