"""Where images come from: a name, an ``.npz`` file or a folder. All become the same arrays in memory."""

from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.checks import path_of
from fedlight.data.files import has_idx, is_listed, load_idx, load_listed, load_npz
from fedlight.data.folders import load_folder
from fedlight.data.images import ImageArrays, as_images, check, say_shared
from fedlight.data.partition import rank_in_group
from fedlight.run.names import nearest

_TORONTO, _S3 = "https://www.cs.toronto.edu/~kriz", "https://ossci-datasets.s3.amazonaws.com/mnist"
_FASHION, _SVHN = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com", "http://ufldl.stanford.edu/housenumbers"
_TORCHVISION = {  # torchvision's class, its folder below the root, and where it comes from
    "cifar10": ("CIFAR10", "cifar-10-batches-py", f"{_TORONTO}/cifar-10-python.tar.gz, unpacked,"),
    "cifar100": ("CIFAR100", "cifar-100-python", f"{_TORONTO}/cifar-100-python.tar.gz, unpacked,"),
    "emnist": ("EMNIST", "EMNIST/raw", "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip, unpacked,"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", f"the four files of {_FASHION}, unpacked,"),
    "mnist": ("MNIST", "MNIST/raw", f"the four files of {_S3}, unpacked,"),
    "svhn": ("SVHN", ".", f"{_SVHN}/train_32x32.mat and test_32x32.mat"),
}
SOURCE_NAMES = ("digits", *sorted(_TORCHVISION))
_OFFLINE = "`data.source: digits` needs no download."


def load_source(
    source: str,
    root: str | Path = "data",
    image_size: int | None = None,
    test_domains: list[str] | None = None,
    test_fraction: float = 0.2,
    columns: Mapping[str, str] | None = None,
) -> ImageArrays:
    """Load images into memory and check them.

    Args:
        source: one of :data:`SOURCE_NAMES`, an ``.npz`` file, a folder of IDX files or of class folders, a folder of
            LEAF, or a CSV file that lists images.
        root: where the sources of torchvision are.
        image_size: height and width that the images of a folder are resized to.
        test_domains: the domains of a folder that are held out for the test.
        test_fraction: share of each class (and domain) that is held out of a folder without a test set.
        columns: which columns of a CSV file hold what.

    Raises:
        MisconfigurationException: if the source is not there, saying what to download where.
        ValueError: if it is not what it should be, naming the key.
    """
    path = path_of("data.source", source)
    if kept := [name for name, (_, folder, _) in _TORCHVISION.items() if path.name == folder and path.is_dir()]:
        raise ValueError(f"`data.source`: {path} is where {kept[0]} is kept: `source: {kept[0]}, root: {path.parent}`.")
    listed = path.exists() and is_listed(path)
    is_tree = source not in SOURCE_NAMES and path.is_dir() and not has_idx(path)
    if columns and not listed:
        raise ValueError(f"`data.columns` is for a `data.source` that is a CSV file, not for {source!r}.")
    for key, value in (("image_size", image_size), ("test_domains", test_domains)):
        if value and not (is_tree or listed):
            raise ValueError(f"`data.{key}` is for a `data.source` that is a folder of images, not for {source!r}.")
    if test_fraction != 0.2 and (source in SOURCE_NAMES or (path.is_dir() and not (is_tree or listed))):
        rank_zero_info(f"data.test_fraction={test_fraction:g} changes nothing, as {source} has a test set.")
    if source == "digits":
        arrays = _digits()
    elif source in _TORCHVISION:
        arrays = _torchvision(source, path_of("data.root", root), download=False)
    elif listed:
        arrays = load_listed(path, path_of("data.root", root), columns or {}, image_size, test_domains, test_fraction)
    elif is_tree:
        arrays = load_folder(path, image_size, test_domains, test_fraction)
    elif path.is_dir():
        arrays = load_idx(path)
    elif path.is_file():
        arrays = load_npz(path, test_fraction)
    else:
        raise MisconfigurationException(_not_found(source, path))
    check(arrays, source)
    trained, tested = ([hash(image.tobytes()) for image in x.numpy()] for x in (arrays.x_train, arrays.x_test))
    say_shared(f"`data.source` ({source}): {{}} test images are training images", trained, tested)
    return arrays


def download_source(source: str, root: str | Path) -> None:
    """Download a source of torchvision to ``root``, unless it is there; other sources are left alone."""
    if source in _TORCHVISION:
        _torchvision(source, path_of("data.root", root), download=True)


def _digits() -> ImageArrays:
    """scikit-learn's 1,797 handwritten digits, 1x8x8. Every fifth of a class, in the file's order, is a test image.

    They are read from its own file, as to load scikit-learn (and pandas) takes longer than a first round.
    """
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = np.loadtxt(str(file), delimiter=",")  # 64 levels from 0 to 16, and the digit
    x = torch.from_numpy(np.rint(rows[:, :64] * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    y = torch.from_numpy(rows[:, 64].astype(np.int64))
    test = rank_in_group(y) % 5 == 4
    return ImageArrays(x[~test], y[~test], x[test], y[test], classes=[str(c) for c in range(10)])


def _torchvision(name: str, root: Path, download: bool) -> ImageArrays:
    """Both splits of a torchvision dataset, as the arrays that it keeps."""
    from torchvision import datasets

    cls, folder, url = _TORCHVISION[name]
    of_all: dict[str, Any] = {"download": download} | ({"split": "balanced"} if name == "emnist" else {})
    splits = [{"split": "train"}, {"split": "test"}] if name == "svhn" else [{"train": True}, {"train": False}]
    try:
        both = [getattr(datasets, cls)(root, **of_all, **split) for split in splits]
    except (RuntimeError, OSError) as error:
        problem = f"is not in `data.root` ({root}). Set `data.download: true`, or bring"
        if download:
            problem = f"could not be downloaded to `data.root` ({root}): {error}. Bring"
        text = f"`data.source: {name}` {problem} {url} to {root / folder}. {_OFFLINE}"
        raise MisconfigurationException(text) from error
    x, _ = as_images({split: np.asarray(d.data) for split, d in zip(("train", "test"), both, strict=True)}, name)
    y = [torch.as_tensor(np.asarray(d.labels if name == "svhn" else d.targets)).long() for d in both]
    if name == "emnist":  # its files hold columns first
        x = [images.transpose(2, 3).contiguous() for images in x]
    return ImageArrays(x[0], y[0], x[1], y[1], classes=[str(c) for c in getattr(both[0], "classes", [])])


def _not_found(source: str, path: Path) -> str:
    if path.suffix == ".npz" or len(path.parts) > 1:
        return f"`data.source`: {path.absolute()} does not exist. {_OFFLINE}"
    hint = nearest(source.lower().replace("-", "_"), SOURCE_NAMES) or "."
    names = ", ".join(SOURCE_NAMES)
    return f"`data.source: {source}` is neither a known name ({names}) nor a file or folder{hint} {_OFFLINE}"
