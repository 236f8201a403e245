"""The tensors that clients move besides trained parameters, and the attributes that they change."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import Metric

from fedlight.module.state import ModuleState, attributes_of


class Moving:
    """What of a module moves with a client besides its trained parameters: buffers, and parameters without gradient.

    Of these ``moving`` names those that are known so far. ``state`` is the module as all clients find it, and
    ``tensors`` are as they are registered between two clients. What else clients change is said once, unless it is
    ``told``.
    """

    def __init__(
        self, module: nn.Module, moving: Iterable[str] = (), state: ModuleState | None = None, told: bool = False
    ) -> None:
        self._module, self._state, self._told = module, state, told
        self._changes: bool | None = None
        self._touched = False
        self.tensors: dict[str, Tensor] = dict(module.named_buffers())
        self.add(moving)
        self._kinds = {name: _kind(tensor) for name, tensor in self.tensors.items()}
        held = [m._buffers for m in module.modules()]
        self._places = [(owner, key, tensor) for owner in held for key, tensor in owner.items() if tensor is not None]

    def add(self, names: Iterable[str]) -> None:
        """Hold these parameters as well."""
        self.tensors.update((name, self._module.get_parameter(name)) for name in names)

    def read(self) -> dict[str, Tensor]:
        """What they hold now, those that a step has replaced by others included.

        Raises:
            MisconfigurationException: if one has another shape or type, or is gone.
        """
        # TorchScript's have no `get`.
        held = [owner[key] if key in owner else None for owner, key, _ in self._places]  # noqa: SIM401
        replaced = {id(old): new for new, (_, _, old) in zip(held, self._places, strict=True) if new is not old}
        found = {n: value for n, t in self.tensors.items() if (value := replaced.get(id(t), t)) is not None}
        for name, kind in self._kinds.items():
            if name not in found or _kind(found[name]) != kind:
                now = _kind(found[name]) if name in found else "gone"
                raise MisconfigurationException(
                    f"model: buffer {name!r} was {kind} and is {now} after steps"
                    " of a client; buffers are averaged, so they keep their shape and type. Allocate the whole of it,"
                    " send a batch through it in setup, or keep it as a plain attribute."
                )
        return found

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put the tensors themselves back in their places, with these values."""
        for owner, key, tensor in self._places:
            if key not in owner or owner[key] is not tensor:
                owner[key] = tensor
        self.add(name for name in values if name not in self.tensors)  # in an order that all processes have
        for name, value in values.items():
            self.tensors[name].copy_(value)

    def finish(self) -> None:
        """Parameters without gradient that no client has moved before belong to the tensors from now on."""
        self._touched = self._state is not None and not self._state.unchanged()
        if self._state is not None and self._touched:
            names = {id(p): name for name, p in self._module.named_parameters()}
            self.add(names[id(tensor)] for tensor in self._state.moved() if id(tensor) in names)

    def forget(self) -> None:
        """The next client finds the module as this one did; :meth:`finish` has looked whether it changed."""
        if self._state is not None and self._touched:
            if not self._told:
                self._told = True
                others = [n for n, m in self._module.named_modules() if isinstance(m, Metric)]  # which begin anew
                known = tuple(f"self.{name}." for name in others), {f"self.{name}" for name in self.tensors}
                say_changed([n for n in self._state.changes() if not n.startswith(known[0]) and n not in known[1]])
            self._state.restore()
        self._changes = None

    def attributes(self) -> ModuleState | None:
        """The module's attributes, if clients change any: the first step of each client tells."""
        if self._changes is None:
            # Not by the quick look: while logs are collected, it sees that the module has another `log`.
            self._changes = self._state is not None and bool(self._state.changes())
        return attributes_of(self._module) if self._changes else None


def say_changed(names: Sequence[str]) -> None:
    """Say which attributes of a module do not go on from client to client, and from round to round."""
    if names:
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        rank_zero_info(f"model: steps change {some}: every client finds them as they were when the round began.")


def _kind(tensor: Tensor) -> tuple[list[int], torch.dtype]:
    return list(tensor.shape), tensor.dtype
