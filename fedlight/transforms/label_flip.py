"""LabelFlip."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Subset

from fedlight.data.arrays import ArrayDataset
from fedlight.data.reading import LABELS
from fedlight.seeding import preserved_global_rng
from fedlight.transforms.attack import Attack


class LabelFlip(Attack):
    """Attackers train with the labels C − 1 − y of C classes; what they are evaluated on is left as it is.

    A label is the last part of a sample, or what it calls so. Those below 0, which losses ignore, stay.

    Args:
        clients: who attacks: indices, or a number or part of all clients.

    Source: Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", USENIX Security 2020.
    """

    def train_data(self, dataset: Any) -> Any:
        """The same samples with other labels."""
        if self.num_classes is None:
            raise MisconfigurationException("trainer.transforms: LabelFlip needs data that tell partition_counts.")
        if not isinstance(dataset, ArrayDataset):
            return _Flipped(dataset, self.num_classes)
        rows = dataset.positions(torch.arange(len(dataset), device=dataset.device))
        own = dataset.storage.build([leaf[rows] for leaf in dataset.storage.leaves])
        return ArrayDataset.of(_flipped(own, self.num_classes)).view(None, dataset.transform)


class _Flipped(Subset[Any]):
    """A dataset that is read sample by sample."""

    def __init__(self, dataset: Any, classes: int) -> None:
        super().__init__(dataset, range(len(dataset)))
        self.classes = classes
        with preserved_global_rng():  # what has no label is refused before training
            _ = [self[row] for row in range(len(self))[:1]]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]

    def __getitem__(self, index: Any) -> Any:
        return _flipped(self.dataset[index], self.classes)


def _flipped(sample: Any, classes: int) -> Any:
    """A sample, or many, with another label."""
    if type(sample) in (tuple, list):
        return type(sample)([*sample[:-1], _other(sample[-1], classes)])
    held = sample if isinstance(sample, Mapping) else {key: getattr(sample, key, None) for key in LABELS}
    found = {key: _other(held[key], classes) for key in LABELS if held.get(key) is not None}
    if not found:
        what = f"{type(sample).__name__}. It is the last of a tuple or list, or called {', '.join(LABELS)}."
        raise MisconfigurationException(f"trainer.transforms: LabelFlip finds no label in a {what}")
    if isinstance(sample, Mapping):
        return {**sample, **found}
    if isinstance(sample, tuple):  # a named one
        return sample._replace(**found)  # type: ignore[attr-defined]
    vars(other := copy.copy(sample)).update(found)
    return other


def _other(label: Any, classes: int) -> Any:
    y = torch.as_tensor(label)
    if y.is_floating_point() or not bool((y < classes).all()):
        what = f"labels that are whole numbers below {classes}; these are {y.dtype}"
        raise MisconfigurationException(f"trainer.transforms: LabelFlip takes {what}.")
    y = torch.where(y >= 0, classes - 1 - y, y)
    return y if isinstance(label, Tensor) else y.item()
