"""What a batch, a step function and a loss are: the part of the local step that touches the module."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fedlight.module.hooks import overrides
from fedlight.module.logs import LOSS, LogCollector
from fedlight.penalties.batches import batch_size
from fedlight.penalties.step import penalized_step

IndexedBatch = tuple[Any, int]
"""A batch on the device and its index in the epoch."""

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def step_loss(module: LightningModule, log: LogCollector, batch: Any, index: int, first: bool) -> Tensor | None:
    """The loss (penalties included) of one batch; None where ``training_step`` skips it.

    Args:
        module: the module.
        log: where the task loss goes; the module's own logging must be directed there.
        batch: the batch, on the device.
        index: its index in the epoch.
        first: whether this is the first pass of a step; only that one is logged.
    """
    log.enabled = first
    if first:
        log.batch_size = batch_size(batch)
    output = call_step(module, "training_step", batch, index)
    loss: Tensor | None = output["loss"] if isinstance(output, Mapping) else output
    if first and loss is not None:
        wrapper = penalized_step(module)
        task_loss = loss if wrapper is None or wrapper.task_loss is None else wrapper.task_loss
        log.add(LOSS, task_loss.detach().float(), log.batch_size)
    return loss


def call_step(module: LightningModule, name: str, batch: Any, index: int) -> Any:
    """Call ``training_step`` and its like with as many arguments as it takes."""
    step = getattr(module, name)
    return step(batch, index) if _takes_index(getattr(step, "__func__", step)) else step(batch)


@lru_cache
def _takes_index(function: Callable[..., Any]) -> bool:
    names = [p for p in inspect.signature(function).parameters if p != "self"]
    return len(names) > 1


def transfer_function(module: LightningModule, device: torch.device) -> Callable[[Any], Any]:
    """What moves a batch to the device, with the module's transfer hooks where it overrides them."""
    if any(overrides(module, name) for name in TRANSFER_HOOKS):

        def with_hooks(batch: Any) -> Any:
            batch = module.on_before_batch_transfer(batch, 0)
            return module.on_after_batch_transfer(module.transfer_batch_to_device(batch, device, 0), 0)

        return with_hooks

    def moved(batch: Any) -> Any:
        if type(batch) in (tuple, list) and all(type(part) is Tensor and part.device == device for part in batch):
            return batch  # Lightning's own look at it takes as long as a small layer
        return module.transfer_batch_to_device(batch, device, 0)

    return moved
