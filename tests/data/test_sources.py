"""Sources: what is read from a name, an .npz file, IDX files and folders, and what is refused."""

import gzip
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image

from fedlight.data import load_source
from fedlight.data.images import channel_statistics, holdout
from fedlight.data.sources import download_source


def rng():
    return torch.Generator().manual_seed(0)


def test_digits_are_embedded_and_their_split_is_fixed():
    arrays = load_source("digits")
    assert arrays.x_train.dtype == torch.uint8
    assert arrays.x_train.shape[1:] == (1, 8, 8)
    assert len(arrays.y_train) + len(arrays.y_test) == 1797
    assert arrays.x_train.max() == 255
    per_class = torch.bincount(arrays.y_train) + torch.bincount(arrays.y_test)
    assert torch.bincount(arrays.y_test).tolist() == (per_class // 5).tolist()
    assert torch.equal(load_source("digits").x_test, arrays.x_test)


def test_digits_are_read_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    arrays = load_source("digits")
    # The first line of scikit-learn's file is a zero: 0, 0, 5, 13, 9, 1, 0, 0 of 16, 0, 0, 13, 15, 10, 15, 5, 0, ...
    assert arrays.y_train[0] == 0
    assert arrays.x_train[0, 0, :2].tolist() == [[0, 0, 80, 207, 143, 16, 0, 0], [0, 0, 207, 239, 159, 239, 80, 0]]


@pytest.mark.slow
def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    own, theirs = load_source("digits"), load_digits()
    images = torch.cat([own.x_train, own.x_test]).flatten(1).numpy()
    labels = torch.cat([own.y_train, own.y_test]).tolist()
    found = [(label, *image) for label, image in zip(labels, images, strict=True)]
    expected = zip(theirs.target, np.rint(theirs.data * (255 / 16)).astype(np.uint8), strict=True)
    assert sorted(found) == sorted((label, *image) for label, image in expected)


# ---- .npz


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {
        "x_train": generator.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(12) % 3,
        "x_test": generator.integers(0, 256, (6, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(6) % 3,
    }


@pytest.fixture
def load(tmp_path, arrays):
    """``load(x_train=...)``: the arrays with some replaced, written to a file and read as a source."""

    def load(test_fraction=0.2, **changes):
        held = {key: value for key, value in (arrays | changes).items() if value is not None}
        np.savez(tmp_path / "images.npz", **held)
        return load_source(str(tmp_path / "images.npz"), test_fraction=test_fraction)

    return load


def test_npz_of_bytes_with_channels_last(load, arrays):
    got = load(group_train=np.array([4, 5] * 6), classes=np.array(["a", "b", "c"]))
    assert got.x_train.shape == (12, 3, 6, 5)
    assert got.x_train.is_contiguous()
    assert torch.equal(got.x_train[3, 1], torch.from_numpy(arrays["x_train"][3, :, :, 1]))
    assert got.y_train.tolist() == arrays["y_train"].tolist()
    assert got.group_train.tolist() == [4, 5] * 6
    assert got.group_test is None
    assert got.classes == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((4, 6, 5), (1, 6, 5)), ((4, 1, 6, 5), (1, 6, 5)), ((4, 6, 5, 1), (1, 6, 5)), ((4, 3, 8, 8), (3, 8, 8))],
)
def test_npz_in_other_layouts(load, shape, expected):
    x = np.zeros(shape, dtype=np.uint8)
    got = load(x_train=x, y_train=np.zeros((4, 1)), x_test=x, y_test=np.zeros(4, dtype=np.int8))
    assert got.x_train.shape[1:] == expected
    assert got.y_train.dtype == got.y_test.dtype == torch.int64


def test_npz_of_other_numbers(load):
    floats = load(x_train=np.full((4, 6, 5), 0.25), y_train=np.zeros(4), x_test=np.zeros((2, 6, 5)), y_test=np.zeros(2))
    assert floats.x_train.dtype == torch.float32
    whole = np.full((4, 6, 5), 255, dtype=np.int64)
    assert load(x_train=whole, y_train=np.zeros(4), x_test=whole, y_test=np.zeros(4)).x_train.dtype == torch.uint8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "lacks y_test; it holds x_train, y_train, x_test"),
        ({"x_train": np.zeros((0, 6, 5, 3), np.uint8), "y_train": np.zeros(0, int)}, "x_train holds no image"),
        ({"y_train": np.zeros(5, int)}, "12 images, but y_train 5 labels"),
        ({"group_train": np.zeros(5, int)}, "group_train 5 groups"),
        ({"x_train": np.zeros((12, 6)), "y_train": np.zeros(12)}, r"x_train\) has shape \[12, 6\]"),
        ({"x_train": np.zeros((12, 7, 6, 5), np.uint8)}, r"has shape \[12, 7, 6, 5\]"),
        (
            {"x_train": np.zeros((12, 4, 4, 3), np.uint8)},
            r"training images are \[3, 4, 4\] and test images \[3, 6, 5\]",
        ),
        ({"x_train": np.full((12, 6, 5, 3), 300)}, "not clear what is white in x_train int64 300 .. 300"),
        ({"x_train": np.full((12, 6, 5, 3), np.nan)}, "12 images of x_train hold NaN or infinity, the first is 0"),
        ({"x_test": np.full((6, 6, 5, 3), np.inf)}, "6 images of x_test hold NaN"),
        ({"y_train": np.arange(12) - 1}, r"y_train lie in -1 \.\. 10"),
        ({"classes": np.array(["a", "b"])}, r"y_train lie in 0 \.\. 2, but must lie in 0 \.\. 1"),
        ({"y_test": np.arange(6) % 3 + 1}, r"y_test has labels that y_train has not: \[3\]. Write both from 0"),
        ({"y_train": np.arange(12) % 3 + 1}, r"y_test has labels that y_train has not: \[0\]. Write both from 0"),
        ({"y_train": np.array(["a"] * 12), "y_test": np.array(["b"] * 6)}, r"that y_train has not: \['b'\]"),
        ({"y_train": np.linspace(0, 1, 12)}, "one integer per image"),
        ({"y_train": np.array([np.nan] * 12)}, "one integer per image"),
        ({"y_train": np.zeros((12, 10))}, r"y_train\) has shape \[12, 10\]"),
        ({"y_train": np.array(["cat"] * 12)}, "one integer per image"),
        ({"y_train": np.array([{}] * 12)}, r"no.* readable .npz file: Object arrays .* np.array\(words, dtype=str\)"),
        ({"y_train": np.array(3)}, "x_train holds 12 images, but y_train 1 labels"),
        ({"classes": np.array("abc")}, r"y_train lie in 0 \.\. 2, but must lie in 0 \.\. 0"),
        ({"y_train": np.arange(12) % 3 * 10**6}, "labels go up to 2000000, which would be 2000001 classes. Number"),
    ],
)
def test_npz_that_cannot_be_trained_on(load, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        load(**changes)
    assert "`data.source`" in str(error.value)


def pictures(dtype, high, low=0, n=6):
    """``n`` grey pictures of 4x5 pixels, the first pixel the darkest and the last the lightest."""
    x = np.linspace(low, high, n * 20).reshape(n, 4, 5)
    return x.astype(dtype)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("dtype", "high", "white"),
    [
        ("u2", 65535, 65535), ("u2", 4095, 65535), ("u4", 65535, 65535), ("i4", 255, 255), ("u2", 255, 255),
        ("f4", 1, 1), ("f8", 255, 255), ("f2", 255, 255), ("f8", 65535, 65535),
    ],
)  # fmt: skip
def test_npz_of_every_type_of_number(load, dtype, high, white, order):
    x, y = pictures(order + dtype, high), np.arange(6)
    got = load(x_train=x, y_train=y, x_test=x[1:], y_test=y[1:])
    expected = torch.from_numpy(x.astype(np.float64) / white).float()
    bytes_ = dtype[0] != "f" and white == 255
    assert got.x_train.dtype == (torch.uint8 if bytes_ else torch.float32)
    assert torch.allclose(got.x_train[:, 0] / (255 if bytes_ else 1), expected)
    assert torch.allclose(got.x_test[:, 0] / (255 if bytes_ else 1), expected[1:])


