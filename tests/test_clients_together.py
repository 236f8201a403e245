"""Clients evaluated together have the numbers that each has by itself, and only what is a mean is evaluated so."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from fedlight import FederatedDataModule
from fedlight.data.arrays import ArrayDataset
from fedlight.module.hooks import Hooks
from fedlight.module.state import untouched
from fedlight.run.evaluation import Evaluator

SIZES = (3, 1, 7, 4, 2, 12, 5)
"""Validation samples of each client; the sixth has more than one batch of 10."""


class Data(FederatedDataModule):
    """Clients of a few classes each: views of one storage, storages of their own, or dicts."""

    num_clients = len(SIZES) + 1

    def __init__(self, kind="views", dtype=torch.float64, ignored=False):
        super().__init__(batch_size=4, eval_batch_size=10)
        rng = torch.Generator().manual_seed(1)
        x = torch.randn(sum(SIZES), 2, 4, 4, generator=rng, dtype=torch.float64).to(dtype)
        y = torch.randint(0, 3, (len(x),), generator=rng)
        y[:4] = 0  # of the first client: what one class cannot tell
        if ignored:
            y[5] = -100
        self.whole, self.kind = ArrayDataset(x, y), kind
        self.rows = torch.arange(len(x)).split(list(SIZES))

    def client_val_dataset(self, client):
        if client == len(SIZES):  # one without data
            return None
        if self.kind == "views":
            return self.whole.view(self.rows[client], None)
        x, y = (leaf[self.rows[client]] for leaf in self.whole.storage.leaves)
        return {"x": x, "y": y} if self.kind == "dicts" else ArrayDataset(x, y)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.ReLU(), nn.Dropout(), nn.Flatten(),
            nn.Linear(16, 3)
        )  # fmt: skip
        self.net[1].running_mean.normal_()

    def loss(self, z, y):
        return F.cross_entropy(z, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch.values() if isinstance(batch, dict) else batch
        z = self.net(x)
        self.log("val/loss", self.loss(z, y))
        self.log_dict({"val/accuracy": (z.argmax(1) == y).float().mean()}, batch_size=len(y))


def evaluator(module, data, precision=None):
    module._trainer = SimpleNamespace(current_epoch=1)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    return Evaluator(module, fabric, data, Hooks(None, module, []), partial(untouched, module))


@pytest.mark.parametrize("kind", ["views", "storages", "dicts"])
def test_means_are_those_of_each_client(kind):
    module, data = Net().double(), Data(kind)
    one = evaluator(module, data)
    found = one._together(range(data.num_clients))
    assert list(found) == [0, 1, 2, 3, 4, 6]  # all whose data are one batch
    assert all(m.training for m in module.modules())
    module.eval()
    for client, metrics in found.items():
        x, y = (leaf[data.rows[client]] for leaf in data.whole.storage.leaves)
        logits = module.net(x).tolist()
        losses = [math.log(sum(map(math.exp, z))) - z[t] for z, t in zip(logits, y.tolist(), strict=True)]
        right = [max(range(3), key=z.__getitem__) == t for z, t in zip(logits, y.tolist(), strict=True)]
        assert metrics["val/loss"] == pytest.approx(sum(losses) / len(y), rel=1e-13)
        assert metrics["val/accuracy"] == (torch.tensor(sum(right)) / len(y)).item()  # float32, as it is logged
    alone = {c: {n: float(v) for n, v in one._on_client(c, None).items()} for c in range(len(SIZES))}
    everyone = one.client_metrics(range(data.num_clients))
    assert list(everyone) == list(alone)
    for client, metrics in alone.items():
        assert list(everyone[client]) == list(metrics)
        assert everyone[client] == pytest.approx(metrics, rel=1e-13)
        assert everyone[client]["val/accuracy"] == metrics["val/accuracy"]


class Weighted(Net):
    def loss(self, z, y):
        return F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 3.0], dtype=z.dtype))


class OfClasses(Net):
    """The mean of the classes' means: with one class it is the mean over samples."""

    def loss(self, z, y):
        each, hot = F.cross_entropy(z, y, reduction="none"), F.one_hot(y, 3).to(z.dtype)
        return ((each @ hot) / hot.sum(0).clamp(min=1)).sum() / (hot.sum(0) > 0).sum()


