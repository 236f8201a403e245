"""What people have: stock LightningDataModules, loaders, Hugging Face's datasets, PyG's data, strings."""

import datetime
import logging

import pandas
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from fedlight.cli.command import FederatedCLI
from fedlight.data import ArrayDataset, DatasetPartition, DirichletClients, Federated, ImageData, NaturalGroups
from fedlight.data.dataset_partition import find_targets
from tests.helpers.tiny import Regression, Samples, quiet_trainer, seeded, weights


def numbers(n=24):
    x = seeded(n, 3)
    return x, x @ torch.tensor([1.0, -2.0, 0.5])


def marked(samples):
    """A collate function that tells how many samples it was given."""
    x, y = torch.utils.data.default_collate(samples)
    return {"x": x, "y": y, "marked": torch.full((len(samples),), len(samples))}


class Stock(LightningDataModule):
    """As many a project has it: random splits in ``setup``, what differs between stages, hooks that are counted."""

    def __init__(self, batch_size: int = 4, slow: bool = False, **loader):
        super().__init__()
        self.batch_size, self.slow, self.loader, self.calls = batch_size, slow, loader, []

    def prepare_data(self):
        self.calls.append(f"prepare {self.trainer.max_rounds}")

    def setup(self, stage):
        self.calls.append(f"setup {stage}")
        data = (Samples if self.slow else TensorDataset)(*numbers())
        self.train, self.val = random_split(data, [18, 6])  # from the global generator
        if stage == "test":
            self.held_out = TensorDataset(*numbers(5))

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True, **self.loader)

    def val_dataloader(self):
        return DataLoader(self.val, 5)

    def test_dataloader(self):
        return DataLoader(self.held_out, 2)

    def teardown(self, stage):
        self.calls.append(f"teardown {stage}")


TRAINED = []


class Seeing(Regression):
    """Remembers the sizes of batches; what clients change of the module itself is put back after each of them."""

    def __init__(self):
        super().__init__()
        TRAINED.clear()
        self.validated, self.tested = [], []

    def training_step(self, batch, batch_idx):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        TRAINED.append(int(batch["marked"][0]) if isinstance(batch, dict) else len(x))
        return F.mse_loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.validated.append(len(batch[1]))
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.tested.append(len(batch[1]))
        super().test_step(batch, batch_idx)


def ready(data, stage="fit"):
    data.setup(stage)
    return data


def test_a_stock_datamodule_is_divided_and_its_loaders_are_followed(tmp_path):
    stock, model = Stock(slow=True, collate_fn=marked), Seeing()
    trainer = quiet_trainer(tmp_path, max_rounds=1, clients_per_round=3, client_val_every_n_rounds=0)
    trainer.fit(model, Federated(stock, num_clients=3))
    assert TRAINED[-6:] == [4, 2] * 3
    assert model.validated[-2:] == [5, 1]  # with its own collate function, too
    assert stock.calls == ["prepare 1", "setup fit", "teardown fit"]
    assert stock.trainer is trainer
    trainer.test(model, Federated(stock, num_clients=3))
    assert model.tested == [2, 2, 1]
    assert stock.calls[3:] == ["prepare 1", "setup fit", "setup test", "teardown fit", "teardown test"]
    trainer.validate(model, Federated(stock, num_clients=3))
    trainer.fit(model, Federated(stock, num_clients=3))


def test_it_trains_as_the_same_data_do_without_it(tmp_path):
    def trained(data):
        model = Regression()
        quiet_trainer(tmp_path).fit(model, data)
        return weights(model)

    federated = ready(Federated(Stock(), num_clients=3, seed=1))
    rows = torch.tensor(federated.datamodule.train.indices)
    x, y = numbers()
    same = DatasetPartition(TensorDataset(x[rows], y[rows]), num_clients=3, seed=1, batch_size=4)
    assert torch.equal(trained(Federated(Stock(), num_clients=3, seed=1)), trained(same))