def test_npz_whose_arrays_have_different_types_are_scaled_alike(load):
    y = np.arange(6)
    for other, exact in ((pictures("f4", 255), 255), (pictures("f4", 1), 1), (pictures("u2", 65535), 65535)):
        got = load(x_train=pictures("u1", 255), y_train=y, x_test=other, y_test=y)
        assert got.x_train.dtype == got.x_test.dtype == torch.float32
        assert torch.allclose(got.x_test[:, 0], torch.from_numpy(other.astype(np.float32)) / exact)
        assert got.x_train.max() == 1
    got = load(x_train=pictures("u1", 255), y_train=y, x_test=pictures("u1", 255) > 99, y_test=y)
    assert got.x_test.dtype == torch.uint8
    assert got.x_test.unique().tolist() == [0, 255]
    signed = load(x_train=pictures("f4", 2.5, -2), y_train=y, x_test=pictures("f4", 2, -2.5), y_test=y)
    assert (signed.x_train.min(), signed.x_train.max()) == (-2, 2.5)  # they have mean 0, and keep it


@pytest.mark.parametrize(
    "test",
    [
        pictures("u1", 1),
        pictures("f4", 2),
        pictures("f4", 1, -1),
        pictures("f4", 70000),
        pictures("i2", 255, -1),
        pictures("u4", 2**32 - 1),
    ],
)
def test_npz_in_which_white_is_not_clear(load, test):
    with pytest.raises(ValueError, match="not clear what is white in x_train uint8 0 .. 255, x_test"):
        load(x_train=pictures("u1", 255), y_train=np.arange(6), x_test=test, y_test=np.arange(6))


