"""ArrayDataset: views of one storage, read a batch at a time."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from fedlight.data import ArrayDataset, BatchTransform


@pytest.fixture
def dataset():
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = BatchTransform([0.5], [0.25], flip=0.5, crop_padding=1)
    return ArrayDataset(images, torch.arange(20), torch.tensor([3, 5, 7, 11, 2]), transform)


def test_a_batch_holds_the_rows_of_this_dataset(dataset):
    inputs, targets = dataset.batch(torch.tensor([4, 0, 0]))
    assert targets.tolist() == [2, 3, 3]
    expected = (dataset.inputs[[2, 3, 3]].float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(inputs, expected)


def test_reading_one_by_one_is_reading_a_batch(dataset):
    inputs, targets = dataset.batch(torch.arange(5))
    for i in range(5):
        x, y = dataset[i]
        assert torch.equal(x, inputs[i])
        assert y == targets[i]
    assert torch.equal(dataset[-1][0], inputs[4])
    assert len(dataset) == 5
    for outside in (5, -6):
        with pytest.raises(IndexError):
            dataset[outside]


def test_a_stock_loader_reads_it(dataset):
    inputs, targets = dataset.batch(torch.arange(5))
    batches = list(DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 2, drop_last=False)))
    assert [len(y) for _, y in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([x for x, _ in batches]), inputs)
    assert torch.equal(torch.cat([y for _, y in batches]), targets)


def test_draws_are_applied_to_the_rows_they_were_cut_for(dataset):
    draws = dataset.draw(5, torch.Generator().manual_seed(5))
    whole, _ = dataset.batch(torch.arange(5), draws)
    part, _ = dataset.batch(torch.tensor([3, 1]), {k: v[[3, 1]] for k, v in draws.items()})
    assert torch.equal(part, whole[[3, 1]])
    assert not torch.equal(whole, dataset.batch(torch.arange(5))[0])


def test_views_share_the_storage(dataset):
    pooled = dataset.pooled()
    assert len(pooled) == 20
    assert pooled.indices is None
    assert pooled.inputs.data_ptr() == dataset.inputs.data_ptr()
    rows = torch.tensor([1, 3])
    for a, b in zip(pooled.batch(dataset.positions(rows)), dataset.batch(rows), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(pooled.positions(rows), rows)
    other = dataset.view(torch.tensor([0]), None)
    assert other.inputs.data_ptr() == dataset.inputs.data_ptr()
    assert other[0][0].dtype == torch.uint8


def test_a_device_gets_one_copy_for_all_datasets(dataset):
    # "meta" stands for another device on a machine that has none.
    other = dataset.view(torch.tensor([1]), dataset.transform)
    moved, moved_again, other_moved = dataset.to("meta"), dataset.to("meta"), other.to("meta")
    assert moved.device.type == "meta"
    assert moved.indices.device.type == "meta"
    assert moved.inputs is moved_again.inputs
    assert moved.inputs is other_moved.inputs
    assert moved.view(None, None).to("cpu").inputs is dataset.inputs
    inputs, targets = moved.batch(torch.zeros(3, dtype=torch.int64, device="meta"))
    assert inputs.shape == (3, 1, 4, 4)
    assert targets.shape == (3,)
    assert inputs.device.type == "meta"


def test_works_under_vmap(dataset):
    rows = torch.tensor([[0, 1], [4, 2]])
    draws = dataset.draw(4, torch.Generator().manual_seed(0))
    together = torch.vmap(dataset.batch)(rows, {k: v.view(2, 2) for k, v in draws.items()})
    alone = dataset.batch(rows.flatten(), draws)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.flatten(0, 1), b)


def test_other_tensors_are_left_as_they_are():
    tokens = ArrayDataset(torch.arange(12).view(4, 3), torch.tensor([0.5, 1.5, 2.5, 3.5]))
    inputs, targets = tokens.batch(torch.tensor([2]))
    assert inputs.tolist() == [[6, 7, 8]]
    assert targets.tolist() == [2.5]
    assert tokens.draw(4, torch.Generator()) == {}


def test_survives_copy_and_pickle(dataset):
    dataset.to("meta")
    for twin in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert torch.equal(twin[2][0], dataset[2][0])
        assert len(twin) == 5


@pytest.mark.parametrize("made", [lambda x, y: ({"x": x}, y), lambda x, y: ([x], y), lambda x, y: ([], x)])
def test_a_batch_is_a_tree_as_the_data_are(made):
    x, y = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    batch = ArrayDataset.of(made(x, y)).batch(torch.tensor([0, 2]))
    assert str(batch) == str(made(x[[0, 2]], y[[0, 2]]))


def test_a_target_for_each_input():
    with pytest.raises(ValueError, match=r"need an entry for each sample.*found \[3, 1\] on cpu, \[2\] on cpu"):
        ArrayDataset(torch.zeros(3, 1), torch.zeros(2))


def test_what_does_not_fit_is_read_in_parts(dataset, monkeypatch):
    """Half of the free memory may be taken, the decision is made once, and said once."""
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (2 * STORED - 1, 10**9))
    device = torch.device("cuda:0")
    with pytest.warns(UserWarning, match="do not fit on cuda:0"):
        assert not dataset.fits(device)
    assert not dataset.view(None, None).fits(device)
    assert asked == [device]
    other = ArrayDataset(dataset.inputs, dataset.targets)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * STORED, 10**9))
    assert other.fits(device)
    assert dataset.fits("cpu")


STORED = 20 * 16 + 20 * 8


def test_parts_are_the_same_wherever_the_storage_is(dataset, monkeypatch):
    expected = dataset.part(1, 4, "cpu")
    assert expected[1].tolist() == [5, 7, 11]
    monkeypatch.setattr(ArrayDataset, "fits", lambda self, device: False)
    for found in (dataset.part(1, 4, "cpu"), dataset.near("cpu").batch(torch.arange(1, 4))):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    whole = dataset.pooled().near("cpu")
    whole.inputs.zero_()  # a copy
    assert dataset.inputs.any()


@pytest.mark.parametrize("most", [1, 100, 2**20])
def test_batches_that_are_gathered_together_are_the_same(dataset, monkeypatch, most):
    monkeypatch.setattr("fedlight.data.arrays._GATHERED_BYTES", most)
    rows, edges = torch.tensor([2, 0, 1, 0, 2]), [(1, 3), (3, 4), (4, 5)]
    draws = dataset.draw(5, torch.Generator().manual_seed(0))
    found = []
    for inputs, targets in dataset.batches(rows, edges, draws):
        found.append((inputs.clone(), targets.clone()))
        inputs.fill_(-1)  # what a step does to its batch
        targets.fill_(-1)
    for (begin, end), batch in zip(edges, found, strict=True):
        expected = dataset.batch(rows[begin:end], {name: value[begin:end] for name, value in draws.items()})
        assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))
