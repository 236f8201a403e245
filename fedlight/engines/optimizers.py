"""How torch's optimizers take a step, on the flat vector or by fused kernels, and their state as named vectors."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop
from torch.optim import optimizer as torch_optimizer

from fedlight.local import LocalObjective
from fedlight.module.optimizers import configure_optimizers
from fedlight.module.parameters import FlatParameters
from fedlight.perturbations.base import State

FUSED = (SGD, Adam, AdamW)
"""Optimizers that have a fused kernel for every kind of device: one for all parameters, whose lr may be a tensor."""


def fuse(optimizer: Optimizer, device: torch.device) -> bool:
    """Let an optimizer use its fused kernel; false where it has none.

    The kernel reads a learning rate that is a tensor as float32; a number gives the same bits if it is rounded so.
    """
    if type(optimizer) not in FUSED or any(g["differentiable"] for g in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False
        if "capturable" in group:
            group["capturable"] = device.type == "cuda"
    # What `fused=True` would set: gradient scalers then leave it to the kernel to skip a step that overflows.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return True


def begin_momentum(optimizer: Optimizer) -> None:
    """Give a fused SGD momentum that is zero.

    Torch leaves it uninitialised where the first step is one that a gradient scaler skips. Without dampening a first
    step from zero has the same bits as one without momentum to start from.
    """
    for group in optimizer.param_groups if isinstance(optimizer, SGD) else ():
        if group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def float32(value: float) -> float:
    """The nearest number that float32 has."""
    return torch.tensor(value, dtype=torch.float32).item()


ENTRYWISE = (SGD, Adadelta, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop, Rprop)
"""Optimizers that treat every entry by itself, and so do not mind where a parameter ends."""


class FlatStep:
    """Takes an optimizer's steps; parameters of a group that are neighbours in the vector are one tensor to it.

    That gives the same bits, as every entry is treated by itself, in a fraction of the time that many small tensors
    take. Outside of a step the optimizer looks as ever, apart from its state; :meth:`release` gives that, too, the form
    that it has in torch. Where the optimizer is of another kind, or somebody has put a hook on its step, it is stepped
    as it is. So it is where the last entries of a tensor may be rounded otherwise than those before (fused kernels, and
    16-bit parameters, on a CPU), and on other devices, where the kernels are few anyway.
    """

    def __init__(self, optimizer: Optimizer, flat: FlatParameters) -> None:  # a new one, without state
        self._optimizer, self._flat = optimizer, flat
        self._pieces: list[list[Tensor]] | None = None
        if _can_be_flat(optimizer, flat.params):
            self._pieces = [flat.pieces(group["params"]) for group in optimizer.param_groups]
            self._step = inspect.unwrap(type(optimizer).step)  # without the marks for a profiler around it
            for group in optimizer.param_groups:
                group["foreach"] = False  # as torch decides on a CPU, anew in each step

    def __call__(self) -> None:
        """Take a step."""
        optimizer = self._optimizer
        if self._pieces is not None:
            hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
            if hooks or torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks:
                self.release()
        if self._pieces is None:
            self._optimizer.step()
            return
        groups = self._optimizer.param_groups
        own = [group["params"] for group in groups]
        for group, pieces in zip(groups, self._pieces, strict=True):
            group["params"] = pieces
        try:
            with torch.no_grad():
                self._step(self._optimizer)
        finally:
            for group, params in zip(groups, own, strict=True):
                group["params"] = params

    def release(self) -> None:
        """From now on the optimizer has a state for each parameter, and is stepped as it is."""
        if self._pieces is None:
            return
        for group, pieces in zip(self._optimizer.param_groups, self._pieces, strict=True):
            spans = {id(p): self._flat.spans[id(p)] for p in group["params"] if id(p) in self._flat.spans}
            for piece in pieces:
                state, begin = self._optimizer.state.pop(piece, {}), piece.storage_offset()
                for parameter in group["params"] if state else ():
                    first, last = spans.get(id(parameter), (0, 0))
                    if begin <= first < last <= begin + piece.numel():
                        self._optimizer.state[parameter] = {
                            name: _part(value, piece, slice(first - begin, last - begin), parameter)
                            for name, value in state.items()
                        }
        self._pieces = None


def is_plain(optimizer: Optimizer) -> bool:
    """Whether a new optimizer does what its class does: no hooks, no other step, and no state that somebody has set."""
    held = vars(optimizer)  # those around others may not have all that torch's have
    step = held.get("step")  # a scheduler puts its own in its place, to see whether it was called
    hooks = held.get("_optimizer_step_pre_hooks") or held.get("_optimizer_step_post_hooks")
    own = hooks or not (step is None or hasattr(step, "_wrapped_by_lr_sched"))
    return not own and (not optimizer.state or type(optimizer) is Adagrad)  # which makes it at once


def _can_be_flat(optimizer: Optimizer, params: Tensor) -> bool:
    return (
        type(optimizer) in ENTRYWISE
        and (params.device.type == "cpu" and params.dtype.itemsize >= 4)
        and is_plain(optimizer)
        and not any(group.get("fused") or group["differentiable"] for group in optimizer.param_groups)
        and not torch.autograd.profiler._is_profiler_enabled
    )


def _part(value: Any, piece: Tensor, where: slice, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value[where].view_as(parameter) if value.shape == piece.shape else value.clone()


class OptimizerState:
    """Writes and reads what an algorithm asks for of the optimizer's state, by torch's names; nothing without any.

    Raises:
        MisconfigurationException: if the module's optimizer does not have it, or has a state that begins otherwise.
    """

    def __init__(self, module: LightningModule, flat: FlatParameters, names: Sequence[str]) -> None:
        self._flat, self._names = flat, names
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        if names:
            self._make_state(configure_optimizers(module).optimizer)

    @torch.no_grad()
    def begin(self, optimizer: Optimizer, objective: LocalObjective) -> None:
        """Let a new optimizer begin with what is given, and with zeros where nothing is; it may drift from its way."""
        if self._names:
            self._make_state(optimizer)
        if (drift := objective.drift) is not None:
            optimizer.register_step_post_hook(lambda stepped, *_: self._move(stepped, drift))
        for name, value in objective.optimizer.items():
            views = self._flat.layout.views(value).values() if value.ndim else ()
            parts = list(views) or [value] * len(self._parameters)
            for parameter, part in zip(self._parameters, parts, strict=True):
                if name in (state := optimizer.state.get(parameter, {})):
                    state[name] = state[name].copy_(part) if isinstance(state[name], Tensor) else part.item()

    def _move(self, optimizer: Any, drift: Tensor) -> None:
        taken = 1 - getattr(optimizer, "found_inf", 0)  # a fused optimizer leaves out a step that overflows by itself
        self._flat.params.sub_(drift * (optimizer.param_groups[0]["lr"] * taken))

    def read(self, optimizer: Optimizer) -> State:
        """What is asked for, ``[P]`` each, or a scalar that all parameters share; 0 for parameters without state."""
        return {name: self._joined(optimizer, name) for name in self._names}

    def _joined(self, optimizer: Optimizer, name: str) -> Tensor:
        values = [optimizer.state.get(p, {}).get(name) for p in self._parameters]
        found = [torch.as_tensor(v) for v in values if v is not None]
        if all(v.ndim == 0 for v in found) and any(p.ndim for p in self._parameters):
            return found[0].detach().to(self._flat.params.device, copy=True)  # torch keeps `step` on the CPU
        both = zip(self._parameters, values, strict=True)
        return torch.cat([(torch.zeros_like(p) if v is None else v).detach().reshape(-1) for p, v in both])

    def _make_state(self, optimizer: Optimizer) -> None:
        """Torch makes the state in the first step: take one that changes nothing, and look at what there is then."""
        flat, before = self._flat, self._flat.params.clone()
        decays = [(group, group["weight_decay"]) for group in optimizer.param_groups if "weight_decay" in group]
        for group, _ in decays:
            group["weight_decay"] = 0.0
        flat.grad.zero_()
        flat.params.fill_(1.0)  # where the state is made of the parameters it shows
        optimizer.step()
        for group, decay in decays:
            group["weight_decay"] = decay
        flat.params.copy_(before)
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if name == "step":
                    state[name] = value * 0
                elif value is not None and (getattr(value, "shape", None) != parameter.shape or bool(value.any())):
                    raise _refused(optimizer, f"keeps {name}, which does not begin with zeros of the parameter's shape")
        held = sorted({name for state in optimizer.state.values() for name in state})
        if not {*self._names} <= {*held}:
            raise _refused(optimizer, f"keeps {held or 'none'}, and not {' and '.join(self._names)}")


def _refused(optimizer: Optimizer, found: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"algorithm: it asks for the optimizer's state, and {type(optimizer).__name__} of model.configure_optimizers"
        f" {found}. Use another optimizer, or another algorithm."
    )
