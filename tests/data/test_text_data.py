"""Texts: sources, numbers of words and characters, clients, what checkpoints keep, and what is refused."""

import gzip
import json
import logging
from types import SimpleNamespace

import datasets
import pandas
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.data import IID, DirichletClients, TextData
from fedlight.data.federated import draw_clients
from fedlight.data.tables import read_table
from fedlight.models import CharLSTM, Classifier, TextMLP
from tests.data import layouts
from tests.helpers.tiny import quiet_trainer

MAILS = [
    {"text": f"{word} money, number {i}", "label": label, "client": client}
    for client, count in (("ann", 10), ("bob", 6), ("eve", 2))
    for i in range(count)
    for word, label in [("free", "spam") if i % 2 else ("dear", "ham")]
]


def jsonl(path, rows=MAILS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ready(source, **settings):
    data = TextData(source, **{"max_length": 6, "vocab_size": 40, **settings})
    data.setup()
    return data


def batch(dataset):
    return dataset.batch(torch.arange(len(dataset)))


def read(data, ids):
    """The words that numbers stand for."""
    known = ["_", "?", *data.vocabulary]
    return [" ".join(known[i] for i in row if i) for row in ids.tolist()]


def test_words_clients_and_what_is_held_out(tmp_path):
    data = ready(jsonl(tmp_path / "mails.jsonl"), client="client", min_samples=3)
    assert (data.num_clients, data.classes) == (2, ["ham", "spam"])  # eve has too few
    assert [data.client_size(i) for i in range(2)] == [8, 5]
    assert [len(data.client_val_dataset(i)) for i in range(2)] == [2, 1]
    assert data.vocabulary[:3] == [",", "money", "number"]  # 13 times each; then as they sort
    ids, labels = batch(data.client_dataset(0))
    assert ids.shape == (8, 6)
    assert ids.dtype == torch.int64
    texts = {row["text"].replace(",", " ,") for row in MAILS if row["client"] == "ann"}
    assert set(read(data, ids)) < texts
    assert [text.startswith("free") for text in read(data, ids)] == labels.bool().tolist()
    assert data.partition_counts().sum() == 13


def test_texts_for_validation_are_not_lost_where_others_are_held_out():
    given = {"train": datasets.Dataset.from_list(MAILS[:12]), "val": datasets.Dataset.from_list(MAILS[12:])}
    data = ready(given, val_fraction=0.25, num_clients=2)
    assert [len(d) for d in (data.pooled_dataset(), data.val_dataset(), data.test_dataset())] == [8, 4, 6]


def test_the_vocabulary_is_that_of_the_clients_that_train(tmp_path):
    rows = [{"text": f"word{c}", "label": 0, "client": c} for c in "abcd" for _ in range(5)]
    data = ready(jsonl(tmp_path / "rows.jsonl", rows), client="client", held_out_clients=1)
    trained, new = draw_clients(data)
    assert data.vocabulary == [f"word{'abcd'[client]}" for client in trained]
    assert batch(data.client_dataset(new[0]))[0][0].tolist() == [1, 0, 0, 0, 0, 0]
    rows += [{"text": "later", "label": 0, "client": "a"}] * 5
    (tmp_path / "split").mkdir()
    jsonl(tmp_path / "split" / "train.jsonl", rows[:20])
    jsonl(tmp_path / "split" / "test.jsonl", rows[20:])
    held = ready(str(tmp_path / "split"), client="client")
    assert "later" not in held.vocabulary
    assert read(held, batch(held.test_dataset())[0]) == ["?"] * 5


def test_dictionaries_masks_and_language_models(tmp_path):
    source = jsonl(tmp_path / "mails.jsonl")
    data = ready(source, as_dict=True, num_clients=3, partitioner=DirichletClients(0.5), tokenizer="hash")
    found = batch(data.client_dataset(0))
    assert found["attention_mask"].tolist() == (found["input_ids"] != 0).long().tolist()
    assert 2 <= found["input_ids"][0, 0] < 40
    assert not data.vocabulary
    data = ready(source, label=None, as_dict=True, num_clients=3, tokenizer=lambda text: [0, 5] * len(text.split()))
    assert isinstance(data.partitioner, IID)
    found = batch(data.client_dataset(0))
    assert found["input_ids"][0].tolist() == [0, 5, 0, 5, 0, 5]  # eight, cut
    assert found["labels"].tolist() == found["input_ids"].tolist()
    longer = ready(source, label=None, max_length=10, num_clients=3, tokenizer=lambda text: [5] * len(text.split()))
    assert batch(longer.client_dataset(0))[1][0].tolist() == [5, 5, 5, 5, *[-100] * 6]


class Tokenizer:
    """Has what one of Hugging Face has."""

    pad_token_id = 9

    def __call__(self, text, truncation, max_length):
        assert truncation
        return {"input_ids": [1, *map(len, text.split()), 2][:max_length], "attention_mask": []}


def test_what_a_tokenizer_may_give(tmp_path):
    """A batch of one text, as with return_tensors="pt", is its text; what holds no numbers is refused by name."""
    source, kept = jsonl(tmp_path / "rows.jsonl"), {"num_clients": 1, "max_length": 4}
    for found in (torch.tensor([[3, 4]]), {"input_ids": torch.tensor([[3, 4]])}, SimpleNamespace(ids=[3, 4])):
        ids, _ = ready(source, tokenizer=lambda _, found=found: found, **kept).client_dataset(0)[0]
        assert ids.tolist() == [3, 4, 0, 0]
    for found in (["a", "b"], "12", 3, [0.5], [-1], [[1], [2]], None):
        with pytest.raises(ValueError, match="`data.tokenizer` gives .* of a text; it must give the numbers"):
            ready(source, tokenizer=lambda _, found=found: found, **kept)


def test_a_tokenizer_of_hugging_face_pads_with_its_own_number(tmp_path):
    rows = [{"text": "a bb", "label": 0}, {"text": "a bb ccc dddd eeeee ff", "label": 1}] * 5
    data = ready(jsonl(tmp_path / "rows.jsonl", rows), num_clients=1, as_dict=True, tokenizer=Tokenizer())
    found = {tuple(row) for row in batch(data.client_dataset(0))["input_ids"].tolist()}
    assert found == {(1, 1, 2, 2, 9, 9), (1, 1, 2, 3, 4, 5)}


def test_shakespeare_of_leaf_names_the_next_character(tmp_path, caplog):
    data = ready(str(layouts.shakespeare(tmp_path)), client="client", tokenizer="chars", max_length=80, next_token=True)
    assert (data.num_clients, data.client_size(1), len(data.client_val_dataset(1))) == (2, 12, 3)
    ids, labels = batch(data.client_dataset(0))
    assert "".join(data.vocabulary[i - 2] for i in ids[0].tolist()) in layouts.LINE * 3
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        spoken = "".join(data.vocabulary[i - 2] for i in [*row, label])
        assert spoken in layouts.LINE * 3
    assert data.partition_counts() is None
    assert "data: 2 of 6 held-out windows are in training, one character later, too" in caplog.text


@pytest.mark.parametrize("kind", ["csv", "tsv", "folders", "hf", "saved"])
def test_every_kind_of_source_gives_the_same_samples(tmp_path, kind):
    rows = [{"text": f"say\n{row['text']}", "label": row["label"], "client": row["client"]} for row in MAILS]
    table = {name: [row[name] for row in rows] for name in rows[0]}
    if kind == "folders":
        for i, row in enumerate(rows):
            path = tmp_path / "texts" / row["client"] / row["label"] / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(row["text"])
        source = str(tmp_path / "texts")
    elif kind in ("hf", "saved"):
        source = {"train": datasets.Dataset.from_dict(table)}
        if kind == "saved":
            datasets.DatasetDict(source).save_to_disk(tmp_path / "saved")
            source = str(tmp_path / "saved")
    else:
        path = tmp_path / f"train.{kind}"
        source = str(layouts.write_csv(path, rows))
        if kind == "tsv":
            lines = (f'"{row["text"]}"\t{row["label"]}\t{row["client"]}\n' for row in rows)
            path.write_text("text\tlabel\tclient\n" + "".join(lines))
    data = ready(source, client="client", test_fraction=0.5, max_length=5)
    ids = torch.cat([batch(d)[0] for d in (data.pooled_dataset(), data.test_dataset())])
    assert sorted(read(data, ids)) == sorted(f"say {row['text'].split()[1]} money , number" for row in rows)
    assert (data.num_clients, data.classes) == (3, ["ham", "spam"])


def split(folder, train, test):
    folder.mkdir()
    jsonl(folder / "train.jsonl", train)
    jsonl(folder / "test.jsonl", test)
    return str(folder)


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (
            MAILS,
            {"client": "user"},
            r"`data.client` is 'user', but the columns of `data.source` are text, label, client",
        ),
        ([{"": 0, **mail} for mail in MAILS], {"client": "user"}, r"of `data.source` are text, label, client"),
        ([*MAILS, {"text": "x", "label": "ham"}], {"client": "client"}, "1 samples have no 'client'; .* is sample 18"),
        ([*MAILS, {"text": "x", "label": float("nan")}], {}, "1 samples have no 'label'; the first is sample 18"),
        ([*MAILS, {"text": "x", "label": [0, 1]}], {}, r"1 samples have no 'label'; .* 18: \[0, 1\] is not one value"),
        ([*MAILS, {"text": " ", "label": "ham"}], {}, "`data.text`: 1 texts are empty, or no texts; .* is sample 18"),
        (
            MAILS,
            {"client": "client", "min_samples": 11},
            "`data.min_samples`=11: no client has so many texts; at most 10",
        ),
        (
            [{"text": "x", "label": i / 3} for i in range(9)],
            {},
            "`data.test_fraction`=0.2 leaves 9 .* 0 .*, of 9 in 9 classes",
        ),
        ([], {}, "holds no samples"),
        (MAILS, {"partitioner": DirichletClients(), "next_token": True}, "needs the class of each sample"),
        (MAILS, {"vocab_size": 2}, "`data.vocab_size` must be at least 3"),
        (
            [{"text": "x", "label": y} for y in (0, 10**9) * 9],
            {},
            r"`data.label` \(label\): labels are 2 different whole numbers from 0 to 1000000000, .* 1000000001 classes",
        ),
        (MAILS, {"label": None, "next_token": True}, "`data.next_token` needs `data.label`"),
    ],
)
def test_what_cannot_be_read_or_divided(tmp_path, rows, settings, said):
    with pytest.raises(ValueError, match=said):
        ready(jsonl(tmp_path / "rows.jsonl", rows), **settings)


