"""What the data hold, against what the model has room for; looked at before training."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Subset

from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.data.datamodule import FederatedDataModule, class_counts
from fedlight.data.dataset_partition import find_targets
from fedlight.module.hooks import overrides
from fedlight.run.context import RunContext


def check_labels(run: RunContext, labels: list[tuple[int, int, int]]) -> None:
    """Refuse :func:`extreme_labels` that the model has no output for, also those of held-out data.

    Raises:
        MisconfigurationException: naming the label and ``model.num_classes``, or what the model says of it.
    """
    module, data, known = run.module, run.datamodule, [label for label, *_ in labels]
    expected = getattr(module, "num_classes", None)
    if known and isinstance(expected, int) and max(known) >= expected:
        raise MisconfigurationException(
            f"model.num_classes={expected} is too small: the data has label {max(known)}."
            f" Set model.num_classes to {max(known) + 1}."
        )
    validated = overrides(module, "validation_step") and run.settings["limit_val_batches"] != 0
    for stage, dataset in (("validation", data.val_dataset() if validated else None), ("test", data.test_dataset())):
        if not known or dataset is None or (targets := find_targets(dataset)) is None:
            continue
        for label, row in _ends(targets):
            what = (
                f"data: the {stage} data has label {label} (row {row}), those of clients {min(known)} to {max(known)}"
            )
            foreign = isinstance(expected, int) and not 0 <= label < expected
            if stage == "test" and foreign:  # labels that are kept secret are -1, say
                rank_zero_info(f"{what}; model.num_classes={expected}, so it cannot be tested on these.")
            elif foreign:
                raise MisconfigurationException(f"{what}; model.num_classes={expected}. Correct it, or leave it out.")
            elif stage == "validation" and not min(known) <= label <= max(known):
                try:
                    run.evaluator.attempt(Subset(dataset, [row]), "validation")
                except (IndexError, torch.AcceleratorError) as error:
                    raise MisconfigurationException(f"{what}; validation_step: {error}") from error


def extreme_labels(datamodule: FederatedDataModule) -> list[tuple[int, int, int]]:
    """The smallest and the largest label, each with a client and its row there; empty where they are unknown."""
    counts, found = class_counts(datamodule), []
    if counts is not None:
        labels = counts.sum(0).nonzero().flatten().tolist()
        for label, client in ((label, int(counts[:, label].argmax())) for label in {*labels[:1], *labels[-1:]}):
            targets = find_targets(datamodule.client_dataset(client))
            found.append((label, client, 0 if targets is None else int((targets == label).int().argmax())))
        return found
    storage, ends = None, [math.inf]
    for client in range(datamodule.num_clients):
        dataset = in_memory(datamodule.client_dataset(client))
        if isinstance(dataset, ArrayDataset) and dataset.storage is not storage:
            storage, targets = dataset.storage, find_targets(dataset.pooled())
            ends = [math.inf] if targets is None else [label for label, _ in _ends(targets)]
        if found and isinstance(dataset, ArrayDataset) and all(found[0][0] <= end <= found[-1][0] for end in ends):
            continue  # clients before have the smallest and the largest label of the data that all share
        targets = find_targets(dataset)
        if targets is None:
            return []
        found = sorted([*found, *((label, client, row) for label, row in _ends(targets))])
        found = [found[0], found[-1]] if found else []
    return found


def _ends(targets: Tensor) -> list[tuple[int, int]]:
    """The smallest and the largest label, each with its row; but -100, which torch's cross-entropy leaves out."""
    given = (targets != -100).nonzero().flatten()
    ends = {given[targets[given].argmin()], given[targets[given].argmax()]} if len(given) else ()
    return [(int(targets[row]), int(row)) for row in ends]


def check_vocabulary(module: LightningModule, sets: list[ArrayDataset]) -> None:
    """Refuse texts with numbers that are not below the ``vocab_size`` of a module, or of its configuration."""
    sizes = [getattr(getattr(part, "config", part), "vocab_size", None) for part in module.modules()]
    size = next((size for size in sizes if type(size) is int), math.inf)
    for dataset in sets if size < math.inf else []:
        tree: Any = dataset.storage.build(dataset.storage.leaves)
        ids = tree.get("input_ids") if isinstance(tree, Mapping) else dataset.inputs
        if ids is not None and ids.numel() and not ids.is_floating_point() and (largest := int(ids.max())) >= size:
            raise MisconfigurationException(
                f"model: vocab_size={size} is too small: the data has texts with the number {largest}. Set it to"
                f" {largest + 1}, or lower data.vocab_size."
            )


def check_finite(sets: list[ArrayDataset]) -> None:
    """Look for NaN in what is in memory."""
    stored = {t.data_ptr(): (d, t) for d in sets for t in d.storage.leaves}
    for dataset, tensor in stored.values():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            what = {id(dataset.inputs): "inputs", id(dataset.targets): "targets"}.get(id(tensor), "entries")
            bad = (~tensor.flatten(1).isfinite().all(1) if tensor.ndim > 1 else ~tensor.isfinite()).nonzero().flatten()
            raise MisconfigurationException(
                f"data: {len(bad)} of {len(tensor)} {what} hold NaN or infinity, the first in row {int(bad[0])}."
                " Remove or replace them."
            )