def test_what_setup_draws_depends_on_the_seed_alone():
    def split(seed, stage="fit"):
        data = Federated(Stock(), num_clients=3, seed=seed)
        torch.manual_seed(torch.randint(1000, ()).item())
        before = torch.get_rng_state()
        ready(data, stage)
        assert torch.equal(torch.get_rng_state(), before)
        return list(data.datamodule.train.indices)

    assert split(0) == split(0) == split(0, "test")
    assert split(0) != split(1)


def test_the_same_wrapper_is_used_twice_and_pooled(tmp_path):
    data = Federated(Stock(), num_clients=3)
    for settings in ({}, {"centralized": True}):
        model = Seeing()
        quiet_trainer(tmp_path, max_rounds=1, **settings).fit(model, data)
    assert TRAINED[-5:] == [4, 4, 4, 4, 2]
    assert data.datamodule.calls[-1] == "teardown fit"


class Folds(Stock):
    """Holds out more in each fit."""

    def setup(self, stage):
        labelled = TensorDataset(torch.arange(24.0), torch.arange(24) % 3)
        held_out = 6 * (1 + len(self.calls))  # teardowns
        self.train, self.val = random_split(labelled, [24 - held_out, held_out])


def test_what_is_held_out_anew_is_divided_anew():
    data = Federated(Folds(), num_clients=2)
    for held_out in (6, 12):
        clients = [ready(data).client_val_dataset(client) for client in range(2)]
        assert sum(map(len, clients)) == held_out
        data.teardown("fit")


def test_from_datasets_and_loaders_in_lists(tmp_path):
    stock = LightningDataModule.from_datasets(TensorDataset(*numbers()), [TensorDataset(*numbers(5))], batch_size=6)
    data = ready(Federated(stock, num_clients=2))
    assert (data.batch_size, len(data.val_dataset()), data.test_dataset()) == (6, 5, None)
    stock.val_dataloader = lambda: [DataLoader(TensorDataset(*numbers(5)), 5)] * 2
    with pytest.raises(TypeError, match=r"LightningDataModule.val_dataloader\(\) is 2 loaders .*; give one"):
        ready(Federated(stock, num_clients=2))
    stock.val_dataloader = lambda: []
    assert ready(Federated(stock, num_clients=2)).val_dataset() is None


def test_what_is_not_called_is_refused():
    class Moving(Stock):
        def on_after_batch_transfer(self, batch, index):
            return batch

    with pytest.raises(MisconfigurationException, match="Moving overrides on_after_batch_transfer"):
        Federated(Moving())
    with pytest.raises(TypeError, match="ImageData, which is federated already"):
        Federated(ImageData())


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (Stock(), r"fit\(model, Federated\(Stock\(...\), num_clients=20, .* in YAML .data: {class_path: Federated,"),
        (Stock, r"fit\(model, Federated\(Stock\(...\), num_clients=20, .*{class_path: Stock}"),
        (DataLoader(TensorDataset(*numbers())), r"0x\w+\. A dataset, .*\(model, DatasetPartition\(train, val"),
        (TensorDataset(*numbers()), r"0x\w+\. A dataset, .*\(model, DatasetPartition\(train, val"),
        (None, "expected a FederatedDataModule .* found None. .*MyData"),
    ],
)
def test_what_is_not_federated_is_refused_with_the_line_to_write(tmp_path, data, line):
    with pytest.raises(MisconfigurationException, match=line):
        quiet_trainer(tmp_path).fit(Regression(), data)


