"""FederatedDataModule and DatasetPartition: any torch dataset, federated or in a plain Trainer."""

import numpy as np
import pandas
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from fedlight.analysis.batches import analysis_batches
from fedlight.data import (
    IID,
    ArrayDataset,
    DatasetPartition,
    DirichletClients,
    FederatedDataModule,
    ImageData,
    NaturalGroups,
)
from fedlight.data.datamodule import set_up
from fedlight.data.dataset_partition import find_targets
from fedlight.data.federated import training_data
from tests.helpers.tiny import SIZES, Clients


class Words(Dataset):
    """A dataset that is read sample by sample, of dictionaries."""

    def __init__(self, n=30, labelled=True):
        self.n = n
        if labelled:
            self.labels = [i % 3 for i in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {"text": f"word {index}"} | ({"label": index % 3} if hasattr(self, "labels") else {})


class ByHand(FederatedDataModule):
    """The smallest subclass: three clients with one, two and three samples."""

    def setup(self, stage=None):
        self.num_clients = 3

    def client_dataset(self, client):
        return TensorDataset(torch.full((client + 1, 2), float(client)), torch.arange(client + 1))

    def val_dataset(self):
        return self.client_dataset(2)


def ready(data):
    data.setup()
    return data


def test_a_partitioner_is_an_object():
    with pytest.raises(
        MisconfigurationException, match=r"data.partitioner: <class .* is no object. Give .* as IID\(\)"
    ):
        DatasetPartition(TensorDataset(torch.zeros(4)), num_clients=2, partitioner=IID)


def test_the_smallest_subclass():
    data = ready(ByHand(batch_size=2, eval_batch_size=3))
    assert [data.client_size(client) for client in range(3)] == [1, 2, 3]
    assert data.partition_counts() is None
    assert data.client_val_dataset(0) is None
    assert data.test_dataset() is None
    assert data.test_dataloader() == []
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([x for x, _ in batches])[:, 0].tolist()) == [0, 1, 1, 2, 2, 2]
    assert [len(x) for x, _ in data.val_dataloader()] == [3]


def test_the_base_class_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="must define client_dataset"):
        FederatedDataModule().client_dataset(0)


def test_any_dataset_is_divided():
    data = ready(DatasetPartition(Words(), test=Words(12), num_clients=5, partitioner=DirichletClients(0.3)))
    assert data.num_clients == 5
    assert data.partition_counts().sum(1).tolist() == [6] * 5
    rows = []
    for client in range(5):
        dataset = data.client_dataset(client)
        assert dataset[0].keys() == {"text", "label"}
        rows += [int(dataset[i]["text"].split()[1]) for i in range(len(dataset))]
        labels = torch.tensor([dataset[i]["label"] for i in range(len(dataset))])
        assert torch.bincount(labels, minlength=3).tolist() == data.partition_counts()[client].tolist()
    assert sorted(rows) == list(range(30))
    assert len(data.val_dataset()) == len(data.test_dataset()) == 12
    assert sum(len(d) for d in map(data.client_val_dataset, range(5)) if d is not None) == 12


def test_tensors_are_read_a_batch_at_a_time_with_the_same_result():
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    fast = ready(DatasetPartition(TensorDataset(x, y), num_clients=4))
    slow = ready(DatasetPartition(TensorDataset(x, y), num_clients=4, collate_fn=list))
    for client in range(4):
        a, b = fast.client_dataset(client), slow.client_dataset(client)
        assert isinstance(a, ArrayDataset)
        assert isinstance(b, Subset)
        for i in range(len(b)):
            assert torch.equal(a[i][0], b[i][0])
            assert a[i][1] == b[i][1]


def test_without_labels_only_what_needs_none():
    train = Words(labelled=False)
    data = ready(DatasetPartition(train, num_clients=4, val=Words(8)))
    assert data.partition_counts() is None
    assert data.client_val_dataset(0) is None
    with pytest.raises(ValueError, match=r"`data\.partitioner: DirichletClients` needs the class .* `data\.targets`"):
        ready(DatasetPartition(train, num_clients=4, partitioner=DirichletClients()))
    told = DatasetPartition(train, num_clients=4, partitioner=DirichletClients(), targets=[i % 3 for i in range(30)])
    assert ready(told).partition_counts().shape == (4, 3)