def test_npz_in_which_one_set_is_divided_by_255(load):
    with pytest.raises(ValueError, match="not clear what is white in x_train float32 0 .. 255, x_test float32 0 .. 1"):
        load(x_train=pictures("f4", 255), y_train=np.arange(6), x_test=pictures("f4", 1), y_test=np.arange(6))


@pytest.mark.parametrize(
    ("shape", "test", "expected"),
    [
        ((6, 4, 4, 3), (6, 4, 4, 3), (3, 4, 4)),  # square
        ((6, 3, 4, 4), (6, 3, 4, 4), (3, 4, 4)),
        ((6, 1, 28, 3), (6, 28, 3), (1, 28, 3)),  # the other array tells
        ((6, 1, 28, 3), (6, 1, 28, 3), None),
        ((6, 3, 28, 1), (6, 3, 28, 1), None),
        ((6, 3, 8, 4), (6, 3, 8, 4), None),
    ],
)
def test_npz_whose_channels_may_be_first_or_last(load, shape, test, expected):
    arrays = {"x_train": np.zeros(shape, np.uint8), "x_test": np.zeros(test, np.uint8)}
    if expected is None:
        with pytest.raises(ValueError, match=r"x_train \[.*\], x_test \[.*can be read in two ways.*\) or \("):
            load(**arrays, y_train=np.arange(6))
    else:
        assert load(**arrays, y_train=np.arange(6)).x_train.shape[1:] == expected


@pytest.mark.parametrize(
    "names",
    [
        ("train_images", "train_labels", "test_images", "test_labels"), ("X_train", "Y_train", "X_test", "Y_test"),
        ("trainX", "trainY", "testX", "testY"), ("images", "labels", "images_test", "labels_test"),
        ("x", "y", "x_val", "y_val"), ("train_data", "train_labels", "val_data", "val_labels"), ("X", "y", None, None),
    ],
)  # fmt: skip
def test_npz_with_other_names(load, arrays, names):
    held = {name: value for name, value in zip(names, arrays.values(), strict=True) if name}
    got = load(**dict.fromkeys(arrays), **held, note=np.arange(3), test_fraction=0.5)
    if names[2]:
        assert torch.equal(got.x_test, torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2))
        assert got.y_train.tolist() == arrays["y_train"].tolist()
    else:
        assert torch.bincount(got.y_train).tolist() == torch.bincount(got.y_test).tolist() == [2, 2, 2]


def test_npz_without_a_test_set_gives_up_a_share_of_each_class_and_group(load):
    x, y, group = np.zeros((40, 4, 5), np.uint8), np.arange(40) % 2, np.arange(40) // 2 % 2
    got = load(**dict.fromkeys(("x_test", "y_test")), x_train=x, y_train=y, group_train=group)
    assert torch.bincount(got.y_test * 2 + got.group_test).tolist() == [2] * 4
    for wrong in ({"y_train": y[:30]}, {"group_train": group[:30]}):
        with pytest.raises(ValueError, match="x_train holds 40 images, but y_train"):
            load(**{"x_test": None, "y_test": None, "x_train": x, "y_train": y, "group_train": group} | wrong)