def test_clients_have_one_number_in_every_file_and_others_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"text": f"\ud83d mail {i}", "label": i % 2, "client": i % 3} for i in range(24)]
    floats = [row | {"client": float(row["client"])} for row in rows[:5]]
    data = ready(split(tmp_path / "a", rows, floats), client="client")
    assert [len(data.client_val_dataset(i)) for i in range(3)] == [2, 2, 1]
    assert "no held-out sample" not in caplog.text
    strangers = split(tmp_path / "b", rows, [row | {"client": "new"} for row in rows])
    ready(strangers, client="client", tokenizer="hash")
    assert "no held-out sample is of a client that trains; each gets some of its classes" in caplog.text


def test_other_files_that_cannot_be_read(tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"text": "a", "label": 1}\n{"text": \n')
    with pytest.raises(ValueError, match=r"torn.jsonl\) is no table.*line 2"):
        ready(str(tmp_path / "torn.jsonl"))
    (tmp_path / "rows.jsonl").write_text("3\n")
    with pytest.raises(ValueError, match="is no table, with an object or row for each sample"):
        ready(str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"nowhere.csv is not readable as UTF-8: .*No such file"):
        ready(str(tmp_path / "nowhere.csv"))
    (tmp_path / "texts" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"there is no text in <class>/.*it holds 0 texts"):
        ready(str(tmp_path / "texts"))
    for i in range(5):
        (tmp_path / "texts" / "good" / f"{i}.txt").write_text("fine")
    with pytest.raises(ValueError, match="`data.client` is 'client', but the columns of `data.source` are text, label"):
        ready(str(tmp_path / "texts"), client="client")
    (tmp_path / "texts" / "good" / "5.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"`data.source`: 1 texts are empty, the first is .*5.txt"):
        ready(str(tmp_path / "texts"))
    (tmp_path / "texts" / "good" / "5.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"5.txt is not readable as UTF-8"):
        ready(str(tmp_path / "texts"))
    with pytest.raises(ValueError, match=r"needs one table for training.*\['test'\]"):
        ready({"test": datasets.Dataset.from_dict({"text": ["a"]})})
    with pytest.raises(
        ValueError, match=r"`data.label` is 'label', but the columns of `data.source` \(test\) are text"
    ):
        ready(split(tmp_path / "contest", MAILS, [{"text": "a"}]))
    new = [{"text": "a", "label": "eggs", "client": "ann"}]
    with pytest.raises(ValueError, match=r"`data.label` \(label\): held-out samples have labels that no .* \['eggs'\]"):
        ready(split(tmp_path / "split", MAILS, new))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "text,label\nfine,ham\nhello, you,ham\n",
            "is no table.*line 3 has more cells than the header; quote what holds",
        ),
        ("text,label,label\nfine,ham,spam\n", "two columns have one name: text, label, label"),
        ("text,label\nfine,\n", "`data.label`: 1 samples have no 'label'; the first is sample 0"),
    ],
)
def test_cells_that_are_not_where_they_belong(tmp_path, content, said):
    (tmp_path / "mails.CSV").write_text(content)
    with pytest.raises(ValueError, match=said):
        ready(str(tmp_path / "mails.CSV"))