def test_a_stock_datamodule_in_yaml(tmp_path, monkeypatch, capsys):
    (tmp_path / "people.py").write_text(
        "import torch\nfrom lightning.pytorch import LightningDataModule\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "class Digits(LightningDataModule):\n"
        "    def __init__(self, batch_size: int = 5):\n"
        "        super().__init__()\n        self.batch_size = batch_size\n"
        "    def train_dataloader(self):\n"
        "        return DataLoader(TensorDataset(torch.randn(30, 1, 8, 8), torch.arange(30) % 10), self.batch_size)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    bare = tmp_path / "bare.yaml"
    bare.write_text("model: Classifier\ndata: {class_path: people.Digits}\n")
    with pytest.raises(SystemExit):
        FederatedCLI(["fit", "-c", str(bare)])
    line = "data: {class_path: Federated, init_args: {datamodule: {class_path: people.Digits}, num_clients: 20}}"
    assert f"a LightningDataModule is divided among clients by `{line}`" in capsys.readouterr().err
    good = tmp_path / "good.yaml"
    good.write_text(
        "model: {class_path: Classifier, init_args: {num_classes: 10, net: {class_path: fedlight.models.MLP,"
        " init_args: {in_features: 64}}}}\n"
        "trainer: {fast_dev_run: true, accelerator: cpu, devices: 1, enable_progress_bar: false}\n" + line
    )
    partition = ["--data.partitioner", "DirichletClients", "--data.partitioner.alpha", "0.3"]
    cli = FederatedCLI(
        ["fit", "-c", str(good), "--data.num_clients", "3", "--data.datamodule.batch_size=6", *partition]
    )
    assert (cli.datamodule.num_clients, cli.datamodule.batch_size) == (3, 6)
    assert cli.datamodule.partition_counts().sum(0).tolist() == [3] * 10


# ---- loaders and lists


def test_a_loader_is_taken_apart():
    train = DataLoader(TensorDataset(*numbers()), 6, num_workers=0, collate_fn=marked)
    data = ready(DatasetPartition(train, val=DataLoader(TensorDataset(*numbers(8)), 3), num_clients=2))
    assert (data.batch_size, data.eval_batch_size, data.collate_fn) == (6, 3, marked)
    assert isinstance(data.client_dataset(0), Subset)
    assert isinstance(data.val_dataset(), ArrayDataset)
    assert [len(y) for _, y in data.val_dataloader()] == [3, 3, 2]
    by_hand = ready(DatasetPartition(train, num_clients=2, batch_size=5, collate_fn=torch.utils.data.default_collate))
    assert (by_hand.batch_size, by_hand.eval_batch_size, by_hand.collate_fn is marked) == (5, 5, False)


def test_validation_and_test_have_loaders_of_their_own():
    loaders = [DataLoader(TensorDataset(*numbers(8)), size) for size in (2, 3, 4)]
    data = DatasetPartition(loaders[0], test=loaders[2], val=loaders[1], num_clients=2)
    stages = ("fit", "test", "validate", "predict")  # of the test data
    assert [ready(data, stage).eval_batch_size for stage in stages] == [3, 4, 3, 4]


def doubled(samples):
    x, y = torch.utils.data.default_collate(samples)
    return 2 * x, y


class Largest(Regression):
    """Logs the largest input."""

    def validation_step(self, batch, batch_idx):
        self.log("largest", batch[0].max(), reduce_fx="max")

    test_step = validation_step


def test_an_evaluation_makes_batches_as_its_own_loader_does(tmp_path):
    x, y = numbers()
    plain, own = DataLoader(TensorDataset(x, y), 24), DataLoader(TensorDataset(x, y), 24, collate_fn=doubled)
    for data, largest in ((DatasetPartition(plain, own, num_clients=2), 2), (DatasetPartition(own, plain), 1)):
        model, trainer = Largest(), quiet_trainer(tmp_path, max_rounds=1)
        trainer.fit(model, data)
        seen = trainer.callback_metrics["largest"], trainer.test(model, data)[0]["largest"]
        assert (*map(float, seen),) == (float(largest * x.max()),) * 2


class InOrder(Sampler):
    """Draws some rows; what they are called is up to its author."""

    def __init__(self, rows, name="indices"):
        self.name = name
        setattr(self, name, rows)

    def __iter__(self):
        return iter(getattr(self, self.name))

    def __len__(self):
        return len(getattr(self, self.name))


class Shuffled(BatchSampler):
    """Leaves out other rows in each epoch."""


def test_a_sampler_of_rows_is_kept_and_one_of_weights_is_named():
    x, y = torch.arange(10.0)[:, None], torch.arange(10) % 2
    rows = [1, 3, 5, 7]
    data = ready(DatasetPartition(DataLoader(TensorDataset(x, y), 2, sampler=SubsetRandomSampler(rows)), num_clients=2))
    assert sorted(v.item() for c in range(2) for v, _ in (data.client_dataset(c)[i] for i in range(2))) == rows
    assert data.partition_counts().sum(0).tolist() == [0, 4]
    for sampler in (WeightedRandomSampler([1.0] * 10, 10), RandomSampler(y, replacement=True)):
        with pytest.warns(UserWarning, match=f"`data.train`: its {type(sampler).__name__} is not used"):
            DatasetPartition(DataLoader(TensorDataset(x, y), 2, sampler=sampler))
    with pytest.warns(UserWarning, match="its RandomSampler is not used"):  # which rows is drawn anew each time
        DatasetPartition(DataLoader(TensorDataset(x, y), 2, sampler=RandomSampler(y, num_samples=4)))
    for sampler in (rows, InOrder(rows)):
        data = ready(DatasetPartition(DataLoader(TensorDataset(x, y), 2, sampler=sampler), num_clients=2))
        assert sorted(v.item() for c in range(2) for v, _ in (data.client_dataset(c)[i] for i in range(2))) == rows
    fixed = DataLoader(TensorDataset(x, y), batch_sampler=BatchSampler(SequentialSampler(y), 3, False))
    assert DatasetPartition(fixed, num_clients=2).batch_size == 3
    chosen = DataLoader(TensorDataset(x, y), batch_sampler=[[7, 1], [5, 3]])
    data = ready(DatasetPartition(chosen, num_clients=2))
    assert data.batch_size == 2
    assert sorted(v.item() for c in range(2) for v, _ in (data.client_dataset(c)[i] for i in range(2))) == rows
    by_chance = DataLoader(TensorDataset(x, y), batch_sampler=Shuffled(RandomSampler(y), 4, True))
    with pytest.warns(UserWarning, match="its Shuffled is not used"):
        assert ready(DatasetPartition(by_chance, num_clients=2)).partition_counts().sum() == 10


def test_drop_last_is_said_to_play_no_part(caplog):
    with caplog.at_level(logging.INFO):
        DatasetPartition(DataLoader(TensorDataset(torch.ones(6, 1), torch.arange(6)), 4, drop_last=True), num_clients=2)
    assert "`data.train`: its drop_last plays no part; the last batch of an epoch is kept" in caplog.text


def test_a_pair_of_arrays_is_said_to_be_one_sample(caplog):
    with caplog.at_level(logging.INFO):
        DatasetPartition([numbers(4), numbers(5)])
    assert "`data.train`: each of these 2 tuples is one sample" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        DatasetPartition([(x, int(y > 0)) for x, y in zip(*numbers(4), strict=True)])
    assert not caplog.text


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3), 0


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (Stream(), "reads Stream, an iterable: .* cannot be divided among clients. Use a dataset with __len__"),
        (DataLoader(Stream(), 2), "reads Stream, an iterable"),
        ((i for i in range(3)), "reads generator, an iterable"),
        ({"train": TensorDataset(*numbers())}, "is a dict; give one dataset"),
        (DataLoader(TensorDataset(*numbers()), batch_size=None), "without a batch_size"),
        (
            DataLoader(TensorDataset(*numbers()), 2, sampler=InOrder([1, 2], "mine")),
            "its InOrder draws 2 of 24 samples; give a Subset of these",
        ),
        ((torch.ones(2), pandas.Series(["a", "b"]).to_numpy()), "is a tuple of strings or objects; give one dataset"),
        (pandas.DataFrame({"x": [1]}), "is a DataFrame; give one dataset, DataLoader or dict of tensors of it"),
        (
            [DataLoader(TensorDataset(*numbers()), b) for b in (2, 3)],
            "is 2 loaders or datasets; give one, or all alike",
        ),
        (7, "is a int; give"),
        ("data.pt", "is a str; give"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_way_out(train, message):
    with pytest.raises(TypeError, match=f"`data.train` {message}|{message}"):
        DatasetPartition(train)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: DataLoader(data, 2)])