def test_npz_of_medmnist(load, arrays, caplog):
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    held = dict(zip(keys, arrays.values(), strict=True)) | {
        "val_images": arrays["x_test"],
        "val_labels": arrays["y_test"],
    }
    caplog.set_level(logging.INFO)
    got = load(**dict.fromkeys(arrays), **{k: v[:, None] if "labels" in k else v for k, v in held.items()})
    assert (len(got.y_train), len(got.y_test)) == (12, 6)
    assert "test on test; x_val, y_val left out." in caplog.text


def test_npz_with_one_part_twice_or_without_names(load, arrays):
    with pytest.raises(ValueError, match="two ways: x_train, train_images have the same part"):
        load(train_images=arrays["x_train"])
    with pytest.raises(ValueError, match="lacks x_train, y_train; it holds arr_0, arr_1"):
        load(**dict.fromkeys(arrays), arr_0=arrays["x_train"], arr_1=arrays["y_train"])


@pytest.mark.parametrize(
    ("labels", "classes", "expected", "names"),
    [
        (["dog", "cat", "dog", "ant", "ant", "cat"], None, [2, 1, 2, 0, 0, 1], ["ant", "cat", "dog"]),
        (["dog", "cat", "dog", "ant", "ant", "cat"], ["dog", "cat", "ant"], [0, 1, 0, 2, 2, 1], ["dog", "cat", "ant"]),
        (np.eye(3)[[2, 0, 1, 1, 0, 2]], None, [2, 0, 1, 1, 0, 2], []),
        (np.array([[2.0], [0], [1], [1], [0], [2]]), None, [2, 0, 1, 1, 0, 2], []),
        ([3, 1, 2, 2, 1, 3], None, [2, 0, 1, 1, 0, 2], ["1", "2", "3"]),
        ([3, 1, 2, 2, 1, 3], ["a", "b", "c"], [2, 0, 1, 1, 0, 2], ["a", "b", "c"]),
        ([3, 1, 2, 2, 1, 3], ["none", "a", "b", "c"], [3, 1, 2, 2, 1, 3], ["none", "a", "b", "c"]),
        (["2", "10", "9", "9", "10", "2"], None, [0, 2, 1, 1, 2, 0], ["2", "9", "10"]),
        ([b"b", b"a", b"\xe9", b"\xc3\xa9", b"a", b"b"], None, [2, 1, 0, 3, 1, 2], [r"\xe9", "a", "b", "é"]),
        ([b"b", b"a"] * 3, [b"b", b"a"], [0, 1] * 3, ["b", "a"]),
        (np.array([True, False, True, False, True, False]), None, [1, 0, 1, 0, 1, 0], []),
    ],
)
def test_npz_with_labels_of_every_kind(load, arrays, labels, classes, expected, names):
    names_ = {"classes": np.array(classes)} if classes else {}
    got = load(x_train=arrays["x_test"], y_train=np.array(labels), y_test=np.array(labels), **names_)
    assert got.y_train.tolist() == got.y_test.tolist() == expected
    assert got.classes == names


def test_npz_with_string_groups_and_strange_names(load, arrays):
    got = load(group_train=np.array(["b", "a"] * 6))
    assert (got.group_train.tolist(), got.groups) == ([1, 0] * 6, ["a", "b"])
    with pytest.raises(ValueError, match=r"y_test hold \['cow'\], which are not among"):
        load(y_train=np.array(["a"] * 12), y_test=np.array(["cow"] * 6), classes=np.array(["a"]))
    with pytest.raises(ValueError, match="one string per image, or a row"):
        load(y_train=np.ones((12, 3)))  # several labels of one image


