"""Clients' data may be any tree of tensors: every engine trains on it as the eager one does through a loader."""

from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import optim
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from fedlight.data.arrays import ArrayDataset
from fedlight.data.datamodule import FederatedDataModule
from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.engines.vmap.engine import Vmap
from tests.engines import cases
from tests.engines.tape import Tape

SGD = {"optimizer": partial(optim.SGD, lr=0.125, fused=True)}


class Samples(Dataset):
    """Read one by one, as ``make`` makes them of an image, its class and its weight."""

    def __init__(self, tensors, make):
        self.tensors, self.make = tensors, make

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, index):
        return self.make(*(tensor[index] for tensor in self.tensors))


MAKE = {
    "two tensors": lambda x, y, w: TensorDataset(x, y),
    "three tensors": TensorDataset,
    "dict": lambda x, y, w: ArrayDataset.of({"image": x, "label": y, "extra": {"weight": w}}),
    "tuple": lambda *tensors: ArrayDataset.of(tensors),
    "read: dict": lambda *t: Samples(t, lambda x, y, w: {"image": x, "label": int(y), "extra": {"weight": w}}),
    "read: tuple": lambda *t: Samples(t, lambda x, y, w: (x, y, w)),
}


class Data(FederatedDataModule):
    """Subsets of one dataset, or with ``own`` a dataset for each client."""

    def __init__(self, make, sizes=cases.UNEQUAL, own=False, collate_fn=None, batch_size=4):
        super().__init__(batch_size, eval_batch_size=16, collate_fn=collate_fn)
        n, rng = sum(sizes), torch.Generator().manual_seed(1)
        tensors = torch.randn(n, 1, 6, 6, generator=rng), torch.arange(n) % 3, torch.rand(n, generator=rng)
        rows, self.num_clients = torch.randperm(n, generator=rng).split(sizes), len(sizes)
        self.whole = make(*tensors)
        self.parts = [make(*(t[r] for t in tensors)) if own else Subset(self.whole, r.tolist()) for r in rows]

    def client_dataset(self, client):
        return self.parts[client]

    def val_dataset(self):
        return self.whole


class Net(cases.Net):
    """Takes a batch apart, and checks that it is what a loader gives."""

    def training_step(self, batch, batch_idx):
        return super().training_step(self.pair(batch), batch_idx) * self.weight(batch)

    def validation_step(self, batch):
        super().validation_step(self.pair(batch))

    def pair(self, batch):
        if isinstance(batch, dict):
            assert list(batch) == ["image", "label", "extra"]
            return batch["image"], batch["label"]
        return batch[0], batch[1]

    def weight(self, batch):
        if isinstance(batch, dict):
            return batch["extra"]["weight"].mean()
        return batch[2].mean() if len(batch) > 2 else 1.0


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "Net", Net)

    def run(engine, make, data=None, **settings):
        monkeypatch.setattr(cases, "Images", lambda: Data(make, **(data or {})))
        return cases.train(tmp_path, engine, **{"net": SGD, **settings})

    return run


def collate(samples):
    """Torch's own, but nobody can know."""
    return default_collate(samples)


def assert_same(found, expected):
    assert [key for key, value in expected[0].items() if not torch.equal(found[0][key], value)] == []
    assert found[1] == expected[1]


@pytest.mark.parametrize("name", MAKE)
def test_engines_agree_on_any_tree(name, train, monkeypatch):
    settings = {"accumulate_grad_batches": 2} if name == "dict" else {}
    expected = train("eager", MAKE[name], {"collate_fn": None if name in ("dict", "tuple") else collate}, **settings)
    assert_same(train("eager", MAKE[name], **settings), expected)
    found, rows = train(Vmap(), MAKE[name], **settings)
    for key, value in expected[0].items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=key)
    assert all(a == pytest.approx(b, rel=1e-5, abs=1e-6) for a, b in zip(rows, expected[1], strict=True))
    monkeypatch.setattr(CudaGraph, "_train_plainly", None)  # every client can be recorded
    assert_same(train(CudaGraph(slots=2, recorder=Tape), MAKE[name], **settings), expected)


def test_clients_may_have_tensors_of_their_own(train):
    make = MAKE["three tensors"]
    expected = train("eager", make, {"own": True})
    found, _ = train(Vmap(), make, {"own": True})
    torch.testing.assert_close(found, expected[0], rtol=1e-9, atol=1e-11)
    assert_same(train(CudaGraph(slots=2, recorder=Tape), make, {"own": True}), expected)


def test_what_does_not_fit_on_the_device_is_copied_when_a_client_trains(train, monkeypatch):
    expected = train("eager", MAKE["dict"])
    monkeypatch.setattr("fedlight.data.arrays._Storage.fits", lambda self, device: False)
    assert_same(train(CudaGraph(slots=2, recorder=Tape), MAKE["dict"]), expected)
    found, _ = train(Vmap(), MAKE["dict"])
    torch.testing.assert_close(found, expected[0], rtol=1e-9, atol=1e-11)


OTHERS = {
    "fewer tensors": lambda x, y, w: TensorDataset(x, y),
    "another shape": lambda x, y, w: TensorDataset(x, y, torch.stack([w, 2 * w], 1)),
    "not in memory": lambda *t: Samples(t, lambda x, y, w: (x + 0 * torch.rand(()), y, w)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_clients_whose_batches_differ_train_one_by_one(name, train, monkeypatch):
    def mixed(self, client):
        part = self.parts[client]
        return OTHERS[name](*part[:]) if client == 1 else part

    monkeypatch.setattr(Data, "client_dataset", mixed)
    expected, _ = train("eager", MAKE["three tensors"])
    found, _ = train("vmap", MAKE["three tensors"])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("make", "collate_fn"),
    [
        (lambda *t: Samples(t, lambda x, y, w: (x + torch.rand(()), y)), None),
        (TensorDataset, collate),
    ],
    ids=["draws", "collate_fn"],
)
def test_what_a_recorded_engine_cannot_read_is_named(make, collate_fn, train):
    with pytest.raises(MisconfigurationException, match=r"trainer.engine=vmap: the clients' data is a Subset"):
        train("vmap", make, {"collate_fn": collate_fn})


@pytest.mark.parametrize("name", ["three tensors", "read: dict"])
def test_a_compiled_step_takes_any_tree(name, train, monkeypatch):
    monkeypatch.setattr("fedlight.engines.vmap.programs.BACKEND", "eager")
    expected, _ = train("eager", MAKE[name])
    found, _ = train("eager", MAKE[name], compile=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