class Spread(Net):
    def loss(self, z, y):
        return z.std(unbiased=False)


class Largest(Net):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val/largest", batch[0].amax(), reduce_fx="max")


class Metrics(Net):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()

    def validation_step(self, batch, batch_idx):
        self.mean(self.net(batch[0]).mean())
        self.log("val/mean", self.mean)


class Branches(Net):
    def loss(self, z, y):
        loss = super().loss(z, y)
        return loss * 2 if loss > 1 else loss


class ReadsTheIndex(Net):
    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            super().validation_step(batch, batch_idx)


class MultipliesByTheIndex(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(self.net(batch[0]), batch[1]) + 0.1 * batch_idx)


class OwnWeight(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(self.net(batch[0]), batch[1]), batch_size=7)


class OwnHook(Net):
    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        self.log("val/size", float(len(batch[0])))


class Draws(Net):
    def loss(self, z, y):
        return super().loss(F.dropout(z, training=True), y)


class Counts(Net):
    calls = 0

    def validation_step(self, batch, batch_idx):
        self.calls += 1
        self.log("val/calls", float(self.calls))


SEEN = []


def hooked():
    module = Net()
    module.net[-1].register_forward_hook(lambda m, args, out: SEEN.append(len(out)))
    return module


CASES = [
    Weighted,
    OfClasses,
    Spread,
    Largest,
    Metrics,
    Branches,
    ReadsTheIndex,
    MultipliesByTheIndex,
    OwnWeight,
    OwnHook,
    Draws,
    Counts,
    hooked,
]


@pytest.mark.parametrize("make", CASES)
def test_what_is_no_mean_over_samples_is_evaluated_client_by_client(make):
    module, data = make().double(), Data()
    one = evaluator(module, data)
    assert one._together(range(data.num_clients)) == {}
    assert SEEN == []
    torch.manual_seed(3)
    found = one.client_metrics(range(2, 4))
    torch.manual_seed(3)
    one._on_client(2, None)  # as client_metrics does in the first round, to see whether anything is logged
    alone = {c: {n: float(v) for n, v in one._on_client(c, None).items()} for c in (2, 3)}
    SEEN.clear()
    assert found == alone


@pytest.mark.parametrize(("precision", "evaluated"), [("32-true", 6), ("bf16-mixed", 0), ("bf16-true", 0)])
def test_in_half_precision_each_client_is_evaluated_by_itself(precision, evaluated):
    class Zeros(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val/zeros", (batch[1] == 0).float().mean())

    assert len(evaluator(Zeros(), Data(), precision)._together(range(len(SIZES)))) == evaluated


def test_ignored_labels_are_not_samples():
    module, data = Net().double(), Data(ignored=True)
    assert evaluator(module, data)._together(range(data.num_clients)) == {}


def test_float32_has_the_loss_to_its_rounding_and_the_same_accuracy():
    module, data = Net(), Data(dtype=torch.float32)
    one = evaluator(module, data)
    found = one._together(range(data.num_clients))
    assert len(found) == 6
    for client, metrics in found.items():
        alone = one._on_client(client, None)
        assert metrics["val/accuracy"] == float(alone["val/accuracy"])
        assert metrics["val/loss"] == pytest.approx(float(alone["val/loss"]), rel=1e-6)


def test_who_is_evaluated_where_changes_no_bit():
    """Two processes share the passes, so each client's numbers are of the same one."""
    data = Data(dtype=torch.float32)
    data.eval_batch_size = 12
    expected = evaluator(Net(), data)._together(range(data.num_clients))
    parts = []
    for rank in (0, 1):
        one = evaluator(Net(), data)
        one._share = lambda items, rank=rank: items[rank::2]
        parts.append(one._together(range(data.num_clients)))
    assert all(parts)
    assert {**parts[0], **parts[1]} == expected
