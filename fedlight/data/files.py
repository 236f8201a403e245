"""Images in files: ``.npz``, MNIST's IDX; LEAF's JSON, and CSV files that list images with labels and clients."""

import gzip
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor

from fedlight.data.folders import EXTENSIONS, in_order, named, split_of, walk
from fedlight.data.images import ImageArrays, as_images, check, held_out_for_test, take
from fedlight.data.pixels import read_images
from fedlight.data.tables import DELIMITERS, Table, coded, column, ending_of, is_leaf, read_leaf, read_table

_ROLES = {"x": "x|images?|imgs?|data|inputs?|features?|pixels?", "y": "y|labels?|targets?", "group": "groups?"}


def load_npz(path: Path, test_fraction: float = 0.2) -> ImageArrays:
    """Read images, labels and, where they exist, groups and names; say what each array was taken for.

    Arrays are called as in :class:`ImageArrays`, or ``X``, ``train_images``, ``labels_test`` and the like. Without a
    test set, ``val`` is the test set; without that, ``test_fraction`` of each class.
    """
    try:
        # Opened here: NumPy leaves a file open that turns out to be torn.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = list(file.files)
            held = {key: _array(file[key]) for key in found if _role(key) or key in ("classes", "groups")}
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        what = f"{error}. Strings are written as np.array(words, dtype=str)" if "Object" in str(error) else str(error)
        if path.suffix != ".npz":
            what = "it must be one, a CSV file, or a folder. numpy.savez(file, x_train=..., y_train=...) writes one"
        raise ValueError(f"`data.source` ({path}) is not a readable .npz file: {what}") from error
    where, names = f"`data.source` ({path})", {key: held.pop(key, np.array([])) for key in ("classes", "groups")}
    roles = [_role(key) for key in held]
    if twice := [key for key in held if roles.count(_role(key)) > 1]:
        raise ValueError(f"{where} can be read in two ways: {', '.join(twice)} have the same part. Keep one of them.")
    arrays = {role: (key, array) for role, (key, array) in zip(roles, held.items(), strict=True) if role}
    test = next((split for split in ("test", "val") if {f"x_{split}", f"y_{split}"} & arrays.keys()), None)
    splits = ["train", test] if test else ["train"]
    if missing := [f"{part}_{split}" for split in splits for part in "xy" if f"{part}_{split}" not in arrays]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it holds {', '.join(found) or 'nothing'}.")
    x, said = as_images(dict(arrays[f"x_{split}"] for split in splits), str(path))
    y, classes, told = _codes(dict(arrays[f"y_{split}"] for split in splits), names["classes"], where)
    grouped = [split for split in splits if f"group_{split}" in arrays]
    codes, groups, _ = _codes(dict(arrays[f"group_{s}"] for s in grouped), names["groups"], where, shift=False)
    unused = ", ".join(role for role in arrays if role.split("_")[1] not in splits)
    tested = (test or f"{test_fraction:g} of each class") + f"; {unused} left out" * bool(unused)
    rank_zero_info(f"{where}: {said}; {told or 'labels as they are'}; test on {tested}.")
    group = dict(zip(grouped, codes, strict=True))
    # Without a test set all is taken for both, and divided then.
    both = ImageArrays(x[0], y[0], x[-1], y[-1], group.get("train"), group.get(splits[-1]), classes, groups)
    check(both, str(path))
    if test:
        strange = sorted({*y[1].tolist()} - {*y[0].tolist()})
        if strange and not len(names["classes"]):
            raise ValueError(
                f"{where}: y_{test} has labels that y_train has not: {[classes[i] if classes else i for i in strange]}."
                " Write both from 0 on; or give the names of all classes as `classes`, if some are not trained on."
            )
        return both
    _, strata = torch.unique(torch.stack([y[0], *codes]), dim=1, return_inverse=True)
    return take(both, *held_out_for_test(strata, test_fraction))


