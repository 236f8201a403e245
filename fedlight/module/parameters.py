"""Flat parameters: a module's trainable parameters and their gradients as views into one vector each."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class ParameterInfo:
    """One trainable parameter and where it lies in the flat vector."""

    name: str
    shape: torch.Size
    offset: int
    owner: type[nn.Module]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.shape.numel()

    @property
    def is_norm(self) -> bool:
        """Whether it belongs to a normalisation layer: its class, or one above, is called so (``InstanceNorm2d``)."""
        return any(re.search(r"norm(\dd)?$", cls.__name__.lower()) for cls in self.owner.__mro__)

    @property
    def is_bias(self) -> bool:
        """Whether it is a bias, as ``bias_ih_l0`` and ``in_proj_bias`` are."""
        return "bias" in self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class ParameterLayout:
    """The order of a module's trainable parameters in the flat vector: that of ``named_parameters``, tied ones once."""

    parameters: tuple[ParameterInfo, ...]

    @classmethod
    def of(cls, module: nn.Module) -> "ParameterLayout":
        """The layout of ``module``.

        Raises:
            MisconfigurationException: if nothing is trainable, or parameters are complex or of several data types.
        """
        owners = {id(p): type(m) for m in module.modules() for p in m.parameters(recurse=False)}
        infos, offset, dtypes = list[ParameterInfo](), 0, dict[torch.dtype, str]()
        for name, parameter in module.named_parameters():
            if isinstance(parameter, nn.UninitializedParameter):
                raise MisconfigurationException(
                    f"model: parameter {name!r} is lazy and has no shape yet. Run one batch through the module, or give"
                    " its size, before training."
                )
            if not parameter.requires_grad:
                continue
            dtypes.setdefault(parameter.dtype, name)
            infos.append(ParameterInfo(name, parameter.shape, offset, owners[id(parameter)]))
            offset += parameter.numel()
        if not infos:
            raise MisconfigurationException("model: the module has no trainable parameter.")
        _check_types(dtypes)
        return cls(tuple(infos))

    @cached_property
    def numel(self) -> int:
        """P, the length of the flat vector."""
        return sum(info.numel for info in self.parameters)

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The vector's slices, shaped as the parameters. Leading batch dimensions are kept: ``[..., P]``."""
        lead = vector.shape[:-1]
        return {
            info.name: vector[..., info.offset : info.offset + info.numel].view((*lead, *info.shape))
            for info in self.parameters
        }

    def where(self, mask: Tensor) -> "ParameterLayout":
        """The layout of those parameters whose entries are true in a mask ``[P]``."""
        kept, offset = list[ParameterInfo](), 0
        for info in self.parameters:
            if bool(mask[info.offset : info.offset + info.numel].all()):
                kept.append(replace(info, offset=offset))
                offset += info.numel
        return ParameterLayout(tuple(kept))

    def check(self, module: nn.Module) -> None:
        """Refuse by name parameters that have been frozen or unfrozen since.

        Raises:
            MisconfigurationException: naming them.
        """
        before, now = {i.name for i in self.parameters}, {n for n, p in module.named_parameters() if p.requires_grad}
        if before != now:
            changed = [f"{n!r} was {'frozen' if n in before else 'unfrozen or added'}" for n in sorted(before ^ now)]
            raise MisconfigurationException(
                f"model: which parameters are trained has changed since training began: {', '.join(changed[:5])}"
                f"{' ...' if len(changed) > 5 else ''}. They are one vector for the server and all clients: freeze them"
                " in __init__, configure_model, setup or on_fit_start, and train in stages with one fit for each."
            )

    def mask(self, select: Callable[[ParameterInfo], bool]) -> Tensor:
        """A boolean vector ``[P]`` that is true where ``select`` holds for the parameter."""
        return torch.cat([torch.full((info.numel,), bool(select(info))) for info in self.parameters])


def _check_types(names: Mapping[torch.dtype, str]) -> None:
    """Refuse parameters of these types, by one's name, that one real vector cannot hold."""
    for dtype, name in names.items():
        if dtype.is_complex:
            raise MisconfigurationException(
                f"model: parameter {name!r} is complex, and sums over clients are real. Let it hold real numbers"
                " (torch.view_as_real), and take torch.view_as_complex of them where they are used."
            )
    if len(names) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in names.items())
        raise MisconfigurationException(
            f"model: trainable parameters must share one data type, found {found}. Use trainer.precision instead."
        )


