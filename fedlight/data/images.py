"""Images in memory: what every source is turned into, checked, split and cut down."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor

from fedlight.checks import check_whole
from fedlight.data.partition import rank_in_group
from fedlight.data.pixels import FULL_SCALES, white_of
from fedlight.seeding import generator


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
        held = {name: np.asarray(value) for name, value in vars(self).items() if value is not None and len(value)}
        np.savez(path, allow_pickle=False, **held)


def as_images(held: Mapping[str, np.ndarray[Any, Any]], source: str) -> tuple[list[Tensor], str]:
    """The arrays of one source, read alike: ``[n, C, H, W]`` uint8 or float32, and what they were taken for.

    They are ``[n, H, W]``, ``[n, H, W, C]`` or ``[n, C, H, W]``. White is 1 for bool and 255 for uint8; for other
    integers, and for floating-point numbers, it is the least of :data:`FULL_SCALES` that holds all of them.

    Raises:
        ValueError: if an array is none of these, or together they can be read in two ways.
    """
    shapes = {key: _layouts(x, f"`data.source` ({source}: {key})") for key, x in held.items()}
    common = [shape for shape in next(iter(shapes.values())) if all(shape in other for other in shapes.values())]
    square = [shape for shape in common if shape[1] == shape[2]]
    common = square if len(square) == 1 else common
    if len(common) > 1:
        raise ValueError(
            f"`data.source` ({source}): {', '.join(f'{k} {list(x.shape)}' for k, x in held.items())} can be read in two"
            f" ways, as images (channels, height, width) of {' or '.join(map(str, common))}. Write [n, H, W] for grey."
        )
    known = {"bool": (1,), "uint8": (255,), "f": FULL_SCALES}
    kinds = {key: x.dtype.name if x.dtype.name in known else x.dtype.kind.replace("u", "i") for key, x in held.items()}
    ranges = {key: _range(x) for key, x in held.items()}
    tops = {kind: max(ranges[key][1] for key in held if kinds[key] == kind) for kind in kinds.values()}
    white = {kind: white_of(top, known.get(kind, FULL_SCALES[1:])) for kind, top in tops.items()}
    signs = {low < 0 for low, high in ranges.values() if low or high}
    signed = signs == {True} and set(kinds.values()) == {"f"}  # images of mean 0 are left as they are
    lit = [ranges[k][1] / white[kinds[k]] for k in held if ranges[k][1] and white[kinds[k]]] or [1.0]
    said = ", ".join(f"{k} {x.dtype.name} {ranges[k][0]:g} .. {ranges[k][1]:g}" for k, x in held.items())
    if not signed and (True in signs or 0 in white.values() or min(lit) < max(lit) / 10):
        raise ValueError(
            f"`data.source` ({source}): it is not clear what is white in {said}. Pixels are bytes, or lie in 0 .. 1, "
            "0 .. 255 or 0 .. 65535 in all arrays; floating-point numbers may also have mean 0 in all of them."
        )
    small = all(kind == "bool" or (kind != "f" and white[kind] == 255) for kind in white)
    images = []
    for key, x in held.items():
        last = shapes[key][common[0] if common else next(iter(shapes[key]))]
        x = x[:, None] if x.ndim == 3 else np.moveaxis(x, 3, 1) if last else x
        scale = 1 if signed else white[kinds[key]]
        x = x.astype(np.uint8) * np.uint8(255 // scale) if small else x.astype(np.float32) / np.float32(scale)
        images.append(torch.from_numpy(np.ascontiguousarray(x)))
    return images, f"{said}, as {'bytes' if small else 'float32' if signed else 'float32 in 0 .. 1'}"


def _range(x: np.ndarray[Any, Any]) -> tuple[float, float]:
    """The least and the largest finite number."""
    numbers = x[np.isfinite(x)] if x.dtype.kind == "f" else x
    return (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)


def _layouts(x: np.ndarray[Any, Any], what: str) -> dict[tuple[int, ...], bool]:
    """What the shape of an array can mean, (channels, height, width), and whether its channels come last."""
    found: dict[tuple[int, ...], bool] = {(1, *x.shape[1:]): False} if x.ndim == 3 else {}
    if x.ndim == 4 and x.shape[3] in (1, 3, 4):
        found[x.shape[3], x.shape[1], x.shape[2]] = True
    if x.ndim == 4 and x.shape[1] in (1, 3, 4):
        found.setdefault(x.shape[1:], False)
    if not found or x.dtype.kind not in "biuf":
        raise ValueError(
            f"{what} has shape {list(x.shape)} and type {x.dtype}; images are numbers [n, H, W], [n, H, W, C] or "
            "[n, C, H, W] with 1, 3 or 4 channels."
        )
    return found


def check(arrays: ImageArrays, source: str) -> None:
    """Raise a ValueError for shapes, labels and values that a model could not be trained on."""
    where = f"`data.source` ({source})"
    for split in ("train", "test"):
        x, y, group = (getattr(arrays, f"{name}_{split}") for name in ("x", "y", "group"))
        if len(x) == 0:
            raise ValueError(f"{where}: x_{split} holds no image.")
        if len(x) != len(y) or (group is not None and len(group) != len(x)):
            also = "" if group is None else f" and group_{split} {len(group)} groups"
            raise ValueError(f"{where}: x_{split} holds {len(x)} images, but y_{split} {len(y)} labels{also}.")
        if x.is_floating_point() and not bool(x.isfinite().all()):
            rows = torch.nonzero(~x.flatten(1).isfinite().all(1)).flatten()
            raise ValueError(f"{where}: {len(rows)} images of x_{split} hold NaN or infinity, the first is {rows[0]}.")
        low, high, most = int(y.min()), int(y.max()), arrays.num_classes - 1
        if low < 0 or high > most:
            raise ValueError(f"{where}: labels of y_{split} lie in {low} .. {high}, but must lie in 0 .. {most}.")
    train, test = (list(x.shape[1:]) for x in (arrays.x_train, arrays.x_test))
    if train != test:
        raise ValueError(f"{where}: training images are {train} and test images {test}; both need one shape.")


def say_shared(said: str, trained: Iterable[Hashable], tested: Sequence[Hashable]) -> None:
    """Say how many samples are in both sets, where it is more than one of a hundred, as in many public sets."""
    known = {*trained}
    if (shared := sum(sample in known for sample in tested)) > len(tested) / 100:
        rank_zero_info(f"{said.format(f'{shared} of {len(tested)}')}, too: accuracies are not those of new data.")


def holdout(strata: Tensor, fraction: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to keep and rows to hold out, both ascending: the same share of every stratum, to the nearest sample."""
    shuffled = torch.randperm(len(strata), generator=rng)
    quota = (torch.bincount(strata) * fraction).round().long()
    out = torch.empty(len(strata), dtype=torch.bool)
    out[shuffled] = rank_in_group(strata[shuffled]) < quota[strata[shuffled]]
    return torch.nonzero(~out).flatten(), torch.nonzero(out).flatten()