def test_a_list_has_the_data_of_each_client(wrap):
    sets = [TensorDataset(torch.full((n, 1), float(n)), torch.arange(n) % 2) for n in (3, 1, 5)]
    data = ready(DatasetPartition([wrap(part) for part in sets]))
    assert [data.client_size(c) for c in range(3)] == [3, 1, 5]
    for client, part in enumerate(sets):
        held = data.client_dataset(client)
        assert {held[i][0].item() for i in range(len(held))} == {float(len(part))}
    assert data.partition_counts().tolist() == [[2, 1], [1, 0], [3, 2]]
    with pytest.raises(ValueError, match="the data of each client; it takes no partitioner"):
        DatasetPartition(sets, partitioner=DirichletClients())


# ---- strings, and labels that only the samples tell


def test_strings_are_numbered_as_they_sort():
    x = TensorDataset(torch.arange(6.0))
    labels, users = ["cat", "ant", "dog", "cat", "ant", "dog"], ["u2", "u10", "u1", "u2", "u10", "u1"]
    data = ready(DatasetPartition(x, num_clients=None, targets=labels, groups=users))  # no partitioner: by groups
    assert data.classes == ["ant", "cat", "dog"]
    assert [sorted(data.client_rows(c).tolist()) for c in range(3)] == [[2, 5], [1, 4], [0, 3]]  # u1, u10, u2
    assert data.partition_counts().tolist() == [[0, 0, 2], [2, 0, 0], [0, 2, 0]]
    with pytest.raises(ValueError, match=r"is 4, but the data has 3 groups; .* 3 clients \(null: one for each\)"):
        ready(DatasetPartition(x, num_clients=4, targets=labels, groups=users))


