"""A device that every machine has: what would end in an error, or wait, on a GPU does so here.

Tensors on ``meta`` get numbers, which lie in ordinary memory beside their storage. Every operation of torch's looks
where its arguments are, as it would with a GPU, and computes on the CPU; so the results have the CPU's bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import fedlight.run.setup
from fedlight.run.checkpoint import CheckpointWriter

ELSEWHERE = torch.device("meta")
_MOVES = ("_to_copy", "copy_")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
"""What takes indices of the CPU for a tensor on a GPU."""
_ALIKE = ("cat", "stack", "index_select", "gather", "mm", "addmm", "bmm")
"""What does not take a number of the CPU, as others do."""
_RESHAPES = ("resize_", "set_", "resize_as_", "squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_", "detach_")
_WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "_unique2")


def is_elsewhere(tensor: Any) -> bool:
    """Whether a value is a tensor of that device."""
    return isinstance(tensor, Tensor) and tensor.device == ELSEWHERE


class Elsewhere(TorchDispatchMode):
    """Inside, ``meta`` is a device with numbers. ``waits`` are the operations for which the CPU would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._held: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def _behind(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor, on the CPU."""
        _, storage = self._held[tensor.untyped_storage()._cdata]
        out = torch.empty(0, dtype=tensor.dtype)
        return out.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _moved(self, found: Tensor) -> Tensor:
        found = found.clone() if found.storage_offset() else found
        there = torch.empty_strided(found.size(), found.stride(), dtype=found.dtype, device=ELSEWHERE)
        storage = there.untyped_storage()  # kept, so that no other has its address
        self._held[storage._cdata] = storage, found.untyped_storage()
        return there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, spec = tree_flatten((args, kwargs or {}))
        to = (kwargs or {}).get("device")
        there = [value for value in flat if is_elsewhere(value)]
        if not there and (to is None or torch.device(to) != ELSEWHERE):
            return func(*args, **kwargs or {})
        name, schema = func._schema.name.partition("::")[2], func._schema
        self._check(name, flat, args)
        leaves = to is not None and torch.device(to) != ELSEWHERE
        if leaves or name in _WAITS:
            self.waits.append(name)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        if name in _RESHAPES or (not writes and any(r.alias_info is not None for r in schema.returns)):
            return func(*args, **kwargs or {})  # a view: the storage is the same
        behind = {id(value): self._behind(value) for value in there}
        here = [torch.device("cpu") if isinstance(v, torch.device) else behind.get(id(v), v) for v in flat]
        cpu_args, cpu_kwargs = tree_unflatten(here, spec)
        found = func(*cpu_args, **cpu_kwargs)
        given = {id(behind[id(value)]): value for value in there} | {id(v): v for v in flat if isinstance(v, Tensor)}
        return tree_map_only(
            Tensor, lambda out: given[id(out)] if id(out) in given else out if leaves else self._moved(out), found
        )

    @staticmethod
    def _check(name: str, flat: list[Any], args: Any) -> None:
        """Refuse what a GPU would refuse."""
        if any(isinstance(value, torch.Generator) for value in flat):
            raise RuntimeError(f"{name}: expected a generator of the device, and got one of the CPU")
        here = [v for v in flat if isinstance(v, Tensor) and v.device != ELSEWHERE]
        if not here or name in _MOVES:
            return
        values = args[2] if name in _INDEXED and len(args) > 2 else None
        indices = is_elsewhere(args[0]) and (values is None or is_elsewhere(values) or values.ndim == 0)
        numbers = all(v.ndim == 0 for v in here) and name not in _ALIKE and any(map(is_elsewhere, flat))
        if not (indices if name in _INDEXED else numbers):
            raise RuntimeError(f"{name}: expected all tensors on one device, and got shapes {[v.shape for v in flat]}")


class _FromData(TorchFunctionMode):
    """What makes tensors of Python's numbers would leave those on ``meta`` without any: it makes them on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            to, index = args[0].device, args[1]
            index = tuple(_indices(i, to) for i in index) if isinstance(index, tuple) else _indices(index, to)
            return func(args[0], index, *args[2:])
        if func is Tensor.new_tensor:
            kwargs = {"device": args[0].device, "dtype": args[0].dtype, **kwargs}
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            to, grad = kwargs.pop("device"), kwargs.pop("requires_grad", False)
            return func(*args, **kwargs).to(to).requires_grad_(grad)
        return func(*args, **kwargs)


def _indices(index: Any, device: torch.device) -> Any:
    return torch.tensor(index).to(device) if isinstance(index, list) else index


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """It needs nothing."""


class _Strategy(SingleDeviceStrategy):
    def setup_environment(self) -> None:
        """It needs nothing."""


def _fabric(accelerator: str, devices: Any, strategy: Any, **settings: Any) -> Fabric:
    return Fabric(strategy=_Strategy(device=ELSEWHERE, accelerator=_Accelerator()), **settings)


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **settings: Any) -> None:
        super().__init__("cpu" if device_type == ELSEWHERE.type else device_type, *args, **settings)


@contextmanager
def elsewhere() -> Iterator[Elsewhere]:
    """Inside, every trainer that is asked for a CPU trains on that device."""
    mode, write, address = Elsewhere(), CheckpointWriter._write, torch.UntypedStorage.data_ptr

    def written(self: CheckpointWriter, *args: Any) -> None:
        with mode, _FromData():  # which hold for a thread
            write(self, *args)

    AcceleratorRegistry.register(ELSEWHERE.type, _Accelerator)
    try:
        with (
            patch.object(fedlight.run.setup, "Fabric", _fabric),
            patch.object(CheckpointWriter, "_write", written),
            patch.object(torch, "autocast", _Autocast),
            patch.object(torch.UntypedStorage, "data_ptr", lambda storage: address(storage) or storage._cdata),
            mode,
            _FromData(),
        ):
            yield mode
    finally:
        AcceleratorRegistry.remove(ELSEWHERE.type)