def held_out_for_test(strata: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Rows for training, and for the test set that a source lacks: the same ones whatever the run's seed."""
    if not 0 < fraction < 1:
        raise ValueError(f"`data.test_fraction` must lie between 0 and 1, got {fraction}; the source has no test set.")
    kept, out = holdout(strata, fraction, generator(0, "test split"))
    if not (len(kept) and len(out)):
        raise ValueError(
            f"`data.test_fraction`={fraction:g} leaves {len(kept)} samples for training and {len(out)} for the test, of"
            f" {len(strata)} in {len(torch.unique(strata))} classes or clients. Change it, or bring a test set."
        )
    return kept, out


def take(arrays: ImageArrays, train: Tensor, test: Tensor) -> ImageArrays:
    """Some rows of both sets."""
    changes: dict[str, Any] = {}
    for split, rows in (("train", train), ("test", test)):
        held = {f"{name}_{split}": getattr(arrays, f"{name}_{split}") for name in ("x", "y", "group")}
        changes |= {name: None if values is None else values[rows] for name, values in held.items()}
    return replace(arrays, **changes)


def limit(arrays: ImageArrays, num_samples: int, rng: torch.Generator) -> ImageArrays:
    """At most ``num_samples`` training and as many test images, drawn at random and kept in order."""
    check_whole("`data.limit_samples`", num_samples)
    sizes = len(arrays.y_train), len(arrays.y_test)
    classes = arrays.classes or [str(c) for c in range(arrays.num_classes)]  # a rare class may lose its last image
    rows = (torch.randperm(size, generator=rng)[:num_samples].sort().values for size in sizes)
    return take(replace(arrays, classes=classes), *rows)


def channel_statistics(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel of ``[n, C, H, W]``, of pixels in [0, 1]; 1 is a constant one's deviation."""
    total, squares = torch.zeros(2, x.shape[1], dtype=torch.float64).unbind()
    for part in torch.split(x, 4096):
        values = part.double().transpose(0, 1).flatten(1)
        total, squares = total + values.sum(1), squares + values.square().sum(1)
    count, scale = x.numel() / x.shape[1], 1.0 if x.is_floating_point() else 255.0
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt() / scale
    return (mean / scale).tolist(), torch.where(std > 1e-6, std, 1.0).tolist()