class Texts(Dataset):
    """Strings as labels and users, kept as attributes."""

    def __init__(self, labels):
        self.labels, self.user = labels, ["b", "a"] * (len(labels) // 2)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return index, self.labels[index]


def test_attributes_are_found_by_name_and_validation_has_the_same_numbers():
    train, val = Texts(["x", "z", "x", "z"]), Texts(["z", "x"])
    data = DatasetPartition(train, val=val, num_clients=None, partitioner=NaturalGroups(), groups="user")
    assert ready(data).client_rows(0).sort().values.tolist() == [1, 3]
    assert data.client_val_dataset(0)[0] == (1, "x"), "a natural client has the held-out data of its group"
    for other in (train, TensorDataset(torch.zeros(4, 2), torch.arange(4))):  # whose last tensor is no user
        with pytest.raises(ValueError, match="`data.groups` is 'usr', which is no column or attribute"):
            ready(DatasetPartition(other, num_clients=None, partitioner=NaturalGroups(), groups="usr"))


def test_what_is_taken_for_classes_is_said(caplog):
    x, y = seeded(12, 3), torch.arange(12) % 4
    caplog.set_level(logging.INFO)
    coarse = ready(DatasetPartition((x, y), test=(x, y), targets=(y // 2).tolist(), num_clients=2))
    assert coarse.client_val_dataset(0) is None, "its validation data would be chosen by other labels"
    assert "`data.targets` are not the data's own labels" in caplog.text
    same = ready(DatasetPartition((x, y), test=(x, y), targets=y.tolist(), num_clients=2))
    assert same.client_val_dataset(0) is not None
    ready(DatasetPartition({"x": x, "y": y, "group": y // 2}, num_clients=2))
    assert "the class of a sample" not in caplog.text
    assert ready(DatasetPartition((x, y, y // 2), num_clients=2)).num_classes == 2
    assert "the class of a sample is the last of its 3 tensors, or `data.targets`" in caplog.text
    assert ready(DatasetPartition({"x": x, "age": y}, num_clients=2)).num_classes is None


class Folder(TensorDataset):
    """As torchvision's ImageFolder."""

    def __init__(self, classes, labels=(0, 1, 2, 0, 1, 2)):
        super().__init__(torch.zeros(len(labels), 2), torch.tensor(labels))
        self.classes, self.targets = classes, list(labels)


def test_sets_that_number_their_classes_otherwise_are_refused():
    train, fewer = Folder(["ant", "bee", "cat"]), Folder(["ant", "cat"], (0, 1))
    for kind in ("val", "test"):
        with pytest.raises(ValueError, match=rf"`data.{kind}` numbers its classes \['ant', 'cat'\], and `data.train`"):
            DatasetPartition(train, **{"val": train, kind: Subset(fewer, [1])}, num_clients=2).setup()
    data = DatasetPartition(Subset(train, range(6)), Folder(["ant", "bee"], (0, 1)), num_clients=2)
    data.setup()
    assert (data.classes, data.num_classes) == (["ant", "bee", "cat"], 3)
    other = DatasetPartition(train, num_clients=2, targets=[0, 5] * 3)
    other.setup()
    assert (other.classes, other.num_classes) == ([], 6)


@pytest.mark.parametrize("sample", [lambda i: (i, i % 3), lambda i: {"text": "t", "label": torch.tensor(i % 3)}])
def test_labels_are_read_from_samples_where_a_partitioner_needs_them(sample, caplog):
    class Bare(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            torch.rand(1)
            return sample(index)

    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        data = ready(DatasetPartition(Bare(), num_clients=3, partitioner=DirichletClients(10.0)))
    assert data.partition_counts().sum(0).tolist() == [4, 4, 4]
    assert "all 12 samples are read to find their labels" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)
    assert ready(DatasetPartition(Bare(), num_clients=3)).partition_counts() is None  # IID reads nothing


def test_attributes_that_are_not_one_per_sample_are_no_labels():
    class Named(Dataset):
        labels = ("cat", "dog")  # names of classes

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return index

    assert find_targets(Named()) is None
    assert find_targets(TensorDataset(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64))) is None


# ---- other libraries


def test_datasets_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    datasets.disable_progress_bars()
    rows = {"x": seeded(12, 3).tolist(), "label": ["b", "a", "c"] * 4, "user": ["u2", "u1"] * 6}
    train, test = datasets.Dataset.from_dict(rows), datasets.Dataset.from_dict({k: v[:3] for k, v in rows.items()})
    data = DatasetPartition(train, test, num_clients=None, partitioner=NaturalGroups(), groups="user", batch_size=4)
    ready(data)
    assert (data.num_clients, data.classes) == (2, ["a", "b", "c"])
    assert data.partition_counts().tolist() == [[2, 2, 2], [2, 2, 2]]
    held = torch.stack([data.client_dataset(0)[i]["x"] for i in range(6)])
    assert torch.equal(held.sort(0).values, seeded(12, 3)[1::2].sort(0).values)  # user u1
    batch = next(iter(data.test_dataloader()))
    assert batch["label"].tolist() == [1, 0, 2]
    assert torch.equal(batch["x"], seeded(12, 3)[:3])
    skewed = ready(DatasetPartition(train, num_clients=3, partitioner=DirichletClients(0.3)))
    assert skewed.partition_counts().sum(0).tolist() == [4, 4, 4]

    class Net(Regression):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch["x"]), batch["label"].float())

        validation_step = None

    quiet_trainer(tmp_path, max_rounds=1, limit_val_batches=0).fit(Net(), data)
    with pytest.raises(TypeError, match="an iterable"):
        DatasetPartition(train.to_iterable_dataset())
    with pytest.raises(TypeError, match="is a DatasetDict; give one dataset"):
        DatasetPartition(datasets.DatasetDict(train=train))


@pytest.mark.parametrize("kind", [TensorDataset, Samples])
def test_rows_of_both_sets_are_counted(kind, caplog):
    caplog.set_level(logging.INFO)
    whole = kind(*numbers(20))
    ready(DatasetPartition(Subset(whole, range(12)), val=Subset(Subset(whole, range(8, 20)), range(6)), num_clients=2))
    assert "4 of 6 validation samples are training samples, too" in caplog.text
    caplog.clear()
    ready(DatasetPartition(Subset(whole, range(12)), test=Subset(whole, range(12, 20)), num_clients=2))
    assert "training samples" not in caplog.text
    ready(DatasetPartition(whole, test=whole, num_clients=2))
    assert caplog.text.count("20 of 20 test samples are training samples, too") == 1
    assert "validation" not in caplog.text


def test_labels_of_hugging_face_are_the_same_in_all_sets():
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")
    datasets.disable_progress_bars()

    def made(labels, names=None):
        told = {"x": [[1.0, 2.0]] * len(labels), "label": labels, "day": [datetime.date(2026, 1, 1)] * len(labels)}
        held = datasets.Dataset.from_dict(told)
        return held.cast_column("label", datasets.ClassLabel(names=names)) if names else held

    data = ready(DatasetPartition(made(["10", "9", "2"]), made(["9", "10"]), num_clients=1))
    assert data.classes == ["2", "9", "10"]
    batch = next(iter(data.test_dataloader()))
    assert (batch["label"].tolist(), sorted(batch)) == ([1, 2], ["label", "x"])
    for val, said in ((made(["c"]), "Invalid string class label c"), (made([0], ["b", "a"]), r"order \['b', 'a'\]")):
        with pytest.raises(ValueError, match=rf"`data.val`: labels are not those of training, \['a', 'b'\]: .*{said}"):
            ready(DatasetPartition(made([0, 1], ["a", "b"]), val=val, num_clients=1))
    clients = ready(DatasetPartition([made(["a", "b"]), made(["b"])]))
    assert clients.client_dataset(1)[0]["label"] == 1
    assert clients.client_dataset(1)[0]["x"].tolist() == [1.0, 2.0]
    with pytest.raises(TypeError, match="`data.train`: the clients' columns differ"):
        DatasetPartition([made([0], ["a", "b"]), made([0], ["b", "a"])])


@pytest.mark.parametrize("given", ["list", "loader"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_graphs_of_pyg(tmp_path, given):
    pytest.importorskip("torch_geometric", reason="needs torch_geometric")
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader
    from torch_geometric.nn import global_add_pool

    edge = torch.tensor([[0, 1], [1, 0]])
    graphs = [Data(x=seeded(2 + i % 2, 3, seed=i), edge_index=edge, y=torch.tensor([i % 3])) for i in range(12)]
    train, size = (graphs, 2) if given == "list" else (GraphLoader(graphs, batch_size=2), None)
    data = DatasetPartition(train, num_clients=3, partitioner=DirichletClients(10.0), batch_size=size)
    assert ready(data).partition_counts().sum(0).tolist() == [4, 4, 4]
    assert isinstance(data.pooled_dataset(), Dataset)

    class Net(Regression):
        def training_step(self, batch, batch_idx):
            assert batch.num_graphs == 2
            return F.mse_loss(self(global_add_pool(batch.x, batch.batch)), batch.y.float())

        validation_step = None

    quiet_trainer(tmp_path, max_rounds=1, limit_val_batches=0).fit(Net(), data)


@pytest.mark.parametrize("centralized", [False, True])
def test_modules_read_what_the_stock_datamodule_has(tmp_path, centralized):
    found = []

    class Asks(Regression):
        def on_fit_start(self):
            data = self.trainer.datamodule
            found.extend([data.weights, data.hparams.bins, hasattr(data, "absent"), data.batch_size])

    stock = Stock()
    stock.weights = [1.0, 2.0]
    stock.save_hyperparameters({"bins": 3})
    quiet_trainer(tmp_path, max_rounds=1, centralized=centralized).fit(Asks(), Federated(stock, num_clients=3))
    assert found == [[1.0, 2.0], 3, False, 4]