def test_what_an_npz_was_taken_for_is_said_once(load, caplog):
    with caplog.at_level(logging.INFO):
        load(y_train=np.arange(12) % 3 + 1, y_test=np.arange(6) % 3 + 1)
    (line,) = [r.message for r in caplog.records if "`data.source`" in r.message]
    for part in ("x_train uint8 0 .. 255", "as bytes", "labels 1 .. 3 as 0 .. 2", "test on test"):
        assert part in line


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04torn", b"\x93NUMPY\x01\0"])
def test_a_torn_file(tmp_path, content):
    (tmp_path / "images.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"`data\.source` .* is not a readable \.npz file"):
        load_source(str(tmp_path / "images.npz"))
    (tmp_path / "images.npz").rename(tmp_path / "images.pt")
    with pytest.raises(
        ValueError, match=r"images.pt\) is not .*: it must be one, a CSV file, or a folder. numpy.savez"
    ):
        load_source(str(tmp_path / "images.pt"))


def test_what_was_saved_is_read_back(load, tmp_path):
    before = load(group_train=np.array([0, 1] * 6), groups=np.array(["p", "q"]), classes=np.array(["a", "b", "c"]))
    before.save(tmp_path / "again.npz")
    after = load_source(str(tmp_path / "again.npz"))
    for name in ("x_train", "y_train", "x_test", "y_test", "group_train"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert after.group_test is None
    assert (after.classes, after.groups) == (before.classes, before.groups)


# ---- names that are not there


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "emnist", "fashion_mnist", "mnist", "svhn"])
def test_a_source_that_was_not_downloaded(name, tmp_path):
    with pytest.raises(MisconfigurationException) as error:
        load_source(name, root=tmp_path)
    for part in (f"`data.source: {name}`", "`data.root`", "`data.download: true`", "http", str(tmp_path), "digits"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(MisconfigurationException, match="cifar10` could not be downloaded.*no network.*digits"):
        download_source("cifar10", tmp_path)
    download_source("digits", tmp_path)  # nothing to do, no network


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifr10", "neither a known name .* did you mean 'cifar10'"),
        ("Fashion-MNIST", "did you mean 'fashion_mnist'"),
        ("somewhere/images.npz", "somewhere/images.npz does not exist"),
        ("zzz", "neither a known name"),
    ],
)
def test_a_source_that_is_not_known(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MisconfigurationException, match=message) as error:
        load_source(source)
    assert "`data.source" in str(error.value)
    assert "`data.source: digits` needs no download" in str(error.value)


def test_options_of_folders_are_refused_elsewhere():
    with pytest.raises(ValueError, match=r"`data\.image_size` is for .* not for 'digits'"):
        load_source("digits", image_size=32)
    with pytest.raises(ValueError, match=r"`data\.test_domains`"):
        load_source("digits", test_domains=["sketch"])


# ---- torchvision's own files, written here


def write_idx(folder: Path, name: str, array: np.ndarray, packed: bool = False) -> None:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path = folder / f"{name}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)


def write_mnist(
    folder: Path, packed: bool = False, prefix: tuple[str, str] = ("train", "t10k")
) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(1)
    held = {}
    for split, name, n in zip(("train", "test"), prefix, (9, 4), strict=True):
        held[f"x_{split}"] = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        held[f"y_{split}"] = np.arange(n) % 3
        write_idx(folder, f"{name}-images-idx3-ubyte", held[f"x_{split}"], packed)
        write_idx(folder, f"{name}-labels-idx1-ubyte", held[f"y_{split}"], packed)
    return held


