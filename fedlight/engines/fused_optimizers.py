"""Torch's fused optimizers: one kernel for all parameters, with a learning rate that may be a tensor on the device."""

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

FUSED = (SGD, Adam, AdamW)
"""Optimizers that have such a kernel for every kind of device."""


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
