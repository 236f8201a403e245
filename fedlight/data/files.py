"""Arrays in files: ``.npz``, and the IDX files of MNIST and its kin."""

import gzip
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlight.data.images import ImageArrays, as_images

_KEYS = ("x_train", "y_train", "x_test", "y_test", "group_train", "group_test", "classes", "groups")


def load_npz(path: Path) -> ImageArrays:
    """Read ``x_train``, ``y_train``, ``x_test``, ``y_test`` and, where they exist, groups and names.

    Raises:
        ValueError: if the file is torn, lacks an array, or an array has the wrong shape or type.
    """
    try:
        # Opened here: NumPy leaves a file open that turns out to be torn.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            held = {key: file[key] for key in file.files if key in _KEYS}
            found = list(file.files)
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"`data.source` ({path}) is not a readable .npz file: {error}") from error
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in held]
    if missing:
        raise ValueError(
            f"`data.source` ({path}) lacks {', '.join(missing)}; it holds {', '.join(found) or 'nothing'}."
        )
    where = f"{path}: "
    x = [as_images(torch.from_numpy(held[key]), where + key) for key in ("x_train", "x_test")]
    y = [_integers(held[key], where + key) for key in ("y_train", "y_test")]
    groups = [_integers(held[key], where + key) if key in held else None for key in ("group_train", "group_test")]
    names = {key: [str(name) for name in held.get(key, [])] for key in ("classes", "groups")}
    return ImageArrays(x[0], y[0], x[1], y[1], groups[0], groups[1], names["classes"], names["groups"])


def _integers(values: np.ndarray[Any, Any], what: str) -> Tensor:
    """Labels or groups ``[n]`` int64; ``[n, 1]`` and whole floating-point numbers are taken too."""
    flat = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
    whole = flat.ndim == 1 and flat.dtype.kind in "iufb" and bool((flat == np.rint(flat.astype(np.float64))).all())
    if not whole:
        raise ValueError(
            f"`data.source` ({what}) has shape {list(values.shape)} and type {values.dtype}; it must be "
            "one integer per image."
        )
    return torch.from_numpy(flat.astype(np.int64))


def has_idx(path: Path) -> bool:
    """Whether a folder holds MNIST's files."""
    return any((path / f"train-images-idx3-ubyte{end}").is_file() for end in ("", ".gz"))


def load_idx(path: Path) -> ImageArrays:
    """The four files of MNIST and its kin, as they are or gzipped: a header of 4-byte integers, then bytes."""

    def read(name: str, header: int) -> Tensor:
        plain, packed = path / name, path / f"{name}.gz"
        try:
            raw = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
            shape = np.frombuffer(raw, ">i4", header, offset=4)
            return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * header).reshape(shape).copy())
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"`data.source`: {plain} or {packed.name} is missing or torn: {error}") from error

    x = [read(f"{split}-images-idx3-ubyte", 3)[:, None] for split in ("train", "t10k")]
    y = [read(f"{split}-labels-idx1-ubyte", 1).long() for split in ("train", "t10k")]
    return ImageArrays(x[0], y[0], x[1], y[1])