@pytest.mark.parametrize(("source", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_through_torchvision(tmp_path, source, folder):
    held = write_mnist(tmp_path / folder / "raw")
    got = load_source(source, root=tmp_path)
    assert torch.equal(got.x_train[:, 0], torch.from_numpy(held["x_train"]))
    assert got.y_test.tolist() == held["y_test"].tolist()
    assert got.num_classes == 10


def test_the_folder_of_a_known_source_is_told_from_one_of_images(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match=f"is where cifar10 is kept: `source: cifar10, root: {tmp_path}`"):
        load_source(str(tmp_path / "cifar-10-batches-py"))


def test_emnist_is_turned_upright(tmp_path):
    prefix = "emnist-balanced-train", "emnist-balanced-test"
    held = write_mnist(tmp_path / "EMNIST" / "raw", prefix=prefix)
    got = load_source("emnist", root=tmp_path)
    assert torch.equal(got.x_train[:, 0], torch.from_numpy(held["x_train"]).transpose(1, 2))
    assert got.num_classes == 47


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_idx_files(tmp_path, packed):
    held = write_mnist(tmp_path / "idx", packed)
    got = load_source(str(tmp_path / "idx"))
    assert torch.equal(got.x_test[:, 0], torch.from_numpy(held["x_test"]))
    assert got.y_train.tolist() == held["y_train"].tolist()


def test_a_torn_idx_file(tmp_path):
    write_mnist(tmp_path / "idx")
    (tmp_path / "idx" / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\10\3\0\0")
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte .* missing or torn"):
        load_source(str(tmp_path / "idx"))


# ---- folders


def write_images(folder: Path, colours: list[int], size: tuple[int, int] = (4, 6), suffix: str = ".png") -> None:
    """One image per colour, whose red channel is that colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for colour in colours:
        Image.new("RGB", (size[1], size[0]), (colour, 0, 0)).save(folder / f"{colour:03}{suffix}")


def red(x):
    return x[:, 0, 0, 0].tolist()


def test_class_folders_without_a_test_set(tmp_path):
    write_images(tmp_path / "cat", list(range(10)))
    write_images(tmp_path / "dog", list(range(100, 120)))
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    got = load_source(str(tmp_path), test_fraction=0.2)
    assert got.classes == ["cat", "dog"]
    assert got.x_train.shape[1:] == (3, 4, 6)
    assert torch.bincount(got.y_train).tolist() == [8, 16]
    assert torch.bincount(got.y_test).tolist() == [2, 4]
    assert sorted(red(got.x_train) + red(got.x_test)) == [*range(10), *range(100, 120)]
    assert [value >= 100 for value in red(got.x_train)] == got.y_train.bool().tolist()
    again = load_source(str(tmp_path), test_fraction=0.2)
    assert red(again.x_test) == red(got.x_test)


@pytest.mark.parametrize("test", ["test", "val"])
def test_class_folders_with_a_test_set(tmp_path, test):
    for split, colours in (("train", [1, 2]), (test, [3])):
        write_images(tmp_path / split / "cat", colours)
        write_images(tmp_path / split / "dog", [c + 100 for c in colours])
    got = load_source(str(tmp_path))
    assert red(got.x_train) == [1, 2, 101, 102]
    assert (red(got.x_test), got.y_test.tolist()) == ([3, 103], [0, 1])


def test_tiny_imagenet_as_it_is_distributed(tmp_path):
    write_images(tmp_path / "train" / "n01" / "images", [1, 2])
    write_images(tmp_path / "train" / "n02" / "images", [3])
    write_images(tmp_path / "val" / "images", [4, 5])
    (tmp_path / "val" / "val_annotations.txt").write_text("004.png\tn02\t0\t0\t9\t9\n005.png\tn01\t0\t0\t9\t9\n")
    write_images(tmp_path / "test" / "images", [6])  # without labels
    got = load_source(str(tmp_path))
    assert (red(got.x_train), got.y_train.tolist()) == ([1, 2, 3], [0, 0, 1])
    assert (red(got.x_test), got.y_test.tolist()) == ([4, 5], [1, 0])


@pytest.fixture
def domains(tmp_path):
    for d, domain in enumerate(("art", "photo", "sketch")):
        write_images(tmp_path / domain / "cat", [d * 50 + i for i in range(5)])
        write_images(tmp_path / domain / "dog", [d * 50 + 20 + i for i in range(10)])
    return tmp_path


def test_domains_become_groups(domains):
    got = load_source(str(domains), test_fraction=0.2)
    assert (got.classes, got.groups) == (["cat", "dog"], ["art", "photo", "sketch"])
    strata = torch.bincount(got.group_test * 2 + got.y_test)
    assert strata.tolist() == [1, 2] * 3
    assert [value // 50 for value in red(got.x_train)] == got.group_train.tolist()


def test_a_domain_held_out_for_the_test(domains):
    got = load_source(str(domains), test_domains=["photo"])
    assert set(got.group_train.tolist()) == {0, 2}
    assert set(got.group_test.tolist()) == {1}
    assert len(got.y_test) == 15


@pytest.mark.parametrize("test_domains", [["sketc"], ["art", "photo", "sketch"]])
def test_domains_that_cannot_be_held_out(domains, test_domains):
    with pytest.raises(ValueError, match=r"`data\.test_domains` is .*\['art', 'photo', 'sketch'\]"):
        load_source(str(domains), test_domains=test_domains)


def test_images_of_different_sizes_need_a_size(tmp_path):
    write_images(tmp_path / "cat", [1, 2, 3, 4, 5])
    write_images(tmp_path / "dog", [9], size=(5, 5))
    write_images(tmp_path / "dog", [6, 7, 8])
    with pytest.raises(ValueError, match=r"009.png is 5x5, but the first image is 4x6. Set `data\.image_size`"):
        load_source(str(tmp_path))
    assert load_source(str(tmp_path), image_size=3).x_train.shape[1:] == (3, 3, 3)
    with pytest.raises(ValueError, match=r"`data\.image_size` must be at least 1"):
        load_source(str(tmp_path), image_size=-3)


def test_folders_that_cannot_be_read(tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"`data\.source` .* no image in <class>/"):
        load_source(str(tmp_path / "empty"))
    write_images(tmp_path / "torn" / "cat", [1, 2, 3, 4, 5])
    (tmp_path / "torn" / "cat" / "001.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="001.png is not a readable image"):
        load_source(str(tmp_path / "torn"))
    with pytest.raises(ValueError, match=r"`data\.test_fraction` must lie between 0 and 1, got 1.5"):
        load_source(str(tmp_path / "torn"), test_fraction=1.5)
    write_images(tmp_path / "foreign" / "train" / "cat", [1])
    write_images(tmp_path / "foreign" / "test" / "dog", [1])
    with pytest.raises(ValueError, match=r"classes without a training image: \['dog'\]"):
        load_source(str(tmp_path / "foreign"))


# ---- on arrays


def test_holdout_takes_the_same_share_of_every_stratum():
    strata = torch.repeat_interleave(torch.tensor([0, 3, 1]), torch.tensor([10, 20, 3]))
    keep, out = holdout(strata, 0.3, rng())
    assert torch.bincount(strata[out]).tolist() == [3, 1, 0, 6]
    assert torch.equal(torch.cat([keep, out]).sort().values, torch.arange(33))
    assert torch.equal(keep, keep.sort().values)


def test_channel_statistics():
    x = torch.randint(0, 256, (5000, 2, 3, 3), dtype=torch.uint8, generator=rng())
    x[:, 1] = 51
    mean, std = channel_statistics(x)
    values = x[:, 0].double() / 255
    assert mean == pytest.approx([values.mean().item(), 0.2])
    assert std == pytest.approx([values.std(unbiased=False).item(), 1.0])  # a constant channel is not divided by zero
    floats = channel_statistics(x.double() / 255)
    assert floats[0] == pytest.approx(mean)
    assert floats[1] == pytest.approx(std)


# ---- the real thing, where it is at hand


@pytest.mark.slow
def test_real_cifar100(shared_data):
    got = load_source(str(shared_data("cifar100")))
    assert got.x_train.shape == (50_000, 3, 32, 32)
    assert torch.bincount(got.y_train).tolist() == [500] * 100
    assert torch.bincount(got.y_test).tolist() == [100] * 100
    assert got.classes[:2] == ["apple", "aquarium_fish"]
    mean, std = channel_statistics(got.x_train[::10])
    assert mean == pytest.approx([0.5071, 0.4867, 0.4408], abs=5e-3)
    assert std == pytest.approx([0.2675, 0.2565, 0.2761], abs=5e-3)


@pytest.mark.slow
def test_real_pacs(shared_data):
    got = load_source(str(shared_data("pacs64")), test_domains=["sketch"])
    assert got.groups == ["art_painting", "cartoon", "photo", "sketch"]
    assert torch.bincount(got.group_train).tolist() == [2048, 2344, 1670]
    assert len(got.y_test) == 3929
    assert got.num_classes == 7


def test_real_fashion_mnist():
    folder = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
    if not folder.is_dir():
        pytest.skip(f"Fashion-MNIST is not in {folder}")
    got = load_source(str(folder))
    assert got.x_train.shape == (60_000, 1, 28, 28)
    mean, std = channel_statistics(got.x_train[::10])
    assert (mean[0], std[0]) == pytest.approx((0.2860, 0.3530), abs=5e-3)


@pytest.mark.parametrize("shared", [0, 3])
def test_images_of_both_sets_are_counted_once_and_not_before_a_set_is_divided(tmp_path, caplog, shared):
    x = np.arange(20 * 9, dtype=np.uint8).reshape(20, 3, 3)
    test = {"x_test": np.concatenate([x[:3], 255 - x[:7]]), "y_test": np.arange(10) % 2} if shared else {}
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(20) % 2, **test)
    with caplog.at_level(logging.INFO):
        load_source(tmp_path / "a.npz")
    assert [r.message.count("3 of 10 test images are") for r in caplog.records if "accuracies" in r.message] == (
        [1] if shared else []
    )
