"""What a step reads and does outside of its module: global variables, variables of closures, prints, logs."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from fedlight.module.state import _OUTSIDE, _PLAIN, _TORCH, _items, _package, _put_back


@contextmanager
def seen_outside(module: nn.Module, found: set[str]) -> Iterator[None]:
    """Note in ``found`` what is printed, logged and changed of the variables that the module's methods see; undo it."""
    before, printed, handler = variables(module), StringIO(), logging.Handler(logging.INFO)
    handler.emit = lambda record: found.add("logs")  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        with redirect_stdout(printed):
            yield
    finally:
        logging.getLogger().removeHandler(handler)
        if printed.getvalue():
            found.add("prints")
        for variable, (value, content) in before.items():
            if not _same(variable.get(), value):
                found.add(f"changes the variable {variable.name}")
                variable.put(value)
            if not _alike(content, _inside(value)):
                found.add(f"changes the variable {variable.name}")
                if not isinstance(value, Tensor):
                    _put_back(_container(value), content)


class _Variable:
    """A name in a scope, how it is read and set."""

    def __init__(self, name: str, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        self.name, self.get, self.put = name, get, put


def variables(module: nn.Module, used: bool = False) -> dict[_Variable, tuple[Any, dict[Any, Any]]]:
    """The variables that the methods of the user's classes see (or use), each with its value and what is in it."""
    classes = {cls for part in module.modules() for cls in type(part).__mro__ if _package(cls) not in _TORCH | _OUTSIDE}
    methods = [f for cls in classes for f in vars(cls).values() if isinstance(f, FunctionType)]
    found, names_used = [], {name for f in methods for name in _names(f.__code__)} if used else None
    for scope in {id(f.__globals__): f.__globals__ for f in methods}.values():
        names = [n for n in scope if not n.startswith("__") and (names_used is None or n in names_used)]
        found += [_Variable(name, partial(scope.get, name), partial(scope.__setitem__, name)) for name in names]
    for f in methods:
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            found.append(_Variable(name, partial(_content, cell), partial(setattr, cell, "cell_contents")))
    held = {variable: variable.get() for variable in found}
    kinds = (*_PLAIN, Tensor)
    return {v: (x, _inside(x)) for v, x in held.items() if isinstance(x, kinds) or _container(x) is not None}


def differ(before: dict[_Variable, tuple[Any, dict[Any, Any]]]) -> bool:
    """Whether a variable has another value, or something else in it, than when :func:`variables` looked."""
    held = before.items()
    return any(not (_same(name.get(), value) and _alike(content, _inside(value))) for name, (value, content) in held)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _container(value: Any) -> Any:
    """What holds the parts of a value: itself, or its attributes; None where it has none that are looked at."""
    if isinstance(value, list | dict | set | deque):
        return value
    cls = type(value)
    own = _package(cls) not in _TORCH | _OUTSIDE and not isinstance(value, type | FunctionType | ModuleType | nn.Module)
    return vars(value) if own and hasattr(value, "__dict__") else None


def _same(now: Any, before: Any) -> bool:
    return now is before or (isinstance(before, _PLAIN) and type(now) is type(before) and bool(now == before))


def _inside(value: Any) -> dict[Any, Any]:
    """What is in a value; of a tensor, how often it was written to."""
    if isinstance(value, Tensor):
        return {} if value.is_inference() else {"writes": value._version}
    container = _container(value)
    return {} if container is None else dict(_items(container))


def _alike(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return len(one) == len(other) and all(k in other and _same(other[k], v) for k, v in one.items())


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is assigned yet
        return None
