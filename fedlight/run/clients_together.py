"""Each client's metrics from one pass over the data of all clients, where they are means over samples."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torchmetrics import Metric

from fedlight.data.arrays import ArrayDataset
from fedlight.engines.batch_order import same_storage
from fedlight.engines.trial import WatchedIndex
from fedlight.module.hooks import overrides
from fedlight.module.logs import LogCollector, collecting_logs
from fedlight.module.looking import watched
from fedlight.module.step import TRANSFER_HOOKS

_HOOKS = [f"on_validation_{when}" for when in ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")]


class _NoMean(Exception):
    """What the step logs is no mean over samples, or nobody can tell."""


class _Means(LogCollector):
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, Metric):
            raise _NoMean
        super().log(name, value, *args, **kwargs)


def together(
    module: LightningModule,
    clients: Sequence[ArrayDataset],
    device: torch.device,
    prepare: Callable[[Any], Any],
    step: Callable[[Any, int], Any],
) -> list[dict[str, float]]:
    """What ``validation_step`` logs on each client's data, from each sample by itself (``torch.func.vmap``).

    That is what a batch for each client gives if all that is logged are means over samples. Whether they are is looked
    at in every pass: the step on the same samples as one batch of another index, in which clients and classes are
    mixed, must log the mean of what it logs for each. So it depends on model and data alone, and a resumed run goes the
    same way. ``prepare`` makes of a batch what the step gets, and ``step`` calls ``validation_step`` with that and an
    index.

    Raises:
        Exception: of any kind, where each client needs a batch of its own.
    """
    if any(overrides(module, name) for name in (*_HOOKS, *TRANSFER_HOOKS)) or any(map(_acts, module.modules())):
        raise _NoMean
    log, counters = _Means(device), set[str]()

    def logged(batch: Any, size: int, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        log.batch_size = size
        step(batch, WatchedIndex.of(index, counters))  # of which `0.1 * batch_idx` is not noted
        sums = log.sums()
        log.reset()
        if counters or any(log.reduction(name) != "mean" for name in sums):
            raise _NoMean
        return sums

    batch = prepare(_joined(clients, device))
    leaves, spec = tree_flatten(batch)
    with watched(module, counters), collecting_logs(module, log), warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*batching rule")  # it would go sample by sample
        each = vmap(lambda sample: logged(tree_unflatten([leaf[None] for leaf in sample], spec), 1, 0))(leaves)
        whole = logged(batch, len(leaves[0]), 1)
    lengths = torch.tensor([len(data) for data in clients], device=device)
    if not whole or each.keys() != whole.keys():
        raise _NoMean
    return [dict(zip(whole, row, strict=True)) for row in _means(each, whole, lengths).tolist()]


def _means(each: dict[str, Any], whole: dict[str, Any], lengths: Tensor) -> Tensor:
    """The mean of each client ``[clients, names]``, in the types in which the module would have logged it."""
    means = []
    for name, (values, weights) in each.items():
        (total, weight), wide = whole[name], values.double()
        close = 100 * torch.finfo(values.dtype).eps * wide.abs().mean()
        if not (weights == 1).all() or weight != len(values) or not (wide.mean() - total / weight).abs() <= close:
            raise _NoMean
        means.append((torch.segment_reduce(wide, "sum", lengths=lengths) / lengths).to(values.dtype).double())
    return torch.stack(means, 1)


def _acts(module: torch.nn.Module) -> bool:
    """Whether a submodule does more than to compute: a hook of the user's sees its calls, or it is compiled."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return compiled or not all(getattr(hook, "__module__", "").startswith("fedlight.") for hook in hooks)


def _joined(clients: Sequence[ArrayDataset], device: torch.device) -> Any:
    first = clients[0]
    if all(same_storage(data, first) for data in clients):
        rows = torch.cat([data.positions(torch.arange(len(data), device=first.device)) for data in clients])
        return first.view(rows, first.transform).part(0, len(rows), device)
    return tree_map(lambda *leaves: torch.cat(leaves), *(data.part(0, len(data), device) for data in clients))
