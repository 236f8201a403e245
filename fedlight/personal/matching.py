"""Which tensors of a module a name, a regular expression or a type of module means."""

import re
from collections.abc import Iterable
from pkgutil import resolve_name

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

_SHOWN = 24


def tensor_names(module: nn.Module) -> dict[str, int]:
    """All names of a module's parameters and buffers, tied ones included, and which tensor each is."""
    parameters, buffers = (f(remove_duplicate=False) for f in (module.named_parameters, module.named_buffers))
    return {name: id(tensor) for name, tensor in (*parameters, *buffers)}


def matching(module: nn.Module, patterns: Iterable[str], key: str) -> set[str]:
    """Names of the parameters and buffers of what the patterns mean.

    Args:
        module: the module.
        patterns: of each the first that there is: a module or tensor of that name; ``head``, the last module that has
            parameters, or ``body``, all others; modules and tensors whose whole name a regular expression matches;
            modules of a class of that name or import path, or that inherit from one.
        key: where they were given.

    Raises:
        MisconfigurationException: if one means nothing, saying what there is.
    """
    found: set[str] = set()
    for pattern in patterns:
        if not (names := _matching(module, pattern)):
            there = [_plain(n) for n, m in module.named_modules() if n and any(True for _ in m.parameters())]
            some = f"{', '.join(there[:_SHOWN])}{' ...' if len(there) > _SHOWN else ''}"
            raise MisconfigurationException(
                f"{key}: {pattern!r} means nothing in {type(module).__name__}: no module or parameter has such a name,"
                f" and no module is of such a class. There are {some}. `fedlight configs personal` lists what has a"
                " name of its own."
            )
        found |= names
    return found


def _matching(module: nn.Module, pattern: str) -> set[str]:
    tensors, modules = tensor_names(module), dict(module.named_modules(remove_duplicate=False))
    wanted = _plain(pattern)

    def below(names: Iterable[str]) -> set[str]:
        starts = tuple(f"{n}." for n in names)
        return {t for t in tensors if starts and t.startswith(starts)}

    same = below(n for n in modules if n and _plain(n) == wanted) | {t for t in tensors if _plain(t) == wanted}
    if same or pattern in ("head", "body"):
        own = [n for n, m in modules.items() if any(p.requires_grad for p in m.parameters(recurse=False))]
        last = {t for t in tensors if own and t.rpartition(".")[0] == own[-1]}
        return same or (last if pattern == "head" else tensors.keys() - last)
    try:
        means = re.compile(pattern).fullmatch
    except re.error:
        means = re.compile(re.escape(pattern)).fullmatch
    same = below(n for n in modules if n and means(_plain(n))) | {t for t in tensors if means(_plain(t))}
    return same or below(n for n, m in modules.items() if n and _is_a(m, pattern))


def _is_a(module: nn.Module, name: str) -> bool:
    if "." not in name:
        return any(cls.__name__.removeprefix("_") == name for cls in type(module).__mro__ if cls is not nn.Module)
    try:
        cls = resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return False
    return isinstance(cls, type) and isinstance(module, cls)


def _plain(name: str) -> str:
    """A name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")
