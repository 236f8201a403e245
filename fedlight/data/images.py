"""Images in memory: what every source is turned into, checked, split and cut down."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlight.data._draws import rank_in_group


@dataclass(frozen=True)
class ImageArrays:
    """Images and labels in memory.

    Attributes:
        x_train: ``[n, C, H, W]`` uint8, or float32 where the source holds floating-point numbers.
        y_train: ``[n]`` int64.
        x_test: as ``x_train``.
        y_test: as ``y_train``.
        group_train: natural group (domain, writer, ...) of each training image, ``[n]`` int64, or None.
        group_test: the same for the test images.
        classes: names of the classes, or empty.
        groups: names of the groups, or empty.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    group_train: Tensor | None = None
    group_test: Tensor | None = None
    classes: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """C: the number of class names, or one more than the largest label."""
        return len(self.classes) or 1 + int(torch.cat([self.y_train, self.y_test]).max())

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` file that is a source again, and is read much faster than a folder of files."""
        arrays = {name: getattr(self, name) for name in ("x_train", "y_train", "x_test", "y_test")}
        groups = {name: getattr(self, name) for name in ("group_train", "group_test")}
        arrays |= {name: value for name, value in groups.items() if value is not None}
        names = {name: np.array(value) for name, value in (("classes", self.classes), ("groups", self.groups)) if value}
        np.savez(path, allow_pickle=False, **{name: value.numpy() for name, value in arrays.items()}, **names)


def as_images(x: Tensor, what: str) -> Tensor:
    """``[n, H, W]``, ``[n, H, W, C]`` or ``[n, C, H, W]`` of any number type to ``[n, C, H, W]`` uint8 or float32."""
    shape = list(x.shape)
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3, 4):
        x = x.permute(0, 3, 1, 2)
    elif x.ndim != 4 or x.shape[1] not in (1, 3, 4):
        raise ValueError(
            f"`data.source` ({what}) has shape {shape}; images are [n, H, W], [n, H, W, C] or [n, C, H, W] with "
            "1, 3 or 4 channels."
        )
    if x.is_floating_point():
        return x.float().contiguous()
    if x.dtype != torch.uint8 and x.numel() and not 0 <= int(x.min()) <= int(x.max()) <= 255:
        raise ValueError(
            f"`data.source` ({what}) holds integers from {int(x.min())} to {int(x.max())}; pixels lie in 0 .. 255."
        )
    return x.to(torch.uint8).contiguous()


def check(arrays: ImageArrays, source: str) -> None:
    """Check shapes, labels and values.

    Raises:
        ValueError: for what a model could not be trained on.
    """
    where = f"`data.source` ({source})"
    for split in ("train", "test"):
        x, y, group = (getattr(arrays, f"{name}_{split}") for name in ("x", "y", "group"))
        if len(x) == 0:
            raise ValueError(f"{where}: x_{split} holds no image.")
        if len(x) != len(y) or (group is not None and len(group) != len(x)):
            raise ValueError(
                f"{where}: x_{split} holds {len(x)} images, but y_{split} {len(y)} labels"
                + ("." if group is None else f" and group_{split} {len(group)} groups.")
            )
        if x.is_floating_point() and not bool(x.isfinite().all()):
            rows = torch.nonzero(~x.flatten(1).isfinite().all(1)).flatten()
            raise ValueError(
                f"{where}: {len(rows)} images of x_{split} hold NaN or infinity, the first is {int(rows[0])}."
            )
        if int(y.min()) < 0 or int(y.max()) >= arrays.num_classes:
            raise ValueError(
                f"{where}: labels of y_{split} lie in {int(y.min())} .. {int(y.max())}, but must lie in "
                f"0 .. {arrays.num_classes - 1}."
            )
    if arrays.x_train.shape[1:] != arrays.x_test.shape[1:]:
        raise ValueError(
            f"{where}: training images are {list(arrays.x_train.shape[1:])} and test images "
            f"{list(arrays.x_test.shape[1:])} (channels, height, width); they must agree."
        )


def holdout(strata: Tensor, fraction: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to keep and rows to hold out, both ascending: the same share of every stratum, to the nearest sample."""
    shuffled = torch.randperm(len(strata), generator=rng)
    quota = (torch.bincount(strata) * fraction).round().long()
    out = torch.empty(len(strata), dtype=torch.bool)
    out[shuffled] = rank_in_group(strata[shuffled]) < quota[strata[shuffled]]
    return torch.nonzero(~out).flatten(), torch.nonzero(out).flatten()


def limit(arrays: ImageArrays, num_samples: int, rng: torch.Generator) -> ImageArrays:
    """At most ``num_samples`` training and as many test images, drawn at random and kept in order."""
    if num_samples < 1:
        raise ValueError(f"`data.limit_samples` must be at least 1, got {num_samples}.")
    changes: dict[str, Any] = {}
    for split in ("train", "test"):
        x, y, group = (getattr(arrays, f"{name}_{split}") for name in ("x", "y", "group"))
        rows = torch.randperm(len(x), generator=rng)[:num_samples].sort().values
        changes |= {f"x_{split}": x[rows], f"y_{split}": y[rows]}
        changes[f"group_{split}"] = None if group is None else group[rows]
    classes = arrays.classes or [str(c) for c in range(arrays.num_classes)]  # a rare class may lose its last image
    return replace(arrays, classes=classes, **changes)


def channel_statistics(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, of pixels in [0, 1]; a constant channel has deviation 1.

    Args:
        x: ``[n, C, H, W]`` uint8 or floating-point.
    """
    total, squares = torch.zeros(2, x.shape[1], dtype=torch.float64).unbind()
    for part in torch.split(x, 4096):
        values = part.double().transpose(0, 1).flatten(1)
        total, squares = total + values.sum(1), squares + values.square().sum(1)
    count, scale = x.numel() / x.shape[1], 1.0 if x.is_floating_point() else 255.0
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt() / scale
    return (mean / scale).tolist(), torch.where(std > 1e-6, std, 1.0).tolist()
