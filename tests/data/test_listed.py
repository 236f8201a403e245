"""Images with natural clients: what is read of LEAF's files and of CSV files, and what is refused."""

import json
import logging

import pytest
import torch

from fedlight.data import ImageData, NaturalGroups, load_source
from tests.data import layouts


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("listed")
    made = {"femnist": layouts.femnist, "inaturalist": layouts.inaturalist, "camelyon17": layouts.camelyon17}
    return {name: make(root / name) for name, make in made.items()}


def natural(source, **settings):
    settings = {"num_clients": None, "partitioner": NaturalGroups(), "normalize": "none", "augment": False, **settings}
    data = ImageData(str(source), **settings)
    data.setup()
    return data


def levels(dataset):
    """The brightness of each image, in 1/255, sorted, with its label."""
    x, y = dataset.batch(torch.arange(len(dataset)))
    return sorted(zip((x[:, 0, 0, 0] * 255).round().int().tolist(), y.tolist(), strict=True))


def test_writers_of_femnist_are_clients_and_keep_their_own_test_images(folders):
    data = natural(folders["femnist"])
    assert (data.input_shape, data.num_clients, data.groups) == ((1, 28, 28), 3, ["f0", "f1", "f2"])
    assert data.pooled_dataset().inputs.dtype == torch.uint8
    assert levels(data.client_dataset(0)) == [(0, 0), (1, 1), (2, 2)]
    assert levels(data.client_dataset(1)) == [(10, 1), (11, 2), (12, 3), (13, 4)]  # of two files
    assert levels(data.client_val_dataset(0)) == [(1, 1), (2, 2)]
    assert levels(data.client_val_dataset(1)) == [(11, 2)]
    assert data.client_val_dataset(2) is None


def test_users_of_a_csv_file_are_clients_and_images_are_found_by_their_ids(folders):
    source = folders["inaturalist"]
    data = natural(source, root=str(source.parents[1] / "images"))
    assert (data.num_clients, data.num_classes) == (2, 2)
    assert [levels(data.client_dataset(i)) for i in range(2)] == [[(0, 0), (1, 1), (2, 0)], [(3, 1), (4, 0), (5, 1)]]
    assert levels(data.test_dataset()) == [(6, 0), (7, 1)]  # nobody's


def test_hospitals_are_clients_and_one_may_be_held_out(folders):
    data = natural(folders["camelyon17"], columns=layouts.WILDS)
    assert [levels(data.client_dataset(i)) for i in range(3)] == [[(0, 0), (1, 1)], [(3, 1), (4, 0)], [(6, 0), (7, 1)]]
    assert [levels(data.client_val_dataset(i)) for i in range(3)] == [[(2, 0)], [(5, 1)], [(8, 0)]]
    slides = natural(folders["camelyon17"], columns={**layouts.WILDS, "client": "slide"})
    assert slides.num_clients == 4  # the fifth has an image of the test set alone
    apart = natural(folders["camelyon17"], columns=layouts.WILDS, test_domains=["2"])
    assert (apart.num_clients, levels(apart.test_dataset())) == (2, [(6, 0), (7, 1), (8, 0)])


def test_without_a_test_set_a_part_of_each_client_is_one(tmp_path):
    levels_of = {user: ([[i / 255] * 4 for i in range(10)], [0, 1] * 5) for user in ("a", "b")}
    layouts.leaf(tmp_path, "train", 0, levels_of)
    data = natural(tmp_path)
    assert [data.client_size(i) for i in range(2)] == [8, 8]
    assert [len(data.client_val_dataset(i)) for i in range(2)] == [2, 2]


def listed(folder, rows, header="image_id,class,split"):
    for i, row in enumerate(rows):
        layouts.picture(folder / "images" / f"{row[0]}.png", i)
    (folder / "images.csv").write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]))
    return str(folder / "images.csv")