@pytest.mark.parametrize(
    "kind", [int, float, lambda i: float(i + 2**53 - 3), lambda i: f"{i}".encode(), lambda i: np.float32(i)]
)
def test_natural_groups_of_any_dataset(kind):
    groups = [kind(i // 10) for i in range(30)]
    data = ready(DatasetPartition(Words(), num_clients=None, partitioner=NaturalGroups(), groups=groups))
    assert data.num_clients == 3
    assert sorted(data.client_rows(1).tolist()) == list(range(10, 20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": [0, 1]}, r"`data\.targets` has 2 entries, but the training data has 30"),
        ({"groups": [0, 1]}, r"`data\.groups` has 2 entries"),
        ({"targets": [0.5] * 30}, "one integer per sample"),
        ({"targets": [0.0, float("nan")] * 15}, r"`data\.targets`: 15 samples have none, the first is 1"),
        ({"groups": ["a", "b", None] * 10}, r"`data\.groups`: 10 samples have none, the first is 2"),
        ({"targets": pandas.Series([1, None] * 15, dtype="Int64")}, r"`data\.targets`: 15 samples have none, .* is 1"),
        ({"groups": pandas.date_range("2026", periods=30)}, r"`data\.groups`: Timestamp is no class or group; give an"),
        ({"targets": pandas.DataFrame({"a": range(30), "b": range(30)})}, r"`data\.targets`: .* of shape \[30, 2\]"),
        ({"train": None}, r"`data\.train` is empty: there are no training samples"),
        ({"groups": ["a", 2, 3] * 10}, r"`data\.groups`: some are strings, others not"),
        ({"train": [Words(3), Words(0)]}, r"`data\.train\[1\]` is empty"),
        ({"num_clients": 31}, r"`data\.num_clients` is 31"),
        ({"train": Words(0)}, r"`data\.train` is empty"),
    ],
)
def test_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        ready(DatasetPartition(**({"train": Words()} | arguments)))


def test_whole_numbers_of_a_named_column_are_classes_and_groups_in_every_set_and_none_is_refused():
    train = {"x": torch.zeros(12), "y": torch.arange(12) % 2, "site": torch.arange(12) % 3}
    test = {"x": torch.zeros(6), "y": torch.arange(6.0) % 2, "site": torch.tensor([0.0, 0, 0, 1, 1, 2])}
    data = ready(DatasetPartition(train, test, num_clients=None, groups="site", targets="y"))
    assert [len(data.client_val_dataset(i)) for i in range(3)] == [3, 2, 1]
    words = Words()
    words.labels[4] = None
    with pytest.raises(ValueError, match=r"`data\.targets`: 1 samples have none, the first is 4"):
        ready(DatasetPartition(words, num_clients=2))


def test_targets_are_found_through_wrappers():
    words = Words(6)
    assert find_targets(Subset(words, [4, 1])).tolist() == [1, 1]
    assert find_targets(ConcatDataset([words, Subset(words, [2])])).tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert find_targets(ConcatDataset([words, Words(6, labelled=False)])) is None
    assert find_targets(TensorDataset(torch.zeros(2, 3), torch.tensor([1, 0]))).tolist() == [1, 0]
    assert find_targets(TensorDataset(torch.zeros(2, 3), torch.tensor([0.5, 0.1]))) is None  # regression
    assert find_targets(ArrayDataset(torch.zeros(3, 1), torch.tensor([5, 6, 7]), torch.tensor([2, 0]))).tolist() == [
        7,
        5,
    ]


# ---- in a plain Lightning Trainer


class Linear(LightningModule):
    def __init__(self, features):
        super().__init__()
        self.layer, self.seen, self.validated = torch.nn.Linear(features, 10), [], 0

    def training_step(self, batch, batch_index):
        x, y = batch
        self.seen.append(x)
        return torch.nn.functional.cross_entropy(self.layer(x.flatten(1)), y)

    def validation_step(self, batch, batch_index):
        self.validated += len(batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_central_training_in_a_plain_trainer(tmp_path):
    data, module = ImageData(limit_samples=100, num_clients=4, augment=True, crop_padding=2), Linear(64)
    Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    ).fit(module, datamodule=data)
    assert [len(x) for x in module.seen] == [50, 50] * 2
    assert module.validated == 200


def pooled(num_workers=0, **arguments):
    data = ready(ImageData(limit_samples=120, num_clients=4, batch_size=40, normalize="none", **arguments))
    data.num_workers = num_workers
    return data


def test_pooled_training_data_is_shuffled_augmented_and_repeatable():
    first, second = pooled(augment=True), pooled(augment=True)
    loader = first.train_dataloader()
    epochs = [torch.cat([x for x, _ in loader]) for _ in range(2)]
    again = torch.cat([x for x, _ in second.train_dataloader()])
    assert torch.equal(epochs[0], again)
    assert not torch.equal(epochs[0], epochs[1])
    plain = torch.cat([x for x, _ in pooled(augment=False).train_dataloader()])
    assert plain.shape == again.shape
    assert not torch.equal(plain, again)  # the same order, but not augmented
    stored, _ = first.pooled_dataset().batch(torch.arange(120))
    assert torch.equal(plain.flatten(1).sum(1).sort().values, stored.flatten(1).sum(1).sort().values)


def test_workers_augment_differently_and_repeatably():
    runs = [torch.cat([x for x, _ in pooled(2, augment=True).train_dataloader()]) for _ in range(2)]
    assert torch.equal(runs[0], runs[1])


def test_a_stock_loader_reads_trees_and_an_analysis_sees_no_augmentation():
    tree = {"x": torch.arange(6.0)[:, None], "y": torch.arange(6) % 2}
    (batch,) = ready(DatasetPartition(tree, num_clients=2, batch_size=6)).train_dataloader()
    assert batch["y"].tolist() == (batch["x"][:, 0] % 2).tolist()
    data = pooled(augment=True)
    found = analysis_batches(data.train_dataloader().dataset, device=torch.device("cpu"), batch_size=120)
    assert torch.equal(found[0][0], data.pooled_dataset().batch(torch.arange(120))[0])


def test_iid_is_the_default_of_any_dataset():
    assert isinstance(DatasetPartition(Words()).partitioner, IID)


@pytest.mark.parametrize("held", [0, 1])
def test_the_number_of_clients_may_be_any_whole_number(held):
    data = Clients(held_out_clients=held)
    for number in (4.0, np.float32(4), np.int64(4)):
        data.num_clients = number
        set_up(wrapped := training_data(data, centralized=False), "fit")
        assert (data.num_clients, wrapped.num_clients) == (4, 4 - held)
        assert sum(map(len, map(wrapped.client_dataset, range(4)))) == sum(SIZES)
    for number in (4.5, "4", None):
        data.num_clients = number
        with pytest.raises(ValueError, match=r"data: Clients.num_clients must be a whole number"):
            set_up(training_data(data, centralized=False), "fit")
