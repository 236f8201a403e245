"""The picture and the table of a run's partition."""

import csv
import time

import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from fedlight.callbacks import pictures
from fedlight.data import DatasetPartition, ImageData
from fedlight.models import MLP, Classifier
from fedlight.trainer import FederatedTrainer


def fit(data, root, **settings):
    torch.manual_seed(0)
    model = Classifier(MLP(64, 10, []), num_classes=10)
    quiet = {"enable_progress_bar": False, "accelerator": "cpu", "devices": 1, "views": ("server",)}
    trainer = FederatedTrainer(**{"max_rounds": 1, **settings}, clients_per_round=2, default_root_dir=root, **quiet)
    trainer.fit(model, data)
    return trainer


def test_every_run_has_a_picture_and_a_table(tmp_path):
    data = ImageData("digits", num_clients=4, limit_samples=120)
    folder = fit(data, tmp_path).run_dir
    with Image.open(folder / "plots" / "partition.png") as picture:
        assert min(picture.size) > 100
    rows = list(csv.reader((folder / "partition.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["client", "0", "1", "2", "3", "total"]
    assert [int(row[1]) for row in rows[1:-1]] == [data.client_size(client) for client in range(4)]
    assert torch.equal(torch.tensor([[int(n) for n in row[3:]] for row in rows[1:-1]]), data.partition_counts())


def test_a_run_that_writes_nothing_draws_nothing(tmp_path):
    fit(ImageData("digits", num_clients=4, limit_samples=120), tmp_path, fast_dev_run=True)
    assert not list(tmp_path.rglob("partition*"))


class Unlabelled(DatasetPartition):
    def partition_counts(self):
        return None


def test_unknown_labels_leave_it_out(tmp_path):
    images = torch.rand(40, 64)
    data = Unlabelled(torch.utils.data.TensorDataset(images, torch.arange(40) % 10), num_clients=4)
    folder = fit(data, tmp_path).run_dir
    assert not (folder / "partition.csv").exists()
    assert (folder / "metrics.csv").exists()


def test_it_is_drawn_after_the_first_checkpoint(tmp_path, monkeypatch):
    """A run that is killed while it is drawn has lost nothing."""
    found = []

    def draw(counts, path, names):
        end = time.monotonic() + 20  # a thread writes it, if it is not the last one
        while not (path.parents[1] / "checkpoints" / "last.ckpt").exists() and time.monotonic() < end:
            time.sleep(0.01)
        found.extend(p.name for p in path.parents[1].rglob("*.ckpt"))

    monkeypatch.setattr(pictures, "save_partition_picture", draw)
    for rounds in (1, 3):
        fit(ImageData("digits", num_clients=4, limit_samples=120), tmp_path, max_rounds=rounds)
        assert "last.ckpt" in found
        found.clear()


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tmp_path, monkeypatch):
    tried = []

    def fail(counts, path, names):
        tried.append(path.write_bytes(b"torn"))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "save_partition_picture", fail)
    with pytest.warns(
        UserWarning, match="PartitionPicture failed, and the run goes on without it: OSError.*space"
    ) as said:
        folder = fit(ImageData("digits", num_clients=4, limit_samples=120), tmp_path, max_rounds=3).run_dir
    assert (len(said), len(tried)) == (1, 3)  # a torn one is drawn anew
    assert (folder / "summary.json").exists()


class Draws(Callback):
    optional_hooks = ("on_round_end",)

    def on_round_end(self, trainer, pl_module):
        raise RuntimeError("no display")


class Counts(Draws):
    optional_hooks = ()


def test_only_what_a_callback_calls_optional_may_fail(tmp_path):
    data = ImageData("digits", num_clients=4, limit_samples=120)
    with pytest.warns(UserWarning, match="Draws failed, and the run goes on without it: RuntimeError: no display"):
        fit(data, tmp_path, callbacks=[Draws()])
    with pytest.raises(RuntimeError, match="no display"):
        fit(data, tmp_path, callbacks=[Counts()])