def test_tables_as_people_write_them(tmp_path, caplog):
    rows = [{"text": f"mail {i}", "label": f"{i % 12}.0"} for i in range(60)]
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "test.csv").write_text(
        "text, label\n" + "".join(f'{row["text"]}, "{row["label"]} "\n' for row in rows[::5])
    )
    jsonl(tmp_path / "unsupervised.jsonl", [{"text": "x", "label": -1}])
    caplog.set_level(logging.INFO)
    data = ready(str(tmp_path))
    assert data.classes == [str(i) for i in range(12)]  # 10.0 comes after 9.0
    assert batch(data.test_dataset())[1].tolist() == [i % 12 for i in range(0, 60, 5)]
    assert "unsupervised.jsonl is none of train, val and test, and left out" in caplog.text
    assert "12 of 12 test texts are training texts, too" in caplog.text
    jsonl(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"needs one table for training.*'train.jsonl', .*'train.json'"):
        ready(str(tmp_path))


@pytest.mark.parametrize("name", ["rows.CSV.gz", "rows.csv", "rows.tsv", "rows.ndjson", "rows.json", "rows.parquet"])
def test_the_same_table_in_other_files(tmp_path, name):
    texts = ['"' * (i % 7 == 0) + f"mail, {i}" for i in range(20)]  # a quotation mark that is never closed
    file, frame = tmp_path / name, pandas.DataFrame({"text": texts, "label": [i % 2 for i in range(20)]})
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(b"\xef\xbb\xbf" + frame.to_csv(lineterminator="\r\n").encode()))
    elif name.endswith(".csv"):
        frame.to_csv(file, sep=";", index=False)
    elif name.endswith(".tsv"):
        file.write_text("text\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts)))
    elif name.endswith(".ndjson"):
        jsonl(file, frame.to_dict("records"))
    elif name.endswith(".json"):
        frame.to_json(file)
    else:
        frame.to_parquet(file)
    assert read_table(file)["text"] == texts
    assert [int(label) for label in read_table(file)["label"]] == frame["label"].tolist()


@pytest.mark.parametrize(("train", "y", "names"), [(["0", "2"], [2], 3), ([1, 2], [0], 2), (["a", "1"], [0], 2)])
def test_labels_are_numbered(tmp_path, train, y, names):
    rows = [{"text": "a", "label": label} for label in train] * 4
    last = train[1] if y == [2] else 1
    data = ready(split(tmp_path / "split", rows, [{"text": "a", "label": last}]), num_clients=1)
    assert batch(data.test_dataset())[1].tolist() == y
    assert len(data.classes) == names


def mlp():
    return Classifier(TextMLP(2, vocab_size=40, embedding_dim=8, hidden_size=8), num_classes=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two rounds, its folder and its data."""
    folder = tmp_path_factory.mktemp("trained")
    source = jsonl(folder / "mails.jsonl")
    trainer, data = quiet_trainer(folder, max_rounds=2), ready(source, client="client")
    trainer.fit(mlp(), data)
    return trainer, data, source


def test_a_checkpoint_keeps_its_vocabulary_for_other_texts(tmp_path, trained):
    trainer, data, _ = trained
    path = trainer.run_dir / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["TextData"] == {"vocabulary": data.vocabulary, "classes": ["ham", "spam"]}
    others = [{**row, "text": f"hello {row['text']}", "label": "spam"} for row in MAILS]
    other = TextData(jsonl(tmp_path / "other.jsonl", others), client="client", max_length=6, vocab_size=40)
    module = mlp()
    quiet_trainer(tmp_path).validate(module, other, ckpt_path=path, verbose=False)
    assert other.vocabulary == data.vocabulary
    ids, labels = batch(other.test_dataset())
    assert all(text.startswith("? ") for text in read(other, ids))
    assert labels.tolist() == [1] * len(labels)
    other.setup()  # of its own again, as for a new fit
    assert "hello" in other.vocabulary
    assert other.classes == ["spam"]


def test_a_vocabulary_that_the_model_is_too_small_for_is_refused(tmp_path, trained):
    largest = max(
        int(batch(d)[0].max()) for d in (trained[1].test_dataset(), *map(trained[1].client_dataset, range(3)))
    )
    for net in (TextMLP(2, largest), CharLSTM(2, largest)):
        with pytest.raises(
            MisconfigurationException, match=rf"vocab_size={largest} is too small: .* the number {largest}"
        ):
            quiet_trainer(tmp_path).fit(Classifier(net, num_classes=2), ready(trained[2], client="client"))


def test_a_resume_with_another_tokenizer_is_refused(tmp_path, trained):
    trainer, _, source = trained
    path = trainer.run_dir / "checkpoints" / "last.ckpt"
    with pytest.raises(MisconfigurationException, match="data.tokenizer: words in the checkpoint, chars here"):
        quiet_trainer(tmp_path, max_rounds=3).fit(mlp(), ready(source, client="client", tokenizer="chars"), path)
    with pytest.raises(MisconfigurationException, match="data.max_length: 6 in the checkpoint, 7 here"):
        quiet_trainer(tmp_path, max_rounds=3).fit(mlp(), ready(source, client="client", max_length=7), path)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_recorded_engines_take_texts(tmp_path, trained):
    source, found = trained[2], {}
    for engine in ("eager", "vmap"):
        for name, net in (("mlp", TextMLP(2, 40, 4, 4)), ("lstm", CharLSTM(2, 40, 4, 4, 1))):
            torch.manual_seed(0)
            for parameter in net.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            trainer = quiet_trainer(tmp_path / engine / name, max_rounds=1, engine=engine, logger=False)
            trainer.fit(Classifier(net, num_classes=2), ready(source, client="client"))
            found[engine, name] = torch.cat([p.detach().flatten() for p in net.parameters()])
    for name in ("mlp", "lstm"):
        torch.testing.assert_close(found["vmap", name], found["eager", name], rtol=0, atol=1e-6)
