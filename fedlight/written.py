"""Live objects as YAML has them: a class, and what it was made with."""

import enum
import inspect
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from typing import Any, Self

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fedlight.penalties.numbers import settings_of

Lost = dict[str, str]
"""What cannot be written, by its key, and why."""
_PLAIN = (bool, int, float, str)
_NOT_MADE_AGAIN = (nn.Module, LightningDataModule, Dataset, DataLoader)


class Remembers:
    """Objects of a class below this one know what they were made with."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the arguments as YAML would have them, no more: data are not held by it."""
        made, lost, names = super().__new__(cls), Lost(), arguments(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(made, *args, **kwargs)
        except TypeError:  # __init__ will say it better
            return made
        bound.apply_defaults()
        if any(bound.arguments[p.name] for p in bound.signature.parameters.values() if p.kind is p.VAR_POSITIONAL):
            lost[""] = f"a {cls.__name__} is made with *args"
        given = {name: value for name, value in {**bound.arguments, **bound.kwargs}.items() if name in names}
        made.__dict__["_made_with"] = {name: written(value, f".{name}", lost) for name, value in given.items()}, lost
        return made


def written(value: Any, key: str, lost: Lost) -> Any:
    """A value as YAML has it under a key (``model.net``); an object as its class and what it was made with.

    ``lost`` receives what cannot be written, and why.
    """
    value = value.item() if isinstance(value, np.generic) else settings_of(value) or value
    if value is None or type(value) in _PLAIN:
        return value
    if isinstance(value, PurePath | enum.Enum):
        return value.name if isinstance(value, enum.Enum) else str(value)
    if isinstance(value, Mapping):
        return {str(k): written(v, f"{key}.{k}", lost) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [written(v, f"{key}.{i}", lost) for i, v in enumerate(value)]
    if isinstance(value, partial) and not value.args:
        return {"class_path": _path(value.func, key, lost), "init_args": written(value.keywords, key, lost)}
    if isinstance(value, type) or inspect.isroutine(value):
        path = _path(value, key, lost)
        return {"class_path": path} if isinstance(value, type) and issubclass(value, nn.Module) else path
    args, missing = _made_with(value) if key.count(".") < 12 else ({}, {"": "objects that hold each other"})
    path = _path(type(value), key, lost)
    lost |= {f"{key}{name}": why for name, why in missing.items()}
    return {"class_path": path, **({"init_args": args} if args else {})}


def _made_with(value: Any) -> tuple[dict[str, Any], Lost]:
    """What it remembers, or hyperparameters and attributes of an argument's name if the same can be made of them."""
    cls: Any = type(value)
    taken = sorted(arguments(cls))
    held = {**getattr(value, "__dict__", {}), **getattr(value, "_modules", {})}
    if "_made_with" in held:
        args, missing = held["_made_with"]
        # A number or word that was set anew since then is what it is now.
        return args | {k: held[k] for k, v in args.items() if v is not None and type(held.get(k)) in _PLAIN}, missing
    if not hasattr(value, "__dict__") or "*" in taken or cls.__new__ is not object.__new__:  # as tensors
        return {}, {"": f"a {cls.__name__} does not tell what it was made with"}
    held |= getattr(value, "hparams", {})
    names = {name: k for name in taken for k in (f"_{name}", name) if k in held}
    lost = Lost()
    if absent := [name for name in taken if name not in names]:
        some = f"{', '.join(absent[:3])}{f' and {len(absent) - 3} more' if len(absent) > 3 else ''}"
        lost[""] = f"a {cls.__name__} keeps {some} neither in hparams nor as attributes of that name"
    args = {name: written(held[k], f".{name}", lost) for name, k in names.items()}
    if not lost and not isinstance(value, _NOT_MADE_AGAIN):
        try:
            again = vars(cls(**{name: held[k] for name, k in names.items()}))
        except Exception:
            again = {}
        if args != {name: written(again.get(k), "", {}) for name, k in names.items()}:
            lost[""] = f"a {cls.__name__} that is made with its attributes would be another one"
    return args, lost


def arguments(cls: type) -> list[str]:
    """Names of what a class is made with, and of what it hands on to its bases; ``*`` for any number of things."""
    found: dict[str, None] = {}
    for base in cls.__mro__:
        if inspect.isfunction(init := vars(base).get("__init__")):
            taken = list(inspect.signature(init).parameters.values())[1:]
            found |= {p.name: None for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            if all(p.kind is not p.VAR_KEYWORD for p in taken):
                return [*found, *("*" for p in taken if p.kind is p.VAR_POSITIONAL)]
    return [*found]


def _path(value: Any, key: str, lost: Lost) -> str:
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", type(value).__name__)
    there: Any = sys.modules.get(module)
    for part in name.split("."):
        there = getattr(there, part, None)
    if "<lambda>" in name:
        lost[key] = "a lambda; functools.partial of a class can be written"
    elif module == "__main__" or there is not value:
        where = "the program itself" if module == "__main__" else "a function" if "<locals>" in name else "no module"
        lost[key] = f"{name} is defined in {where}, and cannot be imported"
    return f"{module}.{name}"
