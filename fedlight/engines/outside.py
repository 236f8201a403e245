"""What a trial step does outside of the module: it is noted, kept from the user's eyes, and undone."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import TextIOBase
from types import CellType, FunctionType
from typing import Any

from torch import nn

from fedlight.module.state import _OUTSIDE, _TORCH, _items, _package, _put_back

_CONTAINERS = (list, dict, set, deque)
_SHOWN = (*_CONTAINERS, bool, int, float, str, type(None))


@contextmanager
def seen_outside(module: nn.Module, found: set[str]) -> Iterator[None]:
    """Note in ``found`` what is printed, logged and changed of the variables that the module's methods see."""
    variables = [(name, get, put, get()) for name, get, put in _variables(module)]
    held = {id(v): dict(_items(v)) for *_, v in variables if isinstance(v, _CONTAINERS)}
    handler = _Noting(found)
    logging.getLogger().addHandler(handler)
    try:
        with redirect_stdout(_Swallowing(found)):
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        for name, get, put, value in variables:
            if (now := get()) is not value and (type(now) is not type(value) or now != value):
                found.add(f"changes the variable {name}")
                put(value)
            content = held.get(id(value), {})
            if id(value) in held and not _alike(content, _items(value)):
                found.add(f"changes the variable {name}")
                _put_back(value, content)


def _alike(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return len(one) == len(other) and all(k in other and other[k] is v for k, v in one.items())


def _variables(module: nn.Module) -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], Any]]]:
    """Globals and cells of closures, by name, each with how it is read and set."""
    classes = {cls for part in module.modules() for cls in type(part).__mro__ if _package(cls) not in _TORCH | _OUTSIDE}
    methods = [f for cls in classes for f in vars(cls).values() if isinstance(f, FunctionType)]
    for scope in {id(f.__globals__): f.__globals__ for f in methods}.values():
        names = [name for name, value in scope.items() if type(value) in _SHOWN and not name.startswith("_")]
        yield from ((name, partial(scope.get, name), partial(scope.__setitem__, name)) for name in names)
    for f in methods:
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            if type(_content(cell)) in _SHOWN:
                yield name, partial(_content, cell), partial(setattr, cell, "cell_contents")


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is assigned yet
        return cell


class _Noting(logging.Handler):
    """Notes that something was logged."""

    def __init__(self, found: set[str]) -> None:
        super().__init__(logging.INFO)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.add("logs")


class _Swallowing(TextIOBase):
    """Notes that something was printed."""

    def __init__(self, found: set[str]) -> None:
        self._found = found

    def write(self, text: str) -> int:
        self._found.add("prints")
        return len(text)
