"""Images with natural clients: LEAF's JSON, and CSV files that list images with their labels and clients."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor

from fedlight.data.folders import EXTENSIONS, named, split_of
from fedlight.data.images import ImageArrays, held_out_for_test
from fedlight.data.pixels import read_images
from fedlight.data.tables import DELIMITERS, Table, coded, column, ending_of, is_leaf, read_leaf, read_table

_COLUMNS = {"image": "image_id", "label": "class", "client": "user_id", "split": "split"}


def is_listed(path: Path) -> bool:
    """Whether it is a CSV or TSV file, or a folder of LEAF."""
    return (path.is_file() and ending_of(path) in DELIMITERS) or is_leaf(path)


def load_listed(
    path: Path,
    root: Path,
    columns: Mapping[str, str],
    image_size: int | None = None,
    test_domains: Sequence[str] | None = None,
    test_fraction: float = 0.2,
) -> ImageArrays:
    """Read images that are listed with their clients, who become groups; settings as for ``load_source``.

    ``path`` is a folder of LEAF; or a CSV file, by default laid out as those of Hsu et al. (ECCV 2020): ``user_id``,
    ``image_id``, ``class``; without ``user_id`` there are no clients. Its test set are the rows whose ``split`` is not
    0 or ``train``, or a ``test.csv`` beside it, or else ``test_fraction`` of each client. ``test_domains`` are clients.
    Images that are not below the folder of the CSV file may be below ``root``.
    """
    if strange := columns.keys() - _COLUMNS.keys():
        raise ValueError(f"`data.columns` are {', '.join(_COLUMNS)}; found {', '.join(sorted(strange))}.")
    if is_leaf(path):
        tables = {s: {"image": t.pop("text"), "split": [s] * len(t["label"]), **t} for s, t in read_leaf(path).items()}
        table = {k: [v for t in tables.values() for v in t[k]] for k in ("image", "label", "client", "split")}
        test = np.array(table["split"]) == "test"
    else:
        table, test = _of_csv(path, columns)
    clients, group = np.unique(table["client"], return_inverse=True)
    natural = is_leaf(path) or any(table["client"])
    if test_domains:
        test = np.isin(table["client"], test_domains)
        if set(test_domains) - set(clients) or test.all():
            raise ValueError(f"`data.test_domains` is {test_domains}; the clients are {clients[:9].tolist()} ...")
    if not test.any():
        strata = group if natural else np.unique(table["label"], return_inverse=True)[1]
        test[held_out_for_test(torch.from_numpy(strata), test_fraction)[1].numpy()] = True
    train, held = np.flatnonzero(~test), np.flatnonzero(test)
    if not len(train):
        found = ", ".join(sorted({*table["split"]})[:5])
        raise ValueError(f"`data.columns.split`: no image of {path} is for training; `train` or 0 does, found {found}.")
    label = "y" if is_leaf(path) else columns.get("label", _COLUMNS["label"])
    y, classes = coded(table["label"], {str(table["label"][i]) for i in train}, f"`data.source` ({path}), {label}")
    order = [*train.tolist(), *held.tolist()]
    images = [table["image"][row] for row in order]
    x = _pixels(images) if isinstance(images[0], np.ndarray) else read_images(_files(images, path, root), image_size)
    groups = torch.from_numpy(group)
    known = groups[held] if all(table["client"][row] for row in held) else None
    n, splits = len(train), ", ".join(sorted({table["split"][row] for row in held} - {"train"})[:5])
    apart, names = test_domains or splits or "a part of each", clients.tolist() if natural else []
    rank_zero_info(
        f"`data.source` ({path}): {n} training and {len(held)} test images; {named(classes)}, "
        f"{len({*group[train].tolist()}) if natural else 'no'} clients; test on {apart}."
    )
    return ImageArrays(x[:n], y[train], x[n:], y[held], groups[train] if natural else None, known, classes, names)


def _of_csv(path: Path, given: Mapping[str, str]) -> tuple[Table, np.ndarray[Any, Any]]:
    """Images, labels and clients of a CSV file and of the ``test.csv`` beside it, and which rows are for the test."""
    found: Table = {key: [] for key in _COLUMNS}
    for file in dict.fromkeys((path, path.with_name("test.csv"))):
        table = read_table(file) if file == path or file.is_file() else {}
        if file != path and table and (label := given.get("label", _COLUMNS["label"])) not in table:
            rank_zero_info(f"`data.source`: {file} has no column {label!r}, so it is no test set, and left out.")
            continue
        default = {"split": "train" if file == path else "test", "client": ""}
        for key, name in {**_COLUMNS, **given}.items() if table else ():
            if name not in table and key in default and not (file == path and key in given):
                found[key] += [default[key]] * len(next(iter(table.values())))
            else:
                found[key] += _filled(name, table) if "{" in name else column(table, name, f"columns.{key}")
    return found, np.array([s not in ("0", "0.0") and split_of(s)[0] != "train" for s in found["split"]])


def _filled(name: str, table: Table) -> list[str]:
    """Other columns' values in the place of their names."""
    try:
        return [name.format(**dict(zip(table, row, strict=True))) for row in zip(*table.values(), strict=True)]
    except KeyError as error:
        raise ValueError(f"`data.columns.image` names {error}, but the columns are {', '.join(table)}.") from error


def _pixels(images: list[Any]) -> Tensor:
    """LEAF's numbers in [0, 1] as square images ``[n, 1, H, W]``: as bytes where they were bytes."""
    if len(shapes := {np.shape(image) for image in images}) > 1:
        found = f"numbers of shapes {sorted(shapes)[:5]}"
        raise ValueError(f"`data.source`: samples are no images of one size; found {found}.")
    x = np.stack(images)
    side, whole = math.isqrt(x.shape[1]), np.rint(x * 255)
    if side**2 != x.shape[1]:
        raise ValueError(f"`data.source`: samples of {x.shape[1]} numbers are no square images.")
    exact = np.abs(x * 255 - whole).max() < 1e-3 and x.min() >= 0 and x.max() <= 1
    return torch.from_numpy(whole.astype(np.uint8) if exact else x).view(-1, 1, side, side)


def _files(images: list[str], path: Path, root: Path) -> list[Path]:
    """The files of images, by path, or else by name without suffix, below the folder of ``path`` or ``root``."""
    images = [image.replace("\\", "/") for image in images]  # as Windows writes them
    files = [path.parent / image for image in images]
    files = files if files[0].is_file() or not (root / images[0]).is_file() else [root / image for image in images]
    found = {} if files[0].is_file() else _by_name({*images}, (path.parent, root))
    files = [found.get(image, file) for image, file in zip(images, files, strict=True)]
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"`data.source` ({path}): {len(missing)} of {len(files)} images are missing, as {missing[0]}.")
    return files


def _by_name(wanted: set[str], places: Sequence[Path]) -> dict[str, Path]:
    """The image files that have these names, with or without their endings, in the first places that have them all."""
    found: dict[str, Path] = {}
    for place in places:
        for folder, _, names in os.walk(place, followlinks=True) if not wanted <= found.keys() else ():
            for name in (name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS):
                file = Path(folder, name)
                for known in wanted.intersection((name, file.stem)):
                    if not found.setdefault(known, file).samefile(file):
                        raise ValueError(f"`data.source`: {known!r} is {found[known]} or {file}; list images by paths.")
    return found
