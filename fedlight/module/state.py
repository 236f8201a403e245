"""What a step can change of a module besides its trained parameters: captured, compared, put back."""

import pickle
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import isgenerator
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from fedlight.module.logs import _ALONE
from fedlight.seeding import preserved_global_rng

_TORCH = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "fedlight", "torchvision", "torchmetrics"}
_OUTSIDE = sys.stdlib_module_names - {"types", "queue", "argparse"} | {"wandb", "tensorboard", "numpy"}
_OWN = vars(LightningModule()).keys() - {"training"} | {"log", "__dict__", "__weakref__", *_ALONE}
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_COPIED = 2**28
"""At least so many bytes of tensors and arrays are copied; of what exceeds them only changes are seen."""


class ModuleState:
    """Attributes, recursively, as they are now: to see what changes, and to undo it.

    Objects, lists, dictionaries, tensors, arrays and generators stay the objects that they are, and with them shared
    references and cycles; their content is put back. What torch and Lightning own, datasets and loggers are left out,
    and tensors that ``skip`` gives, whose content is looked after elsewhere.
    """

    def __init__(self, roots: dict[str, Any], skip: Callable[[], Iterable[Tensor]] = tuple) -> None:
        self._roots, self._skip = roots, skip
        self._tensors: list[_Kept] = []
        self.capture()

    def refresh(self) -> None:
        """Capture anew where something has changed."""
        if not self.unchanged():
            self.capture()

    def unchanged(self) -> bool:
        """Whether nothing was assigned or written, in a few microseconds; it may say no where the values are equal."""
        now = list(chain.from_iterable(self._views))
        return (
            len(now) == len(self._values)
            and all(map(is_, now, self._values))
            and [(k.tensor._version, k.tensor.data_ptr()) for k in self._tensors] == self._writes
            and all(torch.equal(torch.cat(parts).view(torch.uint8), bits) for parts, bits in self._samples)
            and all(get() == state for _, get, _, state in self._others)
        )

    def changes(self) -> list[str]:
        """Names of what differs from the capture in value."""
        found = [kept.name for kept in self._tensors if kept.differs()]
        found += [name for name, get, _, state in self._others if get() != state]
        for name, container, held, dotted in self._containers:
            now = _items(container)
            keys = [k for k in held | now if not (k in held and k in now and _same(held[k], now[k]))]
            found += [_named(name, k, dotted) for k in keys if not (dotted and k in _OWN)]
        return sorted({name.partition("[")[0] for name in found})

    def moved(self) -> list[Tensor]:
        """The tensors whose content has changed."""
        return [kept.tensor for kept in self._tensors if kept.differs()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; an error names what cannot be."""
        if self.unchanged():
            return
        for _, container, held, _ in self._containers:
            now = _items(container)
            if len(now) != len(held) or not all(map(is_, now.values(), held.values())):
                _put_back(container, held)
        for kept in self._tensors:
            kept.restore()
        for name, get, put, state in self._others:
            if get() != state:
                if put is None:
                    raise _lost(name)
                put(state)
        self._note()

    def capture(self) -> None:
        """Take everything as it is now."""
        self._containers: list[tuple[str, Any, dict[Any, Any], bool]] = []
        self._others: list[tuple[str, Callable[[], Any], Callable[[Any], Any] | None, Any]] = []
        before, self._tensors = {id(kept.tensor): kept for kept in self._tensors}, []
        parameters = [p for m in self._roots.values() if isinstance(m, nn.Module) for p in m.parameters()]
        self._room = max(_COPIED, 8 * sum(p.nbytes for p in parameters if p.requires_grad))
        seen: dict[int, Any] = {id(t): t for t in self._skip()}
        stack = list(self._roots.items())
        while stack:
            name, value = stack.pop()
            if id(value) in seen:
                continue
            seen[id(value)] = value
            if isinstance(value, Tensor):
                if value.layout == torch.strided and not value.is_inference():
                    old = before.get(id(value))
                    self._tensors.append(_Kept(name, value, self._fits(value)) if old is None or old.touched() else old)
            elif (other := _other(value, self._fits)) is not None:
                self._others.append((name, *other, other[0]()))
                stack += [(name, getattr(value, n)) for n in getattr(value, "__slots__", ()) if hasattr(value, n)]
            else:
                for container, dotted in _parts(value):
                    held = dict(_items(container))
                    self._containers.append((name, container, held, dotted))
                    inner = [k for k, v in held.items() if type(v) not in _PLAIN and not (dotted and k in _OWN)]
                    stack += [(_named(name, k, dotted), held[k]) for k in inner]
        self._note()

    def _fits(self, value: Any) -> bool:
        self._room -= value.nbytes
        return self._room >= 0 or (isinstance(value, Tensor) and value.requires_grad)

    def _note(self) -> None:
        """What the quick look compares with."""
        held = [vars(c) if isinstance(c, type) else c for _, c, _, _ in self._containers]
        self._views = [c if isinstance(c, list | deque | set) else c.values() for c in held]
        self._values = list(chain.from_iterable(self._views))
        groups: dict[Any, list[Tensor]] = {}
        for kept in self._tensors:
            kept.note()
            groups.setdefault((kept.alias.device, kept.alias.dtype), []).append(kept.look)
        self._writes = [kept.writes for kept in self._tensors]
        self._samples = [(parts, torch.cat(parts).view(torch.uint8)) for parts in groups.values()]


class _Kept:
    """A tensor's content: a copy, and what shows that it was written: version, address, values (`.data`)."""

    def __init__(self, name: str, tensor: Tensor, copied: bool) -> None:
        self.name, self.tensor, self.alias = name, tensor, tensor.detach()
        self.copy = self.alias.to("cpu", copy=True) if copied else None
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        count = min(16, extent) if tensor.numel() else 0
        self.look = self.alias.as_strided((count,), (max(1, (extent - 1) // max(1, count - 1)),))
        self.note()

    def note(self) -> None:
        self.writes, self.sample = (self.tensor._version, self.tensor.data_ptr()), self.look.clone()

    def touched(self) -> bool:
        return (self.tensor._version, self.tensor.data_ptr()) != self.writes or not _same(self.look, self.sample)

    def differs(self) -> bool:
        return self.touched() and (self.copy is None or not _same(self.copy, self.tensor.detach().cpu()))

    def restore(self) -> None:
        if self.differs():
            if self.copy is None:
                raise _lost(self.name)
            self.tensor.data = self.alias
            self.alias.copy_(self.copy)


def attributes_of(module: nn.Module) -> ModuleState:
    """What a module has apart from the content of parameters and buffers."""
    return ModuleState({"self": module}, lambda: [*module.parameters(), *module.buffers()])


@contextmanager
def untouched(module: nn.Module) -> Iterator[ModuleState]:
    """Whatever is done inside is undone on exit: all of the module, and the global random generators."""
    state, flags = ModuleState({"self": module}), [(p, p.requires_grad) for p in module.parameters()]
    try:
        with preserved_global_rng():
            yield state
    finally:
        state.restore()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _named(name: str, key: Any, attribute: bool) -> str:
    return f"{name}.{key}" if attribute else f"{name}[{key!r}]" if type(key) in _PLAIN else f"{name}[...]"


def _lost(name: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"model: {name} changes while a client trains, and cannot be put back for the next one: it is an iterator, or"
        " too large to be copied. Make it a buffer (register_buffer), or make it anew in on_client_start."
    )


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _parts(value: Any) -> list[tuple[Any, bool]]:
    """The containers that make up an object, and whether what is in them are attributes."""
    cls = type(value)
    if isinstance(value, nn.Module):
        mine = [c for c in cls.__mro__ if _package(c) not in _TORCH | _OUTSIDE]
        held = [vars(value).get(name) for name in ("_parameters", "_buffers", "_modules")]
        return [(part, True) for part in (vars(value), *mine, *held) if isinstance(part, dict | type)]
    if isinstance(value, tuple | frozenset):
        return [(list(value), False)]
    parts = [(value, False)] if isinstance(value, dict | list | deque | set) else []
    foreign = _package(cls) in _OUTSIDE or ({*map(_package, cls.__mro__)} & _TORCH and not isinstance(value, Optimizer))
    return parts if foreign or not hasattr(value, "__dict__") else [*parts, (vars(value), True)]


def _items(container: Any) -> dict[Any, Any]:
    """What is in a container, by attribute, key or position."""
    if isinstance(container, type):
        return dict(vars(container))
    if isinstance(container, dict):  # those of other libraries may make what they are asked for
        return {key: dict.__getitem__(container, key) for key in container}
    return dict.fromkeys(container) if isinstance(container, set) else dict(enumerate(container))


def _put_back(container: Any, held: dict[Any, Any]) -> None:
    if isinstance(container, type):
        for name in vars(container).keys() - held.keys():
            delattr(container, name)
        for name in [name for name, value in held.items() if vars(container).get(name) is not value]:
            setattr(container, name, held[name])
    elif isinstance(container, dict):
        base: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        base.clear(container)
        base.update(container, held)
    else:
        container.clear()
        container.update(held) if isinstance(container, set) else container.extend(held.values())


def _other(value: Any, fits: Callable[[Any], bool]) -> tuple[Callable[[], Any], Callable[[Any], Any] | None] | None:
    """How to read the state of what is neither tensor nor container, and how to set it; None where there is none."""
    if isinstance(value, np.ndarray) and not isinstance(value, np.memmap):
        copy, step = value.copy() if fits(value) else None, max(1, value.nbytes // 2**16)
        return lambda: value.flat[::step].tobytes(), None if copy is None else lambda _: np.copyto(value, copy)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate, value.setstate
    if isinstance(value, np.random.Generator | np.random.RandomState):
        bits: Any = getattr(value, "bit_generator", None) or value._bit_generator  # type: ignore[union-attr]
        return lambda: pickle.dumps(bits.state), lambda state: setattr(bits, "state", pickle.loads(state))
    if isinstance(value, torch.Generator):
        read, write = value.get_state, value.set_state
        return lambda: read().numpy().tobytes(), lambda s: write(torch.frombuffer(bytearray(s), dtype=torch.uint8))
    if isgenerator(value) or (isinstance(value, Iterator) and _package(type(value)) in ("builtins", "itertools")):
        return lambda: _position(value), None
    return _slots(value)


def _slots(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """The same for an object whose attributes are in slots."""
    cls = type(value)
    if hasattr(value, "__dict__") or isinstance(value, Iterable) or _package(cls) in _TORCH | _OUTSIDE:
        return None
    declared = [getattr(c, "__slots__", ()) for c in cls.__mro__]
    names = [n for found in declared for n in ([found] if isinstance(found, str) else found) if hasattr(value, n)]
    held = {name: getattr(value, name) for name in names}

    def put(_: Any) -> None:
        for name, old in held.items():
            object.__setattr__(value, name, old)

    return (lambda: [id(getattr(value, name, None)) for name in names], put) if names else None


def _position(value: Any) -> Any:
    """Where an iterator has come to, as far as it can be told."""
    if isgenerator(value):
        frame = value.gi_frame
        return None if frame is None else (frame.f_lasti, [v for v in frame.f_locals.values() if type(v) in _PLAIN])
    if isinstance(value, Iterator):
        return _position(value.__reduce__()[1:])
    return tuple(map(_position, value)) if isinstance(value, tuple) else value if type(value) in _PLAIN else id(value)


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, tensors and arrays to the bit."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return alike and torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, other)))
    if isinstance(one, np.ndarray):
        return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_same, one.values(), other.values()))
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) in (*_PLAIN, set) and (one == other) is True
