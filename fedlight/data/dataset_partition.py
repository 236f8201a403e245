"""Any datasets, divided among clients."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.data.folders import in_order
from fedlight.data.images import say_shared
from fedlight.data.partition import IID, NaturalGroups, Partitioner
from fedlight.data.partitioned import PartitionedDataModule
from fedlight.data.reading import LABELS, Loaded, class_names, is_hf, label_of, loaded, numbered
from fedlight.seeding import preserved_global_rng


class DatasetPartition(PartitionedDataModule):
    """Any map-style datasets; the training data is divided among clients.

    Example::

        data = DatasetPartition(MyText("train"), test=MyText("test"), num_clients=50, partitioner=DirichletClients(0.3))

    Datasets are torch's, Hugging Face's or PyG's, or in a ``DataLoader``, whose way to make batches is kept; for
    ``train`` also a list of these, one for each client. What is in memory is read a batch at a time: an
    ``ArrayDataset``, a ``TensorDataset``, a ``Subset`` of these, and a dict or tuple of tensors, which may stand for a
    dataset. Others are read sample by sample.

    Args:
        train: the training data.
        test: the test data.
        val: the validation data; by default the test data.
        num_clients: N; None for one client per natural group, with ``NaturalGroups``.
        partitioner: which client gets which samples; by default ``IID()``, or ``NaturalGroups()`` of ``groups``.
        targets: class of each training sample, integers or strings (numbered as they sort), or the name of a column or
            attribute; by default what ``.targets``, ``.labels`` or a column ``label`` of the dataset say, the last
            tensor of a ``TensorDataset`` or tuple, or ``labels`` or ``y`` of a dict, through ``Subset`` and
            ``ConcatDataset``; else the samples, which are read.
        groups: natural group of each training sample, for ``NaturalGroups``; given as ``targets`` are.
        batch_size: samples of a batch in local training; by default the loader's, or 32.
        eval_batch_size: samples of a batch in evaluation; by default the loader's, or ``batch_size``.
        num_workers: worker processes of the loaders; by default the training loader's, or none.
        collate_fn: makes a batch of a list of samples; by default the loader's, or PyG's for its data, or torch's.
        seed: seed of the partition.
        held_out_clients: clients that never train, a number or a fraction of all, and are evaluated as new ones.

    Attributes:
        classes: names of the classes, where they are strings.
    """

    def __init__(
        self,
        train: Dataset | DataLoader | list,  # type: ignore[type-arg]  # jsonargparse wants the bare class
        test: Dataset | DataLoader | None = None,  # type: ignore[type-arg]
        val: Dataset | DataLoader | None = None,  # type: ignore[type-arg]
        num_clients: int | None = 20,
        partitioner: Partitioner | None = None,
        targets: Sequence[int | str] | str | None = None,
        groups: Sequence[int | str] | str | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        held_out_clients: int | float = 0,
    ) -> None:
        size, divided = 32 if batch_size is None else batch_size, IID() if groups is None else NaturalGroups()
        more = {"seed": seed, "held_out_clients": held_out_clients}
        super().__init__(num_clients, partitioner or divided, size, eval_batch_size, **more)
        self._by_hand, self._eval_size = Loaded(None, batch_size, num_workers, collate_fn), eval_batch_size
        self._targets, self._groups = targets, groups
        self.classes: list[str] = []
        held = loaded(train, "`data.train`", clients=True)
        if held.sizes is not None:
            if partitioner is not None or groups is not None:
                raise ValueError("`data.train` is a list with the data of each client; it takes no partitioner.")
            if 0 in held.sizes:
                raise ValueError(f"`data.train[{held.sizes.index(0)}]` is empty: leave out clients without data.")
            self.num_clients, self.partitioner = len(held.sizes), NaturalGroups()
            self._groups = np.repeat(np.arange(len(held.sizes)), held.sizes).tolist()
        tested = loaded(test, "`data.test`")
        self._take(held, tested if val is None else loaded(val, "`data.val`"), tested)

    def _take(self, train: Loaded, val: Loaded, test: Loaded) -> None:
        """Take data and the ways to make batches of it; what was given by hand wins."""
        by_hand, self._held = self._by_hand, {"train": train, "val": val, "test": test}
        self._train, self._val, self._test = train.dataset, val.dataset, test.dataset
        self.batch_size = by_hand.batch_size or train.batch_size or 32
        self.num_workers = (train.num_workers or 0) if by_hand.num_workers is None else by_hand.num_workers
        self.collate_fn = by_hand.collate_fn or train.collate_fn

    def setup(self, stage: str | None = None) -> None:
        """Find the labels and divide the training data among the clients."""
        if self.partition is None:
            self._divide()
        held = self._held["test" if stage in ("test", "predict") else "val"]
        self.eval_batch_size = self._eval_size or held.batch_size or self.batch_size
        self.eval_collate_fn = self._by_hand.collate_fn or held.collate_fn or self.collate_fn

    def _divide(self) -> None:
        own, usual = self._by_hand.collate_fn, self.collate_fn
        sets = (in_memory(held.dataset, own or held.collate_fn or usual) for held in self._held.values())
        self._train, self._val, self._test = sets
        size = 0 if self._train is None else len(self._train)
        if size == 0:
            raise ValueError("`data.train` is empty: there are no training samples.")
        (whole, rows), places = _rows_of(self._train), {"test": _rows_of(self._test), "validation": _rows_of(self._val)}
        for what, (below, held_out) in places.items():
            if below == whole and (what == "test" or self._val is not self._test):
                say_shared(f"data: {{}} {what} samples are training samples", rows, held_out)
        self._encode()
        names, *others = map(class_names, (self._train, self._val, self._test))
        for key, other in zip(("val", "test"), others, strict=True):
            if names and any(a != b for a, b in zip(names, other, strict=False)):
                raise ValueError(
                    f"`data.{key}` numbers its classes {other[:5]}, and `data.train` {names[:5]}: a number would be two"
                    " classes. Number them alike; folders of classes need the same names, in the same order."
                )
        theirs = self._targets is None or isinstance(self._targets, str)
        targets, self.classes = self._numbers("targets", self._targets, size, (self.classes or names) if theirs else [])
        groups, sites = self._numbers("groups", self._groups, size)
        val_targets = None if self._val is None else find_targets(self._val, self._keys, self.classes)
        labels = None if theirs or targets is None or val_targets is None else find_targets(self._train)
        if labels is not None and not labels.equal(targets):  # type: ignore[arg-type]  # mypy forgets that it is one
            rank_zero_info("data: `data.targets` are not the data's own labels: clients get no held-out data by these.")
            val_targets = None
        self._strata = None if targets is None or val_targets is None else (targets, val_targets)
        if targets is not None and int(targets.max()) >= len(self.classes):  # these are names of something else
            self.classes = []
        self.divide(size, targets, len(self.classes) or None, groups)
        column = self._groups if isinstance(self._groups, str) and self._val is not None else None
        if groups is not None and column and (held := find_targets(self._val, (column,), sites)) is not None:
            self.stratify(self._strata, (groups, held))

    @property
    def _keys(self) -> Sequence[str]:
        return (self._targets,) if isinstance(self._targets, str) else LABELS

    def _numbers(self, key: str, given: Any, size: int, names: Sequence[str] = ()) -> tuple[Tensor | None, list[str]]:
        """Class or group of each training sample, and their names where they are strings."""
        found = list(given) if hasattr(given, "__next__") else given
        if isinstance(given, str):
            found = find_values(self._train, (given,))
            if found is None:
                raise ValueError(f"`data.{key}` is {given!r}, which is no column or attribute of the training data.")
        elif given is None and key == "targets":
            found = find_values(self._train, LABELS)
            lost = any(value is None for value in found or ())
            found = found if lost or find_targets(self._train) is not None else None
            spec = self._train.storage.spec if isinstance(self._train, ArrayDataset) else None
            if found is not None and spec is not None and spec.type is not dict and (n := spec.num_leaves) > 2:
                rank_zero_info(f"data: the class of a sample is the last of its {n} tensors, or `data.targets`.")
            if found is None and self.partitioner.needs_labels:
                rank_zero_info(f"data: all {size} samples are read to find their labels; `data.targets` saves that.")
                with preserved_global_rng():
                    found = [label_of(self._train[i]) for i in range(size)]
                found = None if any(label is None for label in found) else found
        if found is None:
            return None, []
        if len(found) != size:
            raise ValueError(f"`data.{key}` has {len(found)} entries, but the training data has {size} samples.")
        return numbered(found, names, key)

    def _encode(self) -> None:
        """Hugging Face's labels become numbers, other columns but strings tensors; PyG's data become batches of PyG."""
        train, sets = self._train, {"_train": self._train, "_val": self._val, "_test": self._test}
        column = next((key for key in self._keys if is_hf(train) and key in train.column_names), None)
        if column is not None:
            sets, self.classes = _one_coding(sets, column)
        for name, data in sets.items():
            if self.collate_fn is None and is_hf(data) and data.format["type"] is None:
                kinds = {key: getattr(feature, "dtype", "") for key, feature in data.features.items()}
                told = [key for key, kind in kinds.items() if not re.search("string|time|date|binary", kind)]
                data = data.with_format("torch", told)
            # Everywhere else a dataset is torch's.
            setattr(self, name, data if data is None or isinstance(data, Dataset) else Subset(data, range(len(data))))
        with preserved_global_rng():
            first = self._train[0]
        if self.collate_fn is None and type(first).__module__.startswith("torch_geometric."):
            from torch_geometric.data import Batch

            self.collate_fn = Batch.from_data_list


def _rows_of(data: Any) -> tuple[int, list[int]]:
    """The dataset below subsets, by its identity, and the rows of it that there are."""
    rows: Any = range(0 if data is None else len(data))
    while isinstance(data, Subset):
        data, rows = data.dataset, [data.indices[row] for row in rows]
    if isinstance(data, ArrayDataset):
        data, rows = data.storage, data.positions(torch.tensor(rows, dtype=torch.int64)).tolist()
    return id(data), list(map(int, rows))


def _one_coding(sets: dict[str, Any], column: str) -> tuple[dict[str, Any], list[str]]:
    """Hugging Face's datasets with the same number for a label in all of them, and the names of the labels."""
    from datasets import ClassLabel

    feature = sets["_train"].features[column]
    if "string" in getattr(feature, "dtype", ""):
        feature = ClassLabel(names=in_order({*sets["_train"][column]} - {None}))
    names, out = list(getattr(feature, "names", None) or ()), dict(sets)
    for key, data in sets.items() if names else ():
        own = None if data is None else data.features.get(column, feature)
        if own is None or own == feature:
            continue
        try:
            if getattr(own, "names", names) != names:
                raise ValueError(f"they are numbered in the order {own.names[:5]}")
            out[key] = data.cast_column(column, feature)
        except ValueError as error:
            raise ValueError(f"`data.{key[1:]}`: labels are not those of training, {names[:5]}: {error}.") from error
    return out, names


