"""How many samples a batch has, and copies of it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor


def batch_size(batch: Any) -> int:
    """The number of samples of a batch: the weight of what is logged for it; 1 where it cannot be told.

    Graphs of PyTorch Geometric are counted. All else goes by Lightning's rules: the length of the first tensor in
    mappings, sequences and dataclasses, however nested, with a warning where another tensor has another length.
    """
    if type(batch) in (list, tuple):  # the common case, at once
        same = {part.size(0) if isinstance(part, Tensor) and part.ndim else None for part in batch}
        if len(same) == 1 and (size := same.pop()) is not None:
            return size
    sizes = list(dict.fromkeys(_sizes(batch)))
    if len(sizes) > 1 and not _told:  # once, as other batches may have other lengths
        _told.warn(f"A batch has tensors of lengths {sizes}: logs that pass no batch_size are weighted by {sizes[0]}.")
    return sizes[0] if sizes else 1


_told = WarningCache()


@runtime_checkable
class _Clonable(Protocol):
    def clone(self) -> Any: ...


def cloned(batch: Any) -> Any:
    """A batch for a pass that is not a step's last: ``training_step`` may pop from it, or write into it."""
    if type(batch) in (list, tuple) and all(type(part) is Tensor for part in batch):  # the common case, at once
        return type(batch)([part.clone() for part in batch])
    return apply_to_collection(batch, _Clonable, lambda part: part.clone())


def _sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        yield batch.size(0) if batch.ndim else 1
    elif isinstance(graphs := getattr(batch, "num_graphs", None), int):
        yield graphs
    elif isinstance(batch, Iterable) and not isinstance(batch, str | Iterator):  # which is used up by looking
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _sizes(part)
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from _sizes(getattr(batch, field.name))
