"""The pixels of image files: every kind of image as bytes or as numbers in [0, 1], with one channel or three."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FULL_SCALES = (1, 255, 65535)
"""White, of pixels whose type does not tell it: the least of these that none of a source's exceeds."""
_KINDS = {"16-bit": FULL_SCALES[2:], "32-bit integer": FULL_SCALES[1:], "floating-point": FULL_SCALES}


def read_images(paths: list[Path], side: int | None = None) -> Tensor:
    """Decode files side by side, straight into one tensor ``[n, C, H, W]``: uint8, or float32 in [0, 1].

    Every file is looked at before the first is decoded: one channel if all are grey, and float32 if one has more than
    eight bits. Pixels are divided by what their type calls white, 255 or 65,535; where it does not tell (32-bit
    integers, floating-point numbers) by the least of :data:`FULL_SCALES` that holds all files. Transparency is dropped.
    All are resized to height and width ``side``, or must have one size. Errors name the file.
    """
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        sizes, colours, kinds = zip(*pool.map(_look, paths), strict=True)
        height, width = (side, side) if side else sizes[0]
        for path, size in zip(paths, sizes, strict=True):
            if not side and size != sizes[0]:
                found = f"{size[0]}x{size[1]}, but the first image is {height}x{width}"
                raise ValueError(f"`data.source`: {path} is {found}. Set `data.image_size` to resize all images.")
        mode, deep = "RGB" if any(colours) else "L", any(kinds)
        x = torch.empty(len(paths), len(mode), height, width, dtype=torch.float32 if deep else torch.uint8)

        def read(row: int) -> tuple[float, float]:
            pixels, low, high = _decode(paths[row], (width, height) if side else None, mode)
            pixels = pixels / np.float32(255) if deep and not kinds[row] else pixels
            x[row] = torch.tensor(pixels.reshape(height, width, -1)).permute(2, 0, 1)
            return low, high

        ranges = list(pool.map(read, range(len(paths))))
    for kind, scales in _KINDS.items():
        rows = [row for row, found in enumerate(kinds) if found == kind]
        white = white_of(max((ranges[row][1] for row in rows), default=0), scales)
        for low, high, row in sorted(((*ranges[row], row) for row in rows), key=lambda found: -found[1]):
            if not white or not 0 <= low <= high:  # NaN too
                raise ValueError(
                    f"`data.source`: {paths[row]} holds {kind} pixels from {low:g} to {high:g}, and nothing tells what "
                    "is white; pixels lie in 0 .. 1, 0 .. 255 or 0 .. 65535. Write all images anew, in one of these."
                )
        if rows:
            x[rows] /= white
    return x


def white_of(largest: float, scales: Sequence[int] = FULL_SCALES) -> int:
    """The least scale that holds the largest pixel; 0 where none does, or it is just above 1, which may be either."""
    return 0 if 1 in scales and 1 < largest < 3 else next((white for white in scales if white >= largest), 0)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow and its decoders raise many kinds
        raise ValueError(f"`data.source`: {path} is not a readable image: {error}") from error


def _look(path: Path) -> tuple[tuple[int, int], bool, str]:
    """Height and width, whether there is colour, and which of :data:`_KINDS` it is if it has more than eight bits."""
    with _opened(path) as image:
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # a photograph's MPO holds its preview, too
            raise ValueError(f"it holds {image.n_frames} images; write each to a file of its own")
        kind = {"I": "32-bit integer", "F": "floating-point"}.get(image.mode[0], "")
        if image.mode[1:] or image.format != "TIFF":  # I;16, I;16B, and what Pillow reads of PNG and PGM
            kind = kind and "16-bit"
        palette = image.getpalette() if image.mode[0] == "P" else None
        grey = kind or image.mode in ("1", "L", "LA") or (palette and palette[::3] == palette[1::3] == palette[2::3])
        lying = image.format != "TIFF" and image.getexif().get(0x0112, 1) > 4  # Pillow has turned a TIFF
        return (image.size if lying else image.size[::-1]), not grey, kind


def _decode(path: Path, size: tuple[int, int] | None, mode: str) -> tuple[np.ndarray[Any, Any], float, float]:
    """Pixels ``[H, W]`` or ``[H, W, 3]``; and of those with more than eight bits the least and the largest."""
    from PIL import Image, ImageOps

    with _opened(path) as image:
        low = high = 0.0
        if image.mode[0] in "IF":
            values = np.asarray(image).astype(np.float32)
            low, high = float(values.min()), float(values.max())
            read: Any = Image.fromarray(values)  # Pillow resizes these numbers, too
        else:
            read = ImageOps.exif_transpose(image)  # upright, as viewers show it
            read = read.convert("RGBA") if "transparency" in read.info else read
            *channels, alpha = read.getextrema() if read.mode in ("LA", "PA", "RGBA") else ((0, 0),)
            if alpha[0] < alpha[1] and all(a == b for a, b in channels):
                raise ValueError("it is one colour and differs in transparency alone; lay it on a background")
            read = read.convert(mode)
        return np.asarray(read if size is None else read.resize(size, Image.Resampling.BILINEAR)), low, high
