"""Trees of folders: which are splits, domains and classes, and which can be read in two ways."""

import logging
import os

import pytest
import torch
from PIL import Image

from fedlight.data import load_source
from fedlight.data.folders import split_of, walk


def tree(root, layout):
    """``{"train/cat": [1, 2]}``: a folder with one grey image for each number, which is its colour."""
    for folder, colours in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for colour in colours:
            Image.new("L", (2, 2), colour).save(root / folder / f"{colour:03}.png")
    return str(root)


def values(x):
    return sorted(x[:, 0, 0, 0].tolist())


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"), ("Train", "Test"), ("TRAIN", "TEST"), ("training", "validation"), ("train", "valid"),
        ("train", "dev"), ("train", "eval"), ("trainset", "testset"), ("train_set", "val_set"), ("train-data", "tests"),
        ("train_images", "test_images"), ("train2017", "val2017"), ("TrainingSet", "Validation"), ("1_train", "2_test"),
        ("seg_train", "seg_test"), ("asl_alphabet_train", "asl_alphabet_test"), ("train", "Evaluation"),
    ],
)  # fmt: skip
def test_splits_are_known_in_their_usual_spellings(tmp_path, train, test):
    got = load_source(
        tree(tmp_path, {f"{train}/cat": [1, 2], f"{train}/dog": [3], f"{test}/cat": [4], f"{test}/dog": [5]})
    )
    assert (values(got.x_train), values(got.x_test)) == ([1, 2, 3], [4, 5])
    assert (got.classes, got.groups) == (["cat", "dog"], [])


@pytest.mark.parametrize("name", ["trainer", "station", "contest", "rainy", "value", "devices", "latest", "tr", "te"])
def test_names_that_only_look_like_splits(name):
    assert split_of(name)[0] is None


@pytest.mark.parametrize(
    "where",
    [
        "{split}/{domain}/{label}",
        "{domain}/{split}/{label}",
        "{domain}/{label}/{split}",
        "data/images/{split}/{domain}/{label}",
        "{split}/images/{domain}/{label}",
        "{domain}/{split}/{label}/images",
    ],
)
def test_splits_at_any_level_of_domains(tmp_path, where):
    layout, number = {}, 0
    for split in ("train", "test"):
        for domain in ("art", "photo"):
            for label in ("cat", "dog"):
                layout[where.format(split=split, domain=domain, label=label)] = [number, number + 1]
                number += 2
    got = load_source(tree(tmp_path, layout))
    assert (got.classes, got.groups) == (["cat", "dog"], ["art", "photo"])
    assert (values(got.x_train), values(got.x_test)) == (list(range(8)), list(range(8, 16)))
    for x, y, group, first in (
        (got.x_train, got.y_train, got.group_train, 0),
        (got.x_test, got.y_test, got.group_test, 8),
    ):
        number = (x[:, 0, 0, 0].long() - first) // 2
        assert torch.equal(y, number % 2)
        assert torch.equal(group, number // 2)


@pytest.mark.parametrize(
    "where", ["{label}/{split}", "{split}/{split}/{label}", "top/{split}/{label}", "{split}/images/{label}"]
)
def test_splits_at_any_level_of_classes(tmp_path, where):
    names = [(split, label) for split in ("train", "test") for label in ("cat", "dog")]
    got = load_source(tree(tmp_path, {where.format(split=s, label=c): [i] for i, (s, c) in enumerate(names)}))
    assert (got.classes, got.groups) == (["cat", "dog"], [])
    assert (values(got.x_train), values(got.x_test)) == ([0, 1], [2, 3])


def test_a_class_may_be_called_train(tmp_path):
    got = load_source(tree(tmp_path / "flat", {"train": range(5), "bus": range(5, 10)}))
    assert got.classes == ["bus", "train"]
    layout = {f"{d}/{c}": range(5) for d in ("clipart", "sketch") for c in ("bus", "train")}
    assert load_source(tree(tmp_path / "domains", layout)).classes == ["bus", "train"]
    visda = {f"{d}/{c}": range(5) for d in ("train", "validation") for c in ("bus", "train")}
    got = load_source(tree(tmp_path / "visda", visda))
    assert (got.classes, got.groups, len(got.y_train)) == (["bus", "train"], [], 10)


@pytest.mark.parametrize(
    "layout",
    [
        {"train/cat": [1], "test/cat": [2], "cat": [3]},  # a class beside splits
        {"train/cat": [1], "test/cat": [2], "extra/cat": [3]},
        {"train/cat": [1], "photo/cat": [2], "sketch/cat": [3]},  # domains beside a split
        {"train": [1], "test": [2], "cat": [3]},
        {"art/train/cat": [1], "art/test/cat": [2], "photo/cat": [3]},
        {"train/cat": [1], "Training/cat": [2]},  # two training sets
        {"test/cat": [1], "val/cat": [2]},  # none
        {"train/test/cat": [1], "train/train/cat": [2]},
    ],
)
def test_a_tree_that_can_be_read_in_two_ways_is_refused_with_both(tmp_path, layout):
    with pytest.raises(
        ValueError, match=r"`data.source` .*can be read in two ways. Either .* are splits.*; or .* are all"
    ):
        load_source(tree(tmp_path, layout))


def test_folders_of_patients_below_classes_are_no_classes(tmp_path):
    layout = {"train/benign/p1": [1], "train/malignant/p2": [2], "train/malignant/p3": [3], "test/benign/p4": [4]}
    with pytest.raises(ValueError, match=r"two ways, as no two of \['benign', 'malignant'\] .* images of \['p1', 'p2'"):
        load_source(tree(tmp_path, layout))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"train": [1], "test": [2]}, "no image in <class>/.* 2 images and the splits test, train"),
        (
            {"cat": [1], "art/dog": [2]},
            "must lie in <class>/, or all in <domain>/<class>/.*art/dog/002.png, cat/001.png",
        ),
        ({"a/b/cat": [1], "a/c/dog": [2], "d/e/cat": [3]}, "must lie in <class>/"),
        ({"cat": [1], "dog/train": [2], "dog/test": [3]}, "all or none below splits|two ways"),
        ({"train/cat": [1], "test/cow": [2]}, r"classes without a training image: \['cow'\]"),
    ],
)
def test_trees_without_a_reading(tmp_path, layout, message):
    with pytest.raises(ValueError, match=message):
        load_source(tree(tmp_path, layout))


