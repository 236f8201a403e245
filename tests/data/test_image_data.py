"""ImageData: from a source to client datasets."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from fedlight.data import (
    IID,
    ArrayDataset,
    DirichletClients,
    ImageData,
    NaturalGroups,
    QuantitySkew,
    Shards,
)
from fedlight.data.federated import PooledData
from fedlight.data.partitioned import Partition, match_proportions


def ready(**arguments):
    data = ImageData(**arguments)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def npz(tmp_path):
    """90 training images whose red channel is their row, 3 classes; 30 test images; 2 groups."""
    x_train, x_test = np.zeros((90, 8, 8, 3), np.uint8), np.zeros((30, 8, 8, 3), np.uint8)
    x_train[..., 0], x_test[..., 0] = np.arange(90)[:, None, None], 200 + np.arange(30)[:, None, None] % 50
    np.savez(
        tmp_path / "images.npz",
        x_train=x_train,
        y_train=np.arange(90) % 3,
        x_test=x_test,
        y_test=np.arange(30) % 3,
        group_train=np.arange(90) // 45,
        group_test=np.arange(30) // 15,
    )
    return str(tmp_path / "images.npz")


def test_what_changes_nothing_is_said(caplog):
    ready(crop_padding=3, test_fraction=0.5)
    assert "data.crop_padding=3 changes nothing, as data.augment is false." in caplog.text
    assert "data.test_fraction=0.5 changes nothing, as digits has a test set." in caplog.text


def test_the_default_works_offline():
    data = ready()
    assert data.num_clients == 20
    assert (data.num_classes, data.input_shape) == (10, (1, 8, 8))
    assert repr(data.partitioner) == "DirichletClients(alpha=0.3)"
    counts = data.partition_counts()
    assert counts.shape == (20, 10)
    assert counts.sum() == len(data.pooled_dataset()) == 1442
    for client in range(20):
        dataset = data.client_dataset(client)
        assert isinstance(dataset, ArrayDataset)
        assert len(dataset) == data.client_size(client) == counts[client].sum()
        _, y = dataset.batch(torch.arange(len(dataset)))
        assert torch.bincount(y, minlength=10).tolist() == counts[client].tolist()
    assert data.val_dataset() is data.test_dataset()
    assert data.client_dataset(0).draw(3, torch.Generator()) == {}  # digits are not augmented


def test_clients_share_one_storage_and_every_image_is_there_once(npz):
    data = ready(source=npz, num_clients=7, normalize="none", partitioner=QuantitySkew())
    rows = []
    for client in range(7):
        dataset = data.client_dataset(client)
        assert dataset.inputs.data_ptr() == data.client_dataset(0).inputs.data_ptr()
        x, _ = dataset.batch(torch.arange(len(dataset)))
        rows += (x[:, 0, 0, 0] * 255).round().int().tolist()
    assert sorted(rows) == list(range(90))


def test_setup_happens_once_and_depends_on_the_seed_only(npz):
    data, same, other = (ready(source=npz, num_clients=5, seed=seed) for seed in (1, 1, 2))
    before = data.client_dataset(0)
    data.setup("test")
    assert data.client_dataset(0).inputs.data_ptr() == before.inputs.data_ptr()
    assert torch.equal(data.partition.rows, same.partition.rows)
    assert not torch.equal(data.partition.rows, other.partition.rows)


def test_validation_images_are_held_out_of_the_training_images(npz):
    data = ready(source=npz, num_clients=4, val_fraction=0.2, normalize="none", partitioner=IID())
    assert (len(data.pooled_dataset()), len(data.val_dataset()), len(data.test_dataset())) == (72, 18, 30)
    train = {row for c in range(4) for row in data.client_dataset(c).indices.tolist()}
    val = set(data.val_dataset().indices.tolist())
    assert train | val == set(range(90))
    assert not train & val
    _, y = data.val_dataset().batch(torch.arange(18))
    assert torch.bincount(y).tolist() == [6, 6, 6]
    assert data.partition_counts().tolist() == [[6, 6, 6]] * 4
    owned = [data.client_val_dataset(c) for c in range(4)]
    assert sorted(row for d in owned for row in d.indices.tolist()) == sorted(val)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_a_validation_set_or_training_set_of_nothing(npz, fraction):
    with pytest.raises(ValueError, match=r"`data\.val_fraction` is 0\.\d+: of 90 training images"):
        ready(source=npz, val_fraction=fraction)


def test_evaluation_is_never_augmented_and_training_only_if_drawn(npz):
    data = ready(source=npz, num_clients=3, partitioner=IID())
    rng = torch.Generator().manual_seed(0)
    assert set(data.client_dataset(0).draw(2, rng)) == {"flip", "top", "left"}
    assert data.val_dataset().draw(2, rng) == {}
    assert data.client_val_dataset(0).draw(2, rng) == {}
    assert ready(source=npz, augment=False).client_dataset(0).draw(2, rng) == {}
    assert set(ready(augment=True, crop_padding=0).client_dataset(0).draw(2, rng)) == {"flip"}


@pytest.mark.parametrize("value", [None, [0.5, 0.5], ([0.5],), "cifar"])
def test_statistics_that_are_no_pair_are_refused(value):
    with pytest.raises(ValueError, match=r"`data\.normalize` is .*, but must be one of auto"):
        ImageData(normalize=value)


def test_normalisation(npz):
    auto = ready(source=npz, augment=False)
    x, _ = auto.pooled_dataset().batch(torch.arange(90))
    assert x[:, 0].mean().item() == pytest.approx(0, abs=1e-5)
    assert x[:, 0].std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert (
        auto.val_dataset().transform.mean == auto.pooled_dataset().transform.mean
    )  # statistics of the training images
    given = ready(source=npz, normalize=([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]))
    assert given.val_dataset()[0][0][:, 0, 0].tolist() == pytest.approx([(200 / 255 - 0.1) / 0.5, -0.4, -0.6])
    assert ready(source=npz, normalize="cifar100").val_dataset().transform.mean == (0.5071, 0.4867, 0.4408)
    plain, _ = ready(source=npz, normalize="none").val_dataset().batch(torch.arange(1))
    assert plain[0, 0, 0, 0].item() == pytest.approx(200 / 255)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalize": "imagnet"}, r"`data\.normalize` is 'imagnet', but must be one of auto, none, cifar10"),
        ({"normalize": "cifar10"}, r"`data\.normalize` is for 3 channels, but the images have 1"),
        ({"normalize": ([0.5], [0.0])}, r"`data\.normalize`"),
        ({"crop_padding": -1}, r"`data\.crop_padding` must be at least 0, got -1"),
        ({"crop_padding": 1.5}, r"`data\.crop_padding` must be a whole number, got 1.5"),
        ({"num_clients": 4.0}, r"`data\.num_clients` must be a whole number, got 4.0"),
        ({"val_fraction": 1.0}, r"`data\.val_fraction` must be a finite number at least 0 and below 1"),
        ({"num_clients": 0}, r"`data\.num_clients` must be at least 1"),
        ({"num_clients": 2000}, r"`data\.num_clients` is 2000, but it must be between 1 and .* 1442"),
        ({"num_clients": None}, r"`data\.num_clients` may be null only with"),
        ({"partitioner": NaturalGroups()}, r"NaturalGroups` needs groups"),
        ({"batch_size": 0}, r"`data\.batch_size` must be at least 1"),
        ({"eval_batch_size": -1}, r"`data\.eval_batch_size` must be at least 1"),
        ({"limit_samples": 0}, r"`data\.limit_samples` must be at least 1"),
        ({"crop_padding": -1, "augment": True}, r"`data\.crop_padding`"),
        ({"partitioner": Shards(1), "num_clients": 5}, r"`data\.partitioner\.classes_per_client`"),
    ],
)
def test_bad_settings_name_their_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        ready(**arguments)


def test_batches_of_an_evaluation_are_larger_on_a_gpu_unless_they_are_given(npz):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    data = ready(source=npz)  # 3x8x8
    assert data.eval_batch_size == data.eval_batch_size_on(cpu) == 500
    assert data.eval_batch_size_on(gpu) == PooledData(data).eval_batch_size_on(gpu) == 2**22 // math.prod((3, 8, 8))
    data.input_shape = (3, 32, 32)
    assert data.eval_batch_size_on(gpu) == 1365
    data.input_shape = (3, 224, 224)
    assert data.eval_batch_size_on(gpu) == 500
    assert ready(source=npz, eval_batch_size=7).eval_batch_size_on(gpu) == 7


def test_a_quick_trial_uses_a_part(npz):
    data = ready(source=npz, num_clients=4, limit_samples=20)
    assert (len(data.pooled_dataset()), len(data.test_dataset())) == (20, 20)
    assert data.num_classes == 3
    assert len(ready(limit_samples=10_000).pooled_dataset()) == 1442


def test_natural_groups_are_clients(npz):
    data = ready(source=npz, num_clients=None, partitioner=NaturalGroups())
    assert data.num_clients == 2
    assert set(data.client_dataset(0).indices.tolist()) == set(range(45))
    # The test set has the same groups, so a client is tested on its own group.
    assert set(data.client_val_dataset(1).indices.tolist()) == set(range(15, 30))


def test_client_validation_follows_the_clients_own_classes():
    data = ready(num_clients=5, partitioner=DirichletClients(0.1))
    counts, seen = data.partition_counts(), []
    for client in range(5):
        own = data.client_val_dataset(client)
        _, y = own.batch(torch.arange(len(own)))
        share = torch.bincount(y, minlength=10) / torch.bincount(data.test_dataset().targets)
        assert (share - counts[client] / counts.sum(0)).abs().max() < 1 / 30  # to the nearest of 35 images
        seen += own.indices.tolist()
    assert sorted(seen) == list(range(355))
    again = ready(num_clients=5, partitioner=DirichletClients(0.1))
    assert torch.equal(again.client_val_dataset(3).indices, data.client_val_dataset(3).indices)


def test_a_client_too_small_for_any_validation_image():
    data = ready(num_clients=1000, partitioner=IID())
    owned = [data.client_val_dataset(client) for client in range(1000)]
    assert any(d is None for d in owned)
    assert sum(len(d) for d in owned if d is not None) == 355


def test_match_proportions_leaves_out_what_nobody_has():
    counts = torch.tensor([[4, 0, 0], [2, 0, 6]])
    rows = match_proportions(counts, torch.tensor([0, 0, 0, 1, 2, 0, 0, 0]), torch.Generator().manual_seed(0))
    assert rows.sizes.tolist() == [4, 3]
    assert set(torch.cat([rows[0], rows[1]]).tolist()) == {0, 1, 2, 4, 5, 6, 7}
    assert 4 in rows[1].tolist()


def test_a_partition_is_compact_and_indexed():
    partition = Partition([torch.tensor([5, 1]), torch.tensor([0]), torch.tensor([2, 3, 4])])
    assert len(partition) == 3
    assert [partition[i].tolist() for i in range(3)] == [[5, 1], [0], [2, 3, 4]]
    assert partition.counts(torch.tensor([0, 0, 1, 1, 1, 2]), 3).tolist() == [[1, 0, 1], [1, 0, 0], [0, 3, 0]]
    for outside in (3, -1):
        with pytest.raises(IndexError, match="no client"):
            partition[outside]


def test_use_before_setup():
    with pytest.raises(RuntimeError, match="setup"):
        ImageData().client_size(0)


def test_survives_copy_and_pickle():
    data = ready()
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert torch.equal(twin.client_dataset(3).indices, data.client_dataset(3).indices)


def test_downloads_only_if_told(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("fedlight.data.image_data.download_source", lambda *where: asked.append(where))
    ImageData("mnist", root=str(tmp_path)).prepare_data()
    assert asked == []
    ImageData("mnist", root=str(tmp_path), download=True).prepare_data()
    assert asked == [("mnist", str(tmp_path))]


def test_the_papers_setting_on_real_cifar100(shared_data):
    data = ready(source=str(shared_data("cifar100")), num_clients=100, normalize="cifar100")
    counts = data.partition_counts()
    assert counts.shape == (100, 100)
    assert set(counts.sum(1).tolist()) == {500}
    assert (counts > 0).sum(1).double().mean() < 75  # 100 under IID
    dataset = data.client_dataset(7)
    x, y = dataset.batch(torch.arange(50), dataset.draw(50, torch.Generator().manual_seed(0)))
    assert (x.shape, x.dtype, y.dtype) == ((50, 3, 32, 32), torch.float32, torch.int64)
    plain, _ = data.pooled_dataset().batch(torch.arange(2000))
    assert plain.mean().abs() < 0.1
    assert plain.std().item() == pytest.approx(1, abs=0.1)
