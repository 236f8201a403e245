import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fedlight.analysis.batches import analysis_batches
from fedlight.data.arrays import ArrayDataset
from fedlight.seeding import preserved_global_rng

X, Y = torch.arange(50.0)[:, None], torch.arange(50)
CPU = torch.device("cpu")


def rows(batches):
    return torch.cat([batch[1] for batch in batches]).tolist()


@pytest.mark.parametrize("dataset", [ArrayDataset(X, Y), TensorDataset(X, Y)])
def test_a_dataset_is_cut_into_batches(dataset):
    batches = analysis_batches(dataset, device=CPU, batch_size=20)
    assert batches.sizes == [20, 20, 10]
    assert rows(batches) == list(range(50))
    assert [len(b[0]) for b in batches] == batches.sizes


@pytest.mark.parametrize("dataset", [ArrayDataset(X, Y), TensorDataset(X, Y)])
def test_a_sample_is_drawn_without_replacement_and_repeats(dataset):
    first, again, other = (
        rows(analysis_batches(dataset, device=CPU, max_samples=20, batch_size=7, seed=s)) for s in (1, 1, 2)
    )
    assert len(set(first)) == 20
    assert first == again != other
    assert rows(analysis_batches(dataset, device=CPU, max_samples=99)) == list(range(50))


def test_both_kinds_of_datasets_draw_the_same_rows():
    kinds = ArrayDataset(X, Y), TensorDataset(X, Y)
    assert rows(analysis_batches(kinds[0], device=CPU, max_samples=9)) == rows(
        analysis_batches(kinds[1], device=CPU, max_samples=9)
    )


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_processes_share_the_data_without_overlap(world_size):
    parts = [
        analysis_batches(ArrayDataset(X, Y), device=CPU, max_samples=40, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    together = [row for part in parts for row in rows(part)]
    assert sorted(together) == rows(analysis_batches(ArrayDataset(X, Y), device=CPU, max_samples=40))
    assert max(sum(p.sizes) for p in parts) - min(sum(p.sizes) for p in parts) <= 5


def test_an_iterable_of_batches_is_kept_and_cut():
    loader = DataLoader(TensorDataset(X, Y), 20)
    assert analysis_batches(loader, device=CPU).sizes == [20, 20, 10]
    cut = analysis_batches(iter(list(loader)), device=CPU, max_samples=30)
    assert cut.sizes == [20, 10]
    assert rows(cut) == list(range(30))
    halves = [analysis_batches(loader, device=CPU, rank=r, world_size=2) for r in range(2)]
    assert [h.sizes for h in halves] == [[20, 10], [20]]


@pytest.mark.parametrize("pick", [lambda batch: batch[0], lambda batch: {"x": batch[-1][0], "y": batch[-1][1]}])
def test_samples_that_are_batches_are_not_joined(pick):
    pairs = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 50, 4)]

    class Pairs(Dataset):
        def __len__(self):
            return len(pairs)

        def __getitem__(self, index):
            return pairs[index]

    batches = analysis_batches(Pairs(), device=CPU, collate_fn=pick)
    assert batches.sizes == [4] * 12 + [2]
    assert torch.cat([batch["y"] if isinstance(batch, dict) else batch[1] for batch in batches]).equal(Y)


def test_a_transfer_function_is_applied_to_every_batch():
    for data in (ArrayDataset(X, Y), TensorDataset(X, Y), [(X, Y)]):
        batches = analysis_batches(data, device=CPU, transfer=lambda batch: (batch[0] + 1, batch[1]))
        assert batches[0][0][0].item() == 1


def test_drawing_leaves_the_global_generators_alone():
    with preserved_global_rng():
        before = torch.get_rng_state()
        analysis_batches(TensorDataset(X, Y), device=CPU, max_samples=5)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (None, {}, "no data.*validation"),
        (TensorDataset(X[:0], Y[:0]), {}, "dataset is empty"),
        (TensorDataset(X, Y), {"max_samples": 0}, "`max_samples` must be at least 1"),
        (TensorDataset(X, Y), {"batch_size": 0}, "`batch_size` must be at least 1"),
    ],
)
def test_what_cannot_be_read_is_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        analysis_batches(data, device=CPU, **options)


def test_a_stream_of_single_samples_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    with pytest.raises(TypeError, match="Stream gives single samples"):
        analysis_batches(Stream(), device=CPU)


@pytest.mark.parametrize("rank", [0, 1])
def test_data_that_does_not_fit_on_the_device_is_read_in_parts(monkeypatch, rank):
    x, y = torch.arange(40.0)[:, None], torch.arange(40)
    data = ArrayDataset(x, y).view(torch.arange(39, 9, -1), None)
    settings = {"device": torch.device("cpu"), "max_samples": 23, "batch_size": 5, "rank": rank, "world_size": 2}
    expected = list(analysis_batches(data, **settings))
    monkeypatch.setattr(ArrayDataset, "fits", lambda self, device: False)
    assert len(analysis_batches(data, **settings | {"rank": 30, "world_size": 31})) == 0
    found = list(analysis_batches(data, **settings))
    assert len(found) == len(expected) == (3 if rank == 0 else 2)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