class FlatParameters:
    """Rebinds a module's trainable parameters and gradients to views of :attr:`params` and :attr:`grad`, ``[P]`` each.

    A step of any torch optimizer on the module's parameters changes :attr:`params`, and a backward pass adds to
    :attr:`grad`, with no copy. Move the module to its device first. :meth:`release` gives the parameters storage of
    their own again.

    Attributes:
        layout: the order of the parameters.
        spans: where each of them begins and ends in the vector, by its ``id``.
        idle: those to which the last backward pass has added no gradient.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layout = ParameterLayout.of(module)
        self._all = list(module.parameters())  # to walk the module costs more than to look at them
        self._parameters = [p for p in self._all if p.requires_grad]
        self._flags = [p.requires_grad for p in self._all]
        with torch.no_grad():
            self.params = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        self.grad = torch.zeros_like(self.params)
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        values, gradients = (self.layout.views(flat).values() for flat in (self.params, self.grad))
        for parameter, value, gradient in zip(self._parameters, values, gradients, strict=True):
            parameter.data = value
            parameter.grad = gradient.data  # which counts by itself how often it is written to
            self._gradients.append((parameter, parameter.grad))
        self._writes, self.idle = [0] * len(self._gradients), list[nn.Parameter]()
        self._addresses = [p.data_ptr() for p in self._parameters]
        infos = zip(self._parameters, self.layout.parameters, strict=True)
        self.spans = {id(p): (info.offset, info.offset + info.numel) for p, info in infos}
        self._pieces: dict[tuple[int, ...], list[Tensor]] = {}

    def pieces(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The vector's parts, with their gradients, that these parameters fill; those that are not trained fill none.

        Parameters that are neighbours are one part. The same parameters give the same tensors.
        """
        key = tuple(map(id, parameters))
        if key not in self._pieces:
            joined: list[tuple[int, int]] = []
            for begin, end in sorted(self.spans[i] for i in key if i in self.spans):
                joined.append((joined.pop()[0] if joined and joined[-1][1] == begin else begin, end))
            self._pieces[key] = pieces = [self.params[begin:end] for begin, end in joined]
            for piece, (begin, end) in zip(pieces, joined, strict=True):
                piece.grad = self.grad[begin:end]
        return self._pieces[key]

    def check(self) -> None:
        """Refuse by name parameters that have been frozen, unfrozen or replaced: the vector would miss them.

        Raises:
            MisconfigurationException: naming them.
        """
        if [p.requires_grad for p in self._all] != self._flags:
            self.layout.check(self.module)
        if [p.data_ptr() for p in self._parameters] != self._addresses:
            both = zip(self.layout.parameters, self._parameters, self._addresses, strict=True)
            names = [info.name for info, p, address in both if p.data_ptr() != address]
            raise MisconfigurationException(
                f"model: the data of parameter {names[0]!r} is replaced while a client trains (`parameter.data = ...`),"
                " which the optimizer's step would not see. Write into it instead: `parameter.data.copy_(...)`."
            )

    def zero_grad(self) -> None:
        """The gradient is 0, and the parameters' gradients are its views, whatever has been put in their place."""
        self.grad.zero_()
        self.bind_grad()
        self._writes = [view._version for _, view in self._gradients]

    def bind_grad(self) -> None:
        """The parameters' gradients are the views of :attr:`grad`."""
        for parameter, view in self._gradients:
            if parameter.grad is not view:
                parameter.grad = view

    def gather_grad(self) -> Tensor:
        """:attr:`grad`, after a backward pass: modules may have put other gradients in place of its views."""
        self.idle = []
        for (parameter, view), writes in zip(self._gradients, self._writes, strict=True):
            if (other := parameter.grad) is None or (other is view and view._version == writes):
                self.idle.append(parameter)
            if other is not view:
                _ = view.zero_() if other is None else view.copy_(other)
                parameter.grad = view
        return self.grad

    def release(self) -> None:
        """Give every parameter its own storage and drop the gradients."""
        for parameter in self._parameters:
            parameter.data = parameter.detach().clone()
            parameter.grad = None


def unexpand(module: nn.Module) -> None:
    """Give every entry of expanded buffers and parameters (``Tensor.expand``) memory of its own, to be written to."""
    tensors = (*module.buffers(), *module.parameters())
    for tensor in (t for t in tensors if not is_lazy(t) and t.layout == torch.strided):
        if any(n > 1 and stride == 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)


def flat_parameters(module: nn.Module) -> Tensor:
    """A copy of the module's trainable parameters as one vector ``[P]``."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters() if p.requires_grad])


@torch.no_grad()
def load_flat_parameters(module: nn.Module, vector: Tensor, layout: ParameterLayout | None = None) -> None:
    """Write a flat vector ``[P]`` into the module's trainable parameters; ``layout`` saves looking for it.

    Raises:
        ValueError: if it has another length.
    """
    layout = layout or ParameterLayout.of(module)
    if vector.numel() != layout.numel:
        raise ValueError(f"The vector has {vector.numel()} entries, the module trains {layout.numel} parameters.")
    load_tensors(module, layout.views(vector))


@torch.no_grad()
def load_tensors(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into a module's parameters and buffers, by name."""
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())} if values else {}
    for name, value in values.items():
        tensors[name].copy_(value)