def _array(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """An array with an axis of samples, and bytes as strings."""
    array = np.atleast_1d(array)
    return np.char.decode(array, "utf-8", "backslashreplace") if array.dtype.kind == "S" else array


def _role(key: str) -> str | None:
    """What an array is by its name: ``x_train``, ``y_test``, ``group_val``; None if it tells nothing."""
    split, words = split_of(key)
    parts = [part for part, spellings in _ROLES.items() if len(words) == 1 and re.fullmatch(spellings, words[0])]
    return f"{parts[0]}_{split or 'train'}" if parts and key not in ("classes", "groups") else None


def _codes(
    held: dict[str, np.ndarray[Any, Any]], names: np.ndarray[Any, Any], where: str, shift: bool = True
) -> tuple[list[Tensor], list[str], str]:
    """Labels or groups as numbers ``[n]`` int64, the names of these, and what was done.

    Taken are whole numbers of any type, also ``[n, 1]``; one-hot rows; and strings, numbered in the order of ``names``
    or else as they sort. Labels that begin at 1 are moved to 0.
    """
    columns, known, told = {}, [str(name) for name in names], ""
    for key, values in held.items():
        columns[key] = values.reshape(len(values)) if values.size == len(values) else values
        if values.ndim == 2 and values.shape[1] > 1 and np.isin(values, (0, 1)).all() and (values.sum(1) == 1).all():
            columns[key], told = values.argmax(1), "labels from one-hot rows"
    if columns and all(values.ndim == 1 and values.dtype.kind == "U" for values in columns.values()):
        words = [values.tolist() for values in columns.values()]
        known = known or in_order(set().union(*words))
        if strange := sorted(set().union(*words) - set(known)):
            raise ValueError(f"{where}: {', '.join(held)} hold {strange[:5]}, which are not among {known[:5]}.")
        number = {name: i for i, name in enumerate(known)}
        return [torch.tensor([number[word] for word in part]) for part in words], known, "labels from strings"
    for key, values in columns.items():
        number_like = values.ndim == 1 and values.dtype.kind in "iufb"
        if not (number_like and bool((values == np.rint(values.astype(float))).all())):
            what = "one integer per image, one string per image, or a row that is 1 at the class and 0 elsewhere"
            found = f"has shape {list(values.shape)} and type {values.dtype}"
            raise ValueError(f"{where} ({key}) {found}; it must be {what}.")
    codes = [torch.from_numpy(values.astype(np.int64)) for values in columns.values()]
    low, high = (int(f(torch.cat(codes))) if codes and len(codes[0]) else 0 for f in (torch.min, torch.max))
    if shift and low == 1 and len(known) in (0, high):
        codes, told = [code - 1 for code in codes], f"labels 1 .. {high} as 0 .. {high - 1}"
        known = known or [str(label) for label in range(1, high + 1)]
    if shift and high >= 1000 * len(torch.unique(torch.cat(codes))):
        raise ValueError(f"{where}: labels go up to {high}, which would be {high + 1} classes. Number them from 0 on.")
    return codes, known, told


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
            there = name in table
            if key == "client" and file != path:  # a test set needs none, and so not for every sample
                there = there and not any(value is None or value != value for value in table[name])
            if not there and key in default and not (file == path and key in given):
                found[key] += [default[key]] * len(next(iter(table.values())))
            else:
                found[key] += _filled(name, table) if "{" in name else column(table, name, f"columns.{key}")
    # 0 is for training, and in a column as `is_train` it is not.
    of, no = split_of(given.get("split", _COLUMNS["split"]))[0] == "train", ("0", "0.0", "false", "no")
    kinds = ((s.lower() in no, split_of(s)[0]) for s in found["split"])
    return found, np.array([kind != "train" if kind else is_no == of for is_no, kind in kinds])


def _filled(name: str, table: Table) -> list[str]:
    """Other columns' values in the place of their names."""
    try:
        return [name.format(**dict(zip(table, row, strict=True))) for row in zip(*table.values(), strict=True)]
    except (KeyError, IndexError, ValueError) as error:
        found = ", ".join(filter(None, table))
        raise ValueError(
            f"`data.columns.image` ({name!r}): {type(error).__name__} {error}; the columns are {found}."
        ) from error


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
        for folder, _, names in walk(place) if not wanted <= found.keys() else ():
            for name in (name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS):
                file = folder / name
                for known in wanted.intersection((name, file.stem)):
                    if not found.setdefault(known, file).samefile(file):
                        raise ValueError(f"`data.source`: {known!r} is {found[known]} or {file}; list images by paths.")
    return found