def test_what_systems_leave_in_folders_is_passed_over(tmp_path):
    tree(
        tmp_path,
        {
            "set/train/cat": [1, 2],
            "set/test/cat": [3],
            "set/train/empty": [],
            "__MACOSX/set/train/cat": [9],
            ".x/y": [8],
        },
    )
    (tmp_path / "set" / "train" / "cat" / "001.png").rename(tmp_path / "set" / "train" / "cat" / "001.PNG")
    for name in ("._001.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / "set" / "train" / "cat" / name).write_bytes(b"no image")
    got = load_source(str(tmp_path))
    assert (values(got.x_train), values(got.x_test), got.classes) == ([1, 2], [3], ["cat"])


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    got = load_source(tree(tmp_path, {"train/2": [2], "train/10": [10], "train/9": [9], "test/10": [11]}))
    assert (got.classes, got.y_test.tolist()) == (["2", "9", "10"], [2])
    assert dict(zip(got.x_train[:, 0, 0, 0].tolist(), got.y_train.tolist(), strict=True)) == {2: 0, 9: 1, 10: 2}


def test_folders_without_images_links_upwards_and_images_of_both_sets_are_said(tmp_path, caplog):
    tree(tmp_path, {"train/cat": range(5), "train/dog": range(10, 15), "train/cow": [], "test/dog": [20]})
    (tmp_path / "train" / "cat" / "up").symlink_to("..")
    (tmp_path / "test" / "cat").symlink_to("../train/cat")
    for name in ("Thumbs.db", "9.heic"):
        (tmp_path / "train" / "dog" / name).write_bytes(b"no image")
    with caplog.at_level(logging.INFO):
        got = load_source(str(tmp_path))
    assert (got.classes, len(got.y_train), len(got.y_test)) == (["cat", "dog"], 10, 6)
    said = " ".join(r.message for r in caplog.records)
    assert f"1 folders hold nothing to read and are no class, as {tmp_path}/train/cow" in said
    assert "5 of 6 test images are training images, too" in said
    assert f"1 files beside them are of other kinds and left out, as {tmp_path}/train/dog/9.heic" in said


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path, monkeypatch):
    tree(tmp_path, {"cat": [1], "dog": [2]})
    scandir = os.scandir

    def forbidding(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    with pytest.raises(ValueError, match="`data.source`: .*dog cannot be read: Permission denied"):
        load_source(str(tmp_path))


def test_folders_that_hold_links_to_one_another_have_an_end(tmp_path):
    tree(tmp_path, {"cat": [1], "dog": [2]})
    (tmp_path / "cat" / "other").symlink_to("../dog")
    (tmp_path / "dog" / "other").symlink_to("../cat")
    found = [path.relative_to(tmp_path).as_posix() for path, _, _ in walk(tmp_path)]
    assert found == [".", "cat", "cat/other", "dog", "dog/other"]


def test_what_was_understood_is_said_once(tmp_path, caplog):
    layout = {"train/cat": [1, 2], "train/dog": [3], "val/cat": [4], "test/dog": [5], "test": [6]}
    with caplog.at_level(logging.INFO):
        load_source(tree(tmp_path, layout))
    (line,) = [r.message for r in caplog.records if "`data.source`" in r.message]
    assert "3 training and 1 test images, 1 x 2 x 2; 2 classes (cat, dog), no domains; test on the split 'test'" in line
    assert "2 images of another split or in no class folder are left out" in line
