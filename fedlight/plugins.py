"""Discovery of plugins: every class that a package's modules define is found by its name, and no list is kept."""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def discover(package: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """Import all modules of a package and return the public subclasses of ``base`` that they define, by name."""
    found: dict[str, type[T]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, value in vars(module).items():
            defined_here = getattr(value, "__module__", None) == module.__name__
            if isinstance(value, type) and issubclass(value, base) and defined_here and not name.startswith("_"):
                found[name] = value
    return dict(sorted(found.items()))


def offer(package: str, base: type, kind: str) -> tuple[list[str], Callable[[str], Any]]:
    """Make what :func:`discover` finds attributes of a package, of that name, and say what there is of its ``kind``.

    Returns:
        The package's ``__all__`` and ``__getattr__``.
    """
    found: dict[str, type] = discover(sys.modules[package], base)
    vars(sys.modules[package]).update(found)

    def missing(name: str) -> Any:
        raise AttributeError(f"there is no {kind} {name!r}; known are {', '.join(found)}")

    return [*found], missing
