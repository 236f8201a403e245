"""Trees of image files: class folders, with splits or one level of domains above them."""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor

from fedlight.checks import check_whole
from fedlight.data.images import ImageArrays, held_out_for_test
from fedlight.data.pixels import read_images

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".bmp", ".gif", ".webp", ".avif"}
EXTENSIONS |= {".ppm", ".pgm", ".tif", ".tiff"}
_NOT_DATA = (".", "__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "lost+found")  # hidden files, macOS's ._x.jpg, too
_SPELLINGS = {
    "train": "training|train|trn",
    "val": "validation|validating|validate|valid|val|development|devel|dev|evaluation|eval",
    "test": "testing|tests|test|tst",
}
FILLERS = "sets?|data(?:sets?)?|images?|imgs?|splits?|samples?|folder|dir|the|my"
_WORD = re.compile(rf"({FILLERS}|x|y)??({'|'.join(_SPELLINGS.values())})({FILLERS}|x|y|labels?)?")


@dataclass(frozen=True)
class _File:
    path: Path
    folders: tuple[str, ...]  # those that it lies in; in the end (class,) or (domain, class)
    split: str = ""

    @property
    def label(self) -> str:
        return self.folders[-1]

    @property
    def domain(self) -> str:
        return self.folders[0] if len(self.folders) > 1 else ""


def load_folder(
    root: Path, image_size: int | None = None, test_domains: list[str] | None = None, test_fraction: float = 0.2
) -> ImageArrays:
    """Read all images below a folder; domains become groups. Settings are as for ``load_source``.

    Layouts: ``<class>/``, ``<domain>/<class>/``, and either of them with ``train/`` and ``test/`` (or ``val/``) in any
    usual spelling, at any level. Folders that all images share tell nothing. A class folder may keep its files in
    ``images/``, and ``val/`` may name its classes in ``val_annotations.txt``, as Tiny-ImageNet does. A tree that can be
    read in two ways is refused.
    """
    if image_size is not None:
        check_whole("`data.image_size`", image_size)
    files, test_files, said = read_tree(root, EXTENSIONS, test_domains, test_fraction)
    domains = sorted({f.domain for f in files + test_files} - {""})
    classes = in_order({f.label for f in files})
    foreign = sorted({f.label for f in test_files} - set(classes))
    if foreign:
        raise ValueError(f"`data.source` ({root}): the test set has classes without a training image: {foreign[:5]}.")
    x = read_images([f.path for f in files + test_files], image_size)
    (y, group), (y_test, group_test) = (_labels(part, classes, domains) for part in (files, test_files))
    shape = " x ".join(map(str, x.shape[1:])) + ("" if x.dtype == torch.uint8 else " of more than 8 bits, as float32")
    found = f"{len(files)} training and {len(test_files)} test images, {shape}; {named(classes)}"
    rank_zero_info(f"`data.source` ({root}): {found}, {len(domains) or 'no'} domains; {said}.")
    return ImageArrays(x[: len(y)], y, x[len(y) :], y_test, group, group_test, classes, domains)


def read_tree(
    root: Path, suffixes: Collection[str], test_domains: list[str] | None = None, test_fraction: float = 0.2
) -> tuple[list[_File], list[_File], str]:
    """The files of a tree that end so, for training and for the test, and how it was read; as :func:`load_folder`."""
    files, test_files, said = _split(root, suffixes)
    everything = files + test_files
    domains = sorted({f.domain for f in everything} - {""})
    if test_domains:
        if not set(test_domains) < set(domains):
            raise ValueError(f"`data.test_domains` is {test_domains}, but must be some of {domains}, and not all.")
        files, test_files = ([f for f in everything if (f.domain in test_domains) == held] for held in (False, True))
        said = f"test on the domains {test_domains}"
    if not test_files:
        _, strata = np.unique(["/".join(f.folders) for f in files], return_inverse=True)
        both = held_out_for_test(torch.from_numpy(strata), test_fraction)
        files, test_files = ([files[row] for row in rows.tolist()] for rows in both)
        said = f"test on {test_fraction:g} of each class{said}"
    return files, test_files, said


def _split(root: Path, suffixes: Collection[str]) -> tuple[list[_File], list[_File], str]:
    """The files for training and for the test, which are none where the tree does not tell; and how it was read."""
    files = _without_splits(root, _walk(root, suffixes))
    labelled = [f for f in files if f.folders]
    if not any(f.split in ("", "train") for f in labelled):
        splits = ", ".join(sorted({f.split for f in files if f.split}))
        kind = "image" if ".png" in suffixes else "text"
        raise ValueError(
            f"`data.source` ({root}) is a folder, but there is no {kind} in <class>/, <domain>/<class>/ or "
            f"train/<class>/ below it; it holds {len(files)} {kind}s{f' and the splits {splits}' if splits else ''}."
        )
    depth = max(len(f.folders) for f in labelled)
    told = [i for i in range(depth) if i == depth - 1 or len({f.folders[i : i + 1] for f in labelled}) > 1]
    labelled = [replace(f, folders=tuple(f.folders[i] for i in told if i < len(f.folders))) for f in labelled]
    layouts = {(len(f.folders), bool(f.split)): f.path.relative_to(root) for f in labelled}
    if len(layouts) > 1 or len(told) > 2:
        raise ValueError(
            f"`data.source` ({root}): all images must lie in <class>/, or all in <domain>/<class>/, and all or none "
            f"below splits, but there are {', '.join(map(str, layouts.values()))}. Move what does not belong there."
        )
    places = {(f.domain, f.label) for f in labelled if f.domain}
    if len(domains := {domain for domain, _ in places}) > 1 and len({label for _, label in places}) == len(places):
        uppers, lowers = sorted(domains)[:3], sorted(label for _, label in places)[:3]
        raise ValueError(
            f"`data.source` ({root}): its folders can be read in two ways, as no two of {uppers} hold a folder of one"
            f" name. Either these are the classes: then move the images of {lowers} up into them. Or {lowers} are, and"
            " none is in two domains: then move them up beside one another."
        )
    train = [f for f in labelled if f.split in ("", "train")]
    classes = {f.label for f in train}
    found = [part for split in ("test", "val") if (part := [f for f in labelled if f.split == split])]
    # A test set of other classes is passed over if val/ has those of train/.
    test = next((part for part in found if {f.label for f in part} <= classes), found[0] if found else [])
    said = f"test on the split {test[0].split!r}" if test else ""
    left = len(files) - len(train) - len(test)
    return train, test, said + (f"; {left} images of another split or in no class folder are left out" if left else "")


def _walk(root: Path, suffixes: Collection[str]) -> list[_File]:
    """All images of a tree, sorted, with the folders that each lies in; Tiny-ImageNet's table is as good as folders."""
    files, bare, other = list[_File](), list[str](), list[str]()
    for path, inner, names in walk(root):
        folders, table = path.relative_to(root).parts, path.parent / "val_annotations.txt"
        folders = folders[:-1] if folders and folders[-1].lower() == "images" else folders
        rows = [line.split("\t") for line in table.read_text().splitlines()] if table.is_file() else []
        labels = {row[0]: row[1:2] for row in rows}
        chosen = [n for n in names if os.path.splitext(n)[1].lower() in suffixes]
        bare += [] if inner or chosen else [str(path)]
        other += [str(path / n) for n in sorted({*names} - {*chosen}) if chosen]
        files += [_File(path / n, (*folders, *labels.get(n, ()))) for n in chosen]
    if bare:
        rank_zero_info(f"`data.source`: {len(bare)} folders hold nothing to read and are no class, as {bare[0]}.")
    if other:
        rank_zero_info(f"`data.source`: {len(other)} files beside them are of other kinds and left out, as {other[0]}.")
    return files


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder of a tree with the names of the folders and files in it that hold data; links have an end."""
    for place, inner, names in os.walk(root, onerror=_refuse, followlinks=True):
        path = Path(place)
        up = {above.resolve() for above in (path, *path.parents)} | {*path.resolve().parents}
        inner[:] = sorted(n for n in inner if not n.startswith(_NOT_DATA) and (path / n).resolve() not in up)
        yield path, inner, sorted(n for n in names if not n.startswith(_NOT_DATA))


def _refuse(error: OSError) -> None:
    raise ValueError(f"`data.source`: {error.filename} cannot be read: {error.strerror}.") from error


def _without_splits(root: Path, files: list[_File]) -> list[_File]:
    """The level of folders that are called as splits are becomes ``split``, wherever it is.

    A class may be called ``train``, too: its folder holds images itself, and no neighbour is called as another split.
    """
    for i in reversed(range(max((len(f.folders) for f in files), default=0))):
        deep = [f for f in files if len(f.folders) > i]
        names = {f.folders[i] for f in deep}
        kinds = splits_among(names)
        found = [f for f in deep if f.folders[i] in kinds]
        mixed = len(found) < len(deep)
        if not found or (mixed and len(set(kinds.values())) == 1 and all(len(f.folders) == i + 1 for f in found)):
            continue
        places = {f.folders[: i + 1]: (f.folders[:i], kinds[f.folders[i]]) for f in found}
        clash = len(set(places.values())) < len(places) or any(f.split not in ("", kinds[f.folders[i]]) for f in found)
        if mixed or clash or "train" not in {*kinds.values(), *(f.split for f in files)}:
            splits, others = sorted(kinds), sorted(names - kinds.keys())
            raise ValueError(
                f"`data.source` ({root}): its folders can be read in two ways. Either {splits} are splits"
                f"{f', and {others[:5]} do not belong beside them' if others else ', but not one training set'}; or "
                f"{sorted(names)[:5]} are all classes or domains. Rename {splits}, or move the others elsewhere."
            )
        cut = [replace(f, folders=f.folders[:i] + f.folders[i + 1 :], split=kinds[f.folders[i]]) for f in deep]
        files = sorted([*cut, *(f for f in files if len(f.folders) <= i)], key=lambda f: f.path)
    return files


def _labels(files: list[_File], classes: list[str], domains: list[str]) -> tuple[Tensor, Tensor | None]:
    """Class and domain of each file, as numbers."""
    number = {name: i for i, name in enumerate(classes)}
    y = torch.tensor([number[f.label] for f in files], dtype=torch.int64)
    return y, torch.from_numpy(np.searchsorted(domains, [f.domain for f in files])) if domains else None


def named(classes: Sequence[str]) -> str:
    """How many classes there are, and what the first are called."""
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def in_order(names: Collection[str]) -> list[str]:
    """Names as they sort, and by size if all are whole numbers: 2 comes before 10."""
    return sorted(sorted(names), key=int if all(map(str.isdecimal, names)) else None)


def split_of(name: str) -> tuple[str | None, list[str]]:
    """Which split a name tells of: ``train``, ``val``, ``test`` or None; and its other words, lower case, no digits."""
    kinds, rest = [], []
    for word in re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)):
        found = _WORD.fullmatch(word.lower())
        rest += [part for part in (found.group(1, 3) if found else [word.lower()]) if part]
        kinds += [kind for kind, words in _SPELLINGS.items() if found and re.fullmatch(words, found[2])]
    return (kinds[0] if len(kinds) == 1 else None), rest


def splits_among(names: Collection[str]) -> dict[str, str]:
    """The split of each folder that is one: called just that, or as another but for it (`seg_train`, `seg_test`)."""
    kinds = {name: split_of(name)[0] for name in names}
    rest = {name: [word for word in split_of(name)[1] if not re.fullmatch(FILLERS, word)] for name in names}
    alike = {name: {kinds[other] for other in names if rest[other] == rest[name]} - {None} for name in names}
    return {name: kind for name, kind in kinds.items() if kind and (not rest[name] or len(alike[name]) > 1)}
