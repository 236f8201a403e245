"""Which tensors of a module a name, a regular expression or a type of module means."""

import re
from collections.abc import Iterable
from contextlib import suppress
from pkgutil import resolve_name

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

_SHOWN = 24


def tensor_names(module: nn.Module) -> dict[str, int]:
    """All names of a module's parameters and buffers, tied ones included, and which tensor each is."""
    parameters, buffers = (f(remove_duplicate=False) for f in (module.named_parameters, module.named_buffers))
    return {name: id(tensor) for name, tensor in (*parameters, *buffers)}


def matching(module: nn.Module, patterns: Iterable[str], key: str) -> set[str]:
    """Names of the parameters and buffers of what the patterns mean, which were given under a ``key``.

    Of each pattern that is the first that there is: a module or tensor of that name; ``head``, the last module that has
    parameters, or ``body``, all others; modules and tensors whose whole name a regular expression matches; modules of a
    class of that name or import path, or that inherit from one.

    Raises:
        MisconfigurationException: if one means nothing, saying what there is, or they tear apart what is one tensor, or
            parameters and statistics of one layer.
    """
    found, tensors = set[str](), tensor_names(module)
    for pattern in patterns:
        if not (names := _meant(module, tensors, pattern)):
            there = [_plain(n) for n, m in module.named_modules() if n and any(True for _ in m.parameters())]
            there.sort(key=lambda name: not name.endswith(f".{pattern}"))
            raise MisconfigurationException(
                f"{key}: {pattern!r} means nothing in {type(module).__name__}: no module or parameter has such a name,"
                f" and no module is of such a class. There are {', '.join(there[:_SHOWN])}"
                f"{' ...' * (len(there) > _SHOWN)}. `fedlight configs personal` lists what has a name of its own."
            )
        found |= names
    own = {tensors[name] for name in found}
    if torn := sorted(name for name in tensors.keys() - found if tensors[name] in own):
        other = next(name for name in found if tensors[name] == tensors[torn[0]])
        why = "which the clients would share. Name both of them, or neither."
        raise MisconfigurationException(f"{key}: {patterns} takes {other}, and {torn[0]} is the same tensor, {why}")
    for norm in (n for n, m in module.named_modules() if getattr(m, "running_mean", None) is not None):
        direct = {t for t in tensors if t.rpartition(".")[0] == norm}
        if found & direct and direct - found:
            taken, left = (", ".join(sorted(names)) for names in (found & direct, direct - found))
            why = f"takes {taken} and leaves {left}, which belong together. Name {norm} itself."
            raise MisconfigurationException(f"{key}: {patterns} {why}")
    return found


def _meant(module: nn.Module, tensors: Iterable[str], pattern: str) -> set[str]:
    modules = dict(module.named_modules(remove_duplicate=False))
    plain = {n: _plain(n) for n in (*tensors, *modules) if n}
    found = {n for n in plain if plain[n] == pattern}
    if last := pattern in ("head", "body") and not found:
        found = {[n for n, m in modules.items() if any(p.requires_grad for p in m.parameters(recurse=False))][-1]}
    with suppress(re.error):
        found = found or {n for n in plain if re.fullmatch(pattern, plain[n])}
    found = found or {n for n, m in modules.items() if n and _is_a(m, pattern)}
    below = tuple(f"{n}." if n else "" for n in found)
    own = {t for t in tensors if t in found or (below and t.startswith(below))}
    return {*tensors} - own if last and pattern == "body" else own


def _is_a(module: nn.Module, name: str) -> bool:
    if "." not in name:
        return any(cls.__name__.removeprefix("_") == name for cls in type(module).__mro__ if cls is not nn.Module)
    with suppress(ImportError, AttributeError, ValueError):
        return isinstance(cls := resolve_name(name), type) and isinstance(module, cls)
    return False


def _plain(name: str) -> str:
    """A name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")