def find_targets(dataset: Any, keys: Sequence[str] = LABELS, names: Sequence[str] = ()) -> Tensor | None:
    """The class of each sample as the dataset itself tells it, ``[n]`` int64; None if it does not."""
    try:
        found = find_values(dataset, keys)
        return None if found is None else numbered(found, names, "" if keys is LABELS else keys[0])[0]
    except (TypeError, ValueError, RuntimeError):
        return None  # regression, boxes, text: no classes


def find_values(dataset: Any, keys: Sequence[str]) -> list[Any] | None:
    """What a dataset keeps for each sample in a column or attribute of one of these names; None if there is none."""
    dataset = in_memory(dataset)
    if isinstance(dataset, Subset):
        inner = find_values(dataset.dataset, keys)
        return None if inner is None else [inner[int(row)] for row in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [find_values(part, keys) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [value for part in parts for value in part or ()]
    if isinstance(dataset, ArrayDataset):
        tree = dataset.storage.build(dataset.storage.leaves)
        key = next((key for key in keys if isinstance(tree, dict) and key in tree), None)
        last = dataset.targets if keys is LABELS and not isinstance(tree, dict) else None
        found: Any = last if key is None else tree[key]
        found = None if found is None else found[dataset.positions(torch.arange(len(dataset)))]
    elif is_hf(dataset):
        key = next((key for key in keys if key in dataset.column_names), None)
        found = None if key is None else list(dataset.with_format(None)[key])
    else:
        found = next((value for key in keys if (value := getattr(dataset, key, None)) is not None), None)
    fits = hasattr(found, "__len__") and getattr(found, "ndim", 1) == 1 and len(found) == len(dataset)
    return (found.tolist() if hasattr(found, "tolist") else list(found)) if fits else None
