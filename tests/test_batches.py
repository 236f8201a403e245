"""How many samples a batch has, in all the forms in which batches come, and what depends on it."""

import warnings
from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate

from fedlight.analysis.batches import analysis_batches
from fedlight.penalties import batches
from fedlight.penalties.batches import batch_size
from tests.helpers.tiny import Clients, Regression, Samples, quiet_trainer

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    name: str
    x: Tensor
    y: Any = None


def x(n: int = 5) -> Tensor:
    return torch.zeros(n, 3)


BATCHES = {
    "tensor": (x(), 5),
    "scalar": (torch.tensor(2.0), 1),
    "pair": ((x(), x()[:, 0]), 5),
    "list": ([x(), x(), x()], 5),
    "views of images": ([[x(), x()], x()[:, 0]], 5),
    "dict": ({"x": x(), "y": x()}, 5),
    "nested": ({"a": {"b": [x()]}, "c": x()}, 5),
    "text first": ({"text": ["a"] * 5, "x": x()}, 5),
    "none first": ((None, x()), 5),
    "mapping": (UserDict(x=x(), y=x()), 5),
    "mapping in a list": ([UserDict(x=x()), x()], 5),
    "named tuple": (Pair(x(), x()), 5),
    "dataclass": (Sample("a", x()), 5),
    "dataclass in a dict": ({"a": Sample("b", x(), Sample("c", x()))}, 5),
    "other lengths": ((x(4), x(5)), 4),
    "a number beside": ({"weight": torch.tensor(0.5), "x": x()}, 1),
    "boxes": (([x(3), x(3)], [{"boxes": x(2)}, {"boxes": x(1)}]), 3),
    "packed": (pack_sequence([x(4), x(2)]), 6),
    "text": (["a", "b"], 1),
    "nothing": ([], 1),
    "a number": (3, 1),
}


@pytest.mark.parametrize("name", BATCHES)
def test_sizes_are_those_of_lightning(name):
    batch, size = BATCHES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more than one length
        assert batch_size(batch) == size
        try:
            assert extract_batch_size(batch) == size
        except MisconfigurationException:
            assert size == 1


def test_a_batch_with_two_lengths_is_named_once(monkeypatch):
    monkeypatch.setattr(batches, "_told", WarningCache())
    with pytest.warns(
        UserWarning, match=r"tensors of lengths \[7, 2\]: logs that pass no batch_size are weighted by 7"
    ) as said:
        assert [batch_size({"x": x(7), "other": x(n)}) for n in (2, 3)] == [7, 7]
    assert len(said) == 1


def test_sizes_of_transformers_and_geometric():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    geometric = pytest.importorskip("torch_geometric.data", reason="pip install torch_geometric")
    encoding = transformers.BatchEncoding({"input_ids": x(), "attention_mask": x()})
    assert batch_size(encoding) == batch_size([encoding, x()]) == extract_batch_size(encoding) == 5
    graphs = [geometric.Data(x=torch.zeros(n, 2), y=torch.zeros(1)) for n in (3, 1, 4)]
    batch = geometric.Batch.from_data_list(graphs)
    assert batch_size(batch) == batch_size((batch, x(3))) == 3  # and not its 8 nodes
    mixed = geometric.HeteroData()
    mixed["user"].x = x()
    assert batch_size({"text": ["a"], "graphs": geometric.Batch.from_data_list([mixed, mixed])}) == 2


def test_text_beside_tensors_is_no_other_length():
    assert batch_size({"x": x(), "text": ["a", "b"], "number": 3}) == 5  # Lightning would warn


class Logs(Regression):
    """Takes whatever ``make`` makes of x and y, and logs without saying how many samples there are."""

    def pair(self, batch):
        return (batch.x, batch.y) if hasattr(batch, "x") else (batch["x"], batch["y"])

    def training_step(self, batch):
        pair = self.pair(batch)
        assert pair[0].dtype == self.dtype
        self.log("size", float(len(pair[0])))
        return super().training_step(pair, 0)

    def validation_step(self, batch):
        self.log("val/size", float(len(self.pair(batch)[0])))


def graphs(samples):
    data = pytest.importorskip("torch_geometric.data", reason="pip install torch_geometric")
    return data.Batch.from_data_list([data.Data(x=a[None], y=b[None], junk=torch.zeros(9, 1)) for a, b in samples])


def encoded(samples):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    a, b = default_collate(samples)
    return transformers.BatchEncoding({"x": a, "y": b})


MAKE = {
    "encoding": encoded,
    "mapping": lambda samples: UserDict(zip("xy", default_collate(samples), strict=True)),
    "dataclass": lambda samples: Sample("a", *default_collate(samples)),
    "graphs": graphs,
}


class Made(Clients):
    def dataset(self, x, y):
        return Samples(x, y)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_means_of_logs_are_weighted_by_samples(make, tmp_path):
    """One client of 5 samples has batches of 4 and 1, and 10 samples for validation make batches of 4, 4 and 2."""
    trainer = quiet_trainer(tmp_path, max_rounds=1, clients_per_round=1)
    trainer.fit(Logs(), Made(sizes=(5,), collate_fn=make))
    assert trainer.callback_metrics["size"] == pytest.approx((16 + 1) / 5)
    assert trainer.callback_metrics["val/size"] == pytest.approx((16 + 16 + 4) / 10)


@pytest.mark.parametrize("make", list(MAKE.values())[:3], ids=list(MAKE)[:3])
def test_an_analysis_cuts_batches_of_any_form(make):
    data = [make([(x()[0], torch.tensor(1.0))] * 4) for _ in range(3)]
    batches = analysis_batches(data, device=torch.device("cpu"), max_samples=6)
    assert batches.sizes == [4, 2]
    assert [len(Logs().pair(batch)[0]) for batch in batches] == [4, 2]
