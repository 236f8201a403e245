"""How torch's optimizers take a step: on the flat vector, in place of one on each parameter; by fused kernels."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adadelta, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop
from torch.optim import optimizer as torch_optimizer

from fedlight.module.parameters import FlatParameters

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
        if _has_hooks(self._optimizer):
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


def _has_hooks(optimizer: Optimizer) -> bool:
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks)


def _can_be_flat(optimizer: Optimizer, params: Tensor) -> bool:
    step = vars(optimizer).get("step")  # a scheduler puts its own in its place, to see whether it was called
    return (
        type(optimizer) in ENTRYWISE
        and (params.device.type == "cpu" and params.dtype.itemsize >= 4)
        and (step is None or hasattr(step, "_wrapped_by_lr_sched"))
        and not optimizer.state
        and not any(group.get("fused") or group["differentiable"] for group in optimizer.param_groups)
        and not torch.autograd.profiler._is_profiler_enabled
    )


def _part(value: Any, piece: Tensor, where: slice, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value[where].view_as(parameter) if value.shape == piece.shape else value.clone()