def test_a_list_without_clients_and_its_splits(tmp_path, caplog):
    rows = [(f"i{i}", f"{i % 2}.0", ("train", "val", "test")[i // 4]) for i in range(12)]
    caplog.set_level(logging.INFO)
    got = load_source(listed(tmp_path, rows))
    assert (got.y_train.tolist(), len(got.y_test), got.classes) == ([0, 1, 0, 1], 8, ["0", "1"])
    assert (got.group_train, got.groups) == (None, [])
    assert "4 training and 8 test images; 2 classes (0, 1), no clients; test on test, val." in caplog.text
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "test.csv").write_text("image_id\nunknown\n")  # as of a contest
    (tmp_path / "images.tsv").write_text((tmp_path / "images.csv").read_text().replace(",", "\t"))
    assert load_source(str(tmp_path / "images.tsv")).x_train.equal(got.x_train)
    got = load_source(listed(tmp_path / "whole", [row[:2] for row in rows], "image_id,class"), test_fraction=0.5)
    assert torch.bincount(got.y_test).tolist() == [3, 3]
    assert "test.csv has no column 'class', so it is no test set" in caplog.text
    with pytest.raises(ValueError, match=r"`data.columns.split`: no image .* is for training; .* found fold 1, fold 2"):
        load_source(listed(tmp_path, [(name, y, f"fold {1 + i % 2}") for i, (name, y, _) in enumerate(rows)]))


@pytest.mark.parametrize(
    ("column", "train", "test"), [("is_train", "1", "0"), ("Train", "True", "False"), ("is_test", "False", "True")]
)
def test_a_column_that_says_which_images_are_for_training_or_for_the_test(tmp_path, column, train, test):
    rows = [(f"i{i}", i % 2, train if i < 4 else test) for i in range(12)]
    got = load_source(listed(tmp_path, rows, f"image_id,class,{column}"), columns={"split": column})
    assert (len(got.y_train), len(got.y_test)) == (4, 8)


def test_a_name_that_two_images_have_is_refused(tmp_path):
    source = listed(tmp_path, [(f"i{i}", i % 2, "train") for i in range(10)])
    assert len(load_source(source).y_train) == 8
    layouts.picture(tmp_path / "other" / "i3.png", 200)
    with pytest.raises(ValueError, match=r"'i3' is .*i3.png or .*i3.png; list images by paths"):
        load_source(source)
    text = (tmp_path / "images.csv").read_text()
    (tmp_path / "images.csv").write_text(
        text.replace("\ni", "\nimages\\i").replace(",", ".png,").replace(".png,class.png", ",class")
    )
    assert len(load_source(source, columns={"split": "split"}).y_train) == 8
    moved = (tmp_path / "images.csv").rename(tmp_path / "other" / "images.csv")  # paths may begin in `data.root`
    assert len(load_source(str(moved), tmp_path).y_train) == 8


def damaged(file, **changes):
    held = json.loads(file.read_text())
    held.update(changes)
    file.write_text(json.dumps({k: v for k, v in held.items() if v is not None}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.write_text("{"), r"no file of LEAF.*JSONDecodeError: Expecting property name"),
        (lambda f: damaged(f, user_data=None), "no file of LEAF.*KeyError: 'user_data'"),
        (lambda f: damaged(f, num_samples=[4, 2]), "no file of LEAF.*: f0 has 3 x and 3 y, but num_samples is 4"),
        (lambda f: damaged(f, users=["f0"]), "no file of LEAF.*ValueError"),
        (  # as those of Sent140
            lambda f: damaged(f, users=["f0"], num_samples=[1], user_data={"f0": {"x": [["7", "text"]], "y": [0]}}),
            "no file of LEAF.*: x of f0 are lists with texts; write one text for each sample",
        ),
    ],
)
def test_a_file_that_is_not_leafs_is_named(tmp_path, change, said):
    layouts.femnist(tmp_path)
    change(file := next((tmp_path / "train").glob("all_data_0*")))
    with pytest.raises(ValueError, match=rf"{file.name} is {said}"):
        load_source(str(tmp_path))


def test_missing_columns_labels_and_images_are_named(tmp_path):
    source = layouts.camelyon17(tmp_path / "wilds")
    with pytest.raises(ValueError, match=r"`data.columns.client` is 'user_id', but the columns .* are .*center, split"):
        load_source(str(source), columns={"image": "patient", "label": "tumor", "client": "user_id"})
    with pytest.raises(ValueError, match=r"`data.columns` are image, label, client, split; found centre"):
        load_source(str(source), columns={"centre": "center"})
    for name, why in (("{x}.png", "KeyError 'x'"), ("{0}", "IndexError"), ("{node", "ValueError expected '}'")):
        with pytest.raises(ValueError, match=rf"`data.columns.image` .*: {why}.*; the columns are patient"):
            load_source(str(source), columns={**layouts.WILDS, "image": name})
    with pytest.raises(ValueError, match=r"`data.columns.split` is 'fold'"):
        load_source(str(source), columns={**layouts.WILDS, "split": "fold"})
    with pytest.raises(ValueError, match=r"`data.test_domains` is \['7'\]; the clients are \['0', '1', '2'\]"):
        load_source(str(source), columns=layouts.WILDS, test_domains=["7"])
    gone = source.parent / layouts.WILDS["image"].format(patient="001", node=1, x_coord=103, y_coord=200)
    gone.unlink()
    with pytest.raises(ValueError, match=rf"1 of 9 images are missing, as .*{gone.name}"):
        load_source(str(source), columns=layouts.WILDS)
    users = layouts.inaturalist(tmp_path / "users")
    rows = users.read_text().splitlines()
    users.write_text("\n".join([*rows, "7,a0,1000000000,900"]))
    with pytest.raises(ValueError, match=r"csv\), class: labels are \d+ different whole numbers from 0 to 1000000000"):
        load_source(str(users), root=tmp_path)
    users.write_text("\n".join(rows) + "\n")
    users.with_name("test.csv").write_text("user_id,image_id,class\n,a0,0\n7,a0,1\n")  # not every sample has a client
    assert load_source(str(users), root=tmp_path).group_test is None
    users.with_name("test.csv").write_text("image_id,class\na0,5\n")
    with pytest.raises(ValueError, match=r"held-out samples have labels that no training sample has: \['5'\]"):
        load_source(str(users), root=tmp_path)
    layouts.leaf(tmp_path / "synthetic", "train", 0, {"f0": ([[0.5] * 60] * 5, [0] * 5)})
    with pytest.raises(ValueError, match="samples of 60 numbers are no square images"):
        load_source(str(tmp_path / "synthetic"))
    layouts.leaf(
        tmp_path / "synthetic", "train", 0, {"f0": ([[0.5] * 4] * 5, [0] * 5), "f1": ([[0.5] * 9] * 5, [0] * 5)}
    )
    with pytest.raises(ValueError, match=r"no images of one size; found numbers of shapes \[\(4,\), \(9,\)\]"):
        load_source(str(tmp_path / "synthetic"))
    with pytest.raises(ValueError, match="`data.columns` is for a `data.source` that is a CSV file, not for 'digits'"):
        load_source("digits", columns=layouts.WILDS)
