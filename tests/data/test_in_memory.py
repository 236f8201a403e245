"""What is in memory is found there, shares it, and gives the batches of a stock loader."""

import pickle
import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from fedlight.data import DatasetPartition, DirichletClients
from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.data.dataset_partition import find_targets
from tests.helpers.tiny import seeded

Pair = namedtuple("Pair", ["x", "y"])
X, Y, W = seeded(12, 3), torch.arange(12) % 3, seeded(12, seed=1, dtype=torch.float64)
BATCHES = [[3, 1, 4], [0, 5], [2]]


class Made(Dataset):
    """Samples as ``make`` makes them of x, y and w."""

    def __init__(self, make):
        self.make, self.read = make, 0

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        self.read += 1
        return self.make(X[index], Y[index], W[index])


MEMORY = {
    "one tensor": TensorDataset(X),
    "two tensors": TensorDataset(X, Y),
    "three tensors": TensorDataset(X, Y, W),
    "subset": Subset(TensorDataset(X, Y), [7, 2, 9, 1, 0, 11]),
    "nested subset": Subset(Subset(TensorDataset(X, Y, W), torch.arange(1, 12)), range(9)),
    "transposed": TensorDataset(seeded(3, 12).T, Y),
}
READ = {
    "tuple": lambda x, y, w: (x, y, w),
    "dict": lambda x, y, w: {"x": x, "y": y},
    "nested": lambda x, y, w: {"x": (x, {"w": w}), "y": [y]},
    "named tuple": lambda x, y, w: Pair(x, y),
    "numbers": lambda x, y, w: (x.numpy(), int(y), float(w)),
    "one": lambda x, y, w: x,
}
ELSEWHERE = {
    "text": lambda x, y, w: (x, "word"),
    "shapes": lambda x, y, w: (x[: 1 + int(y)], y),
    "torch draws": lambda x, y, w: (x + torch.rand(3), y),
    "python draws": lambda x, y, w: (x if random.random() < 0.5 else -x, y),
    "none": lambda x, y, w: (x, None),
}


def test_arrays_of_another_machine_or_that_run_backwards():
    held = {"x": X.numpy().astype(">f4")[::-1], "y": np.asfortranarray(Y.numpy().astype(">i8"))[::-1]}
    data = in_memory(held)
    assert torch.equal(data.inputs, X.flip(0))
    assert torch.equal(data.targets, Y.flip(0))


def loaded(dataset):
    return list(DataLoader(dataset, batch_sampler=BATCHES))


