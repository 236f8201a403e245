"""Discovery of plugins: every class that a package's modules define is found by its name, and no list is kept."""

import importlib
import pkgutil
from types import ModuleType
from typing import TypeVar

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
