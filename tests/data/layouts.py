"""Small files in the layouts that natural clients are published in, and Hugging Face's dataset of them."""

import csv
import json

import numpy as np
from PIL import Image

LINE = "the quick brown fox jumps over the lazy dog and runs far into a wood of old oak "
assert len(LINE) == 80


def leaf(folder, split, number, users):
    """A file of LEAF: ``users`` gives the x and y of each."""
    path = folder / split / f"all_data_{number}_niid_0_keep_0_{split}_9.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {user: {"x": x, "y": y} for user, (x, y) in users.items()}
    sizes = [len(y) for _, y in users.values()]
    path.write_text(json.dumps({"users": [*users], "num_samples": sizes, "user_data": data}))
    return path


def femnist(folder):
    """Three writers; f1 lies in two files, and as all but f2 also in the test set."""

    def images(writer, count, first):
        levels = [[(writer * 10 + i) / 255] * 784 for i in range(first, first + count)]
        return levels, [(writer + i) % 62 for i in range(first, first + count)]

    leaf(folder, "train", 0, {"f0": images(0, 3, 0), "f1": images(1, 2, 0)})
    leaf(folder, "train", 1, {"f1": images(1, 2, 2), "f2": images(2, 3, 0)})
    leaf(folder, "test", 0, {"f1": images(1, 1, 1), "f0": images(0, 2, 1)})
    return folder


def shakespeare(folder):
    """Two roles, each of which speaks a shifted line; what follows is the next character."""
    for split, first, count in (("train", 0, 12), ("test", 12, 3)):
        users = {}
        for role, shift in (("HAMLET", 0), ("OPHELIA", 40)):
            starts = range(shift + first, shift + first + count)
            users[role] = [(LINE * 3)[s : s + 80] for s in starts], [(LINE * 3)[s + 80] for s in starts]
        leaf(folder, split, 0, users)
    return folder


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def picture(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6, 3), level, np.uint8)).save(path)


def inaturalist(folder):
    """Users' images by their ids, in folders of classes elsewhere."""
    train = [{"user_id": 7 + i // 3, "image_id": f"a{i}", "class": i % 2, "label": 900 + i % 2} for i in range(6)]
    test = [{"image_id": f"b{i}", "class": i % 2, "label": 900 + i % 2} for i in range(2)]
    for i, row in enumerate([*train, *test]):
        picture(folder / "images" / "Aves" / str(row["label"]) / f"{row['image_id']}.png", i)
    write_csv(folder / "splits" / "test.csv", test)
    return write_csv(folder / "splits" / "federated_train_user_120k.csv", train)


WILDS = {
    "image": "patches/patient_{patient}_node_{node}/patch_patient_{patient}_node_{node}_x_{x_coord}_y_{y_coord}.png",
    "label": "tumor",
    "client": "center",
    "split": "split",
}


def camelyon17(folder):
    """Two patches for training and one for the test of each of three hospitals."""
    rows = []
    for i in range(9):
        where = {"patient": f"{i // 3:03}", "node": i % 2, "x_coord": 100 + i, "y_coord": 200}
        told = {"tumor": i % 2, "slide": i // 2, "center": i // 3, "split": int(i % 3 == 2)}
        rows.append({"": i, **where, **told})
        picture(folder / WILDS["image"].format_map(where), i)
    return write_csv(folder / "metadata.csv", rows)