def assert_same(found, expected):
    """Types, dtypes, strides and bits."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    else:
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("dataset", MEMORY.values(), ids=MEMORY)
def test_batches_are_those_of_a_stock_loader(dataset):
    arrays = in_memory(dataset)
    assert isinstance(arrays, ArrayDataset)
    assert len(arrays) == len(dataset)
    assert_same([arrays.batch(torch.tensor(rows)) for rows in BATCHES], loaded(dataset))
    assert_same(arrays.part(0, 3, "cpu"), default_collate([dataset[i] for i in range(3)]))
    assert_same(loaded(arrays), loaded(dataset))
    assert_same(pickle.loads(pickle.dumps(arrays)).batch(torch.tensor([1])), arrays.batch(torch.tensor([1])))


@pytest.mark.parametrize("make", READ.values(), ids=READ)
def test_samples_of_tensors_are_read_for_an_engine_that_needs_it(make):
    dataset = Made(make)
    assert in_memory(dataset) is dataset
    arrays = in_memory(dataset, read=True)
    assert_same([arrays.batch(torch.tensor(rows)) for rows in BATCHES], loaded(dataset))
    reads = dataset.read
    part = in_memory(Subset(dataset, [5, 6]), read=True)
    assert_same(part.batch(torch.tensor([1])), arrays.batch(torch.tensor([6])))
    assert part.storage is arrays.storage
    assert dataset.read == reads  # once is enough


@pytest.mark.parametrize("make", ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_is_not_tensors_or_draws_is_left_to_a_loader(make):
    dataset = Made(make)
    state = random.getstate(), torch.get_rng_state()
    assert in_memory(dataset, read=True) is dataset
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_what_does_not_fit_is_left_to_a_loader(monkeypatch):
    monkeypatch.setattr("fedlight.data.arrays._MOST_BYTES", 12 * (12 + 8) - 1)
    dataset = Made(lambda x, y, w: (x, y))
    assert in_memory(dataset, read=True) is dataset
    assert dataset.read == 1


def test_another_collate_function_gets_its_samples():
    dataset = TensorDataset(X, Y)
    assert in_memory(dataset, lambda samples: samples) is dataset
    assert isinstance(in_memory(dataset, default_collate), ArrayDataset)
    with pytest.raises(ValueError, match="collate_fn has no part: give a TensorDataset"):
        in_memory(in_memory(dataset), list)
    for tree in ((X, Y), {"x": X, "y": Y}):  # which stand for a dataset, and not for two samples
        data = DatasetPartition(tree, num_clients=3, collate_fn=list)
        data.setup()
        assert [data.client_size(client) for client in range(3)] == [4, 4, 4]
        assert data.num_classes == 3
        assert type(data.client_dataset(0)[0]) is type(tree)


def test_nothing_is_copied_and_parts_share_what_they_are_parts_of():
    dataset = TensorDataset(X, Y)
    one, other = (in_memory(Subset(dataset, rows)) for rows in ([1, 2], [3]))
    assert one.storage is other.storage
    assert one.inputs is X
    assert one.targets is Y


def test_what_changes_is_read_anew():
    dataset = TensorDataset(X.clone(), Y.clone())
    before = in_memory(dataset)
    assert in_memory(dataset).storage is before.storage
    dataset.tensors[1][0] = 2
    changed = in_memory(dataset)
    assert changed.storage is not before.storage
    dataset.tensors = (X, W)
    assert in_memory(dataset).targets is W


def test_samples_in_a_list_are_samples():
    samples = [(X[i], Y[i]) for i in range(4)]
    assert in_memory(samples) is samples
    assert in_memory(samples, read=True) is samples


TREES = {"dict": {"x": X, "labels": Y, "w": W}, "y first": {"y": Y, "x": X}, "tuple": (X, W, Y)}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_tensors_stand_for_a_dataset(tree):
    data = DatasetPartition(tree, test=tree, num_clients=3, partitioner=DirichletClients(1.0))
    data.setup()
    assert data.partition_counts().sum(0).tolist() == [4, 4, 4]
    assert sum(data.client_size(client) for client in range(3)) == 12
    for client in range(3):
        rows = data.client_rows(client)
        batch = data.client_dataset(client).batch(torch.arange(len(rows)))
        expected = {k: v[rows] for k, v in tree.items()} if isinstance(tree, dict) else tuple(v[rows] for v in tree)
        assert_same(batch, expected)
    assert torch.equal(find_targets(data.val_dataset()), Y)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"x": X, "y": Y[:5]}, r"found \[12, 3\] on cpu, \[5\] on cpu"),
        ((X, torch.tensor(3.0)), r"found \[12, 3\] on cpu, \[\] on cpu"),
        ((X, Y.to("meta")), "on meta"),
    ],
)
def test_tensors_of_a_dataset_fit(tree, message):
    with pytest.raises(ValueError, match=message):
        DatasetPartition(tree, num_clients=2).setup()


@pytest.mark.parametrize("mask", [[True, False], torch.tensor([True, False])])
def test_a_mask_is_no_numbers_of_rows(mask):
    """A Subset would take samples 1 and 0."""
    with pytest.raises(ValueError, match=r"numbers of rows, and this one a mask. Give mask.nonzero\(\).flatten\(\)"):
        in_memory(Subset(TensorDataset(torch.zeros(2)), mask))


@pytest.mark.parametrize("rows", [[], torch.tensor([3, 1], dtype=torch.uint8), np.array([3, 1], dtype=np.int16)])
def test_numbers_of_rows_may_be_of_any_type(rows):
    dataset = in_memory(Subset(TensorDataset(Y), rows))
    assert dataset.batch(torch.arange(len(rows)))[0].tolist() == [int(Y[int(row)]) for row in rows]
