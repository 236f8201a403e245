"""The classifier by itself and in a plain Lightning Trainer."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from fedlight.data import DatasetPartition
from fedlight.models import MLP, CifarCNN, Classifier
from tests.helpers.tiny import quiet_trainer, seeded


def plain_trainer(tmp_path, **kwargs) -> Trainer:
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**options, **kwargs})


def identity_classifier(classes: int = 3, **kwargs) -> Classifier:
    """Its logits are its inputs, scaled by a parameter that is 1."""
    net = nn.Linear(classes, classes, bias=False)
    nn.init.eye_(net.weight)
    return Classifier(net, num_classes=classes, **kwargs)


def mute(model: Classifier) -> Classifier:
    model.log = lambda *args, **kwargs: None
    return model


def half(optimizer):
    return ExponentialLR(optimizer, gamma=0.5)


def test_training_step_returns_the_cross_entropy():
    x = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss = mute(identity_classifier()).training_step((x, torch.tensor([0, 2])), 0)
    # softmax(log 2, 0, 0) = (1/2, 1/4, 1/4) and softmax(0, 0, 0) = (1/3, 1/3, 1/3)
    torch.testing.assert_close(loss, torch.tensor((math.log(2) + math.log(3)) / 2))
    assert loss.requires_grad


def test_label_smoothing_mixes_in_the_uniform_distribution():
    x, y = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([0])
    loss = mute(identity_classifier(2, label_smoothing=0.2)).training_step((x, y), 0)
    torch.testing.assert_close(loss, torch.tensor(-0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4)))


def test_training_step_never_reads_a_value_back():
    # A meta tensor has no values: whatever would wait for a device fails on it.
    model = mute(Classifier(CifarCNN, num_classes=10)).to("meta")
    batch = torch.empty(4, 3, 32, 32, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    model.training_step(batch, 0).backward()


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_are_means_over_samples(tmp_path, stage):
    x = 5 * torch.eye(3)[[0, 1, 2, 0]]
    data = DataLoader(TensorDataset(x, torch.tensor([0, 1, 2, 1])), batch_size=3)
    trainer = plain_trainer(tmp_path)
    run = trainer.validate if stage == "val" else trainer.test
    # Smoothing is for training only.
    [found] = run(identity_classifier(label_smoothing=0.5), data, verbose=False)
    right = -math.log(math.exp(5) / (math.exp(5) + 2))
    assert set(found) == {f"{stage}/accuracy", f"{stage}/loss"}
    assert found[f"{stage}/accuracy"] == pytest.approx(3 / 4)  # the mean of the two batches would be 1/2
    assert found[f"{stage}/loss"] == pytest.approx((3 * right + right + 5) / 4, rel=1e-6)


def test_plain_trainer_learns(tmp_path):
    torch.manual_seed(0)
    centers = 3 * torch.randn(4, 5)
    y = torch.arange(64) % 4
    data = DataLoader(TensorDataset(centers[y] + 0.1 * torch.randn(64, 5), y), batch_size=16)
    trainer = plain_trainer(tmp_path, max_epochs=5, log_every_n_steps=1)
    trainer.fit(Classifier(MLP(in_features=5, num_classes=4), num_classes=4), data, data)
    assert trainer.callback_metrics["val/accuracy"] > 0.95
    assert trainer.callback_metrics["train/loss"] < 0.5


def test_net_is_a_module_or_a_class():
    net = CifarCNN(num_classes=7)
    assert Classifier(net, num_classes=7).net is net
    assert Classifier(CifarCNN, num_classes=7)(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_what_makes_no_optimizer_and_a_dict_as_batch_are_refused_by_name():
    with pytest.raises(TypeError, match=r"`model.optimizer` must be a function that makes one.*got SGD"):
        Classifier(MLP(4, 2), 2, SGD([torch.zeros(1)], lr=0.1))
    with pytest.raises(TypeError, match=r"batches of \(inputs, labels\), found a dict of image, label: give"):
        Classifier(MLP(4, 2), 2).training_step({"image": torch.zeros(1, 4), "label": torch.zeros(1)}, 0)


def test_number_of_classes_and_logits_must_agree():
    pair = Classifier(nn.LSTM(3, 10), num_classes=10)  # as models of other libraries, whose outputs are objects
    with pytest.raises(MisconfigurationException, match=r"`model.net`: LSTM returned a tuple, but"):
        pair(torch.zeros(1, 3))
    with pytest.raises(MisconfigurationException, match=r"\[1, 7\].*model\.num_classes: 10"):
        Classifier(CifarCNN(num_classes=7), num_classes=10)(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("kwargs", "key"),
    [
        ({"num_classes": 1}, "model.num_classes"),
        ({"num_classes": 3, "label_smoothing": 1.0}, "model.label_smoothing"),
        ({"num_classes": 3, "label_smoothing": float("nan")}, "model.label_smoothing"),
        ({"num_classes": 3, "lr_interval": "batch"}, "model.lr_interval"),
    ],
)
def test_arguments_out_of_range_are_named(kwargs, key):
    with pytest.raises(ValueError, match=key):
        Classifier(nn.Linear(3, 3), **kwargs)


def test_an_interval_without_a_scheduler_is_said(caplog):
    identity_classifier(lr_interval="step")
    assert "model.lr_interval=step changes nothing, as model.lr_scheduler is null." in caplog.text


def test_predict_gives_classes_with_or_without_labels():
    model, x = identity_classifier(), torch.eye(3)[[2, 0]]
    assert model.predict_step(x, 0).tolist() == [2, 0]
    assert model.predict_step((x, torch.tensor([0, 0])), 0).tolist() == [2, 0]


def test_default_optimizer_is_plain_sgd():
    for build in (identity_classifier().optimizer, inspect.signature(Classifier).parameters["optimizer"].default):
        optimizer = build([nn.Parameter(torch.zeros(1))])
        assert type(optimizer) is SGD
        assert optimizer.defaults == SGD([nn.Parameter(torch.zeros(1))], lr=0.1).defaults
    assert isinstance(identity_classifier().configure_optimizers(), SGD)


def test_optimizer_is_built_anew_each_time():
    model = identity_classifier(optimizer=lambda params: AdamW(params, lr=0.01))
    first, second = model.configure_optimizers(), model.configure_optimizers()
    assert isinstance(first, AdamW)
    assert first is not second
    assert first.param_groups[0]["params"] == list(model.parameters())


@pytest.mark.parametrize("interval", ["round", "epoch", "step"])
def test_schedule_outside_a_plain_trainer_keeps_its_interval(interval):
    found = identity_classifier(lr_scheduler=half, lr_interval=interval).configure_optimizers()
    assert isinstance(found["lr_scheduler"]["scheduler"], ExponentialLR)
    assert found["lr_scheduler"]["scheduler"].optimizer is found["optimizer"]
    assert found["lr_scheduler"]["interval"] == interval


@pytest.mark.parametrize(("interval", "lr"), [("round", 0.1 / 4), ("epoch", 0.1 / 4), ("step", 0.1 / 64)])
def test_schedule_in_a_plain_trainer(tmp_path, interval, lr):
    data = DataLoader(TensorDataset(torch.eye(3), torch.arange(3)), batch_size=1)
    model = identity_classifier(lr_scheduler=half, lr_interval=interval)
    trainer = plain_trainer(tmp_path, max_epochs=2, log_every_n_steps=1)
    trainer.fit(model, data, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(lr)


def test_plateau_schedule_monitors_what_it_names(tmp_path):
    data = DataLoader(TensorDataset(torch.eye(3), torch.arange(3)), batch_size=3)
    model = identity_classifier(lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/accuracy", mode="max"))
    trainer = plain_trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    trainer.fit(model, data, data)
    assert trainer.lr_scheduler_configs[0].monitor == "val/accuracy"


def test_copies_and_pickles_train_alike():
    model = mute(identity_classifier(lr_scheduler=half))
    del model.__dict__["log"]
    batch = torch.eye(3), torch.arange(3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = mute(twin).configure_optimizers()["optimizer"]
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert torch.equal(twin.training_step(batch, 0), mute(copy.deepcopy(model)).training_step(batch, 0))
        twin.net.weight.data.zero_()
        assert model.net.weight.any()


def test_checkpoint_of_a_python_run_is_plain_and_loads(tmp_path):
    data = DataLoader(TensorDataset(torch.eye(3), torch.arange(3)), batch_size=3)
    model = identity_classifier(label_smoothing=0.1)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="final")
    plain_trainer(tmp_path, max_epochs=1, log_every_n_steps=1, enable_checkpointing=True, callbacks=[checkpoint]).fit(
        model, data, data
    )
    loaded = Classifier.load_from_checkpoint(
        tmp_path / "final.ckpt", weights_only=True, net=nn.Linear(3, 3, bias=False)
    )
    assert dict(loaded.hparams) == {"num_classes": 3, "lr_interval": "round", "label_smoothing": 0.1}
    assert torch.equal(loaded.net.weight, model.net.weight)


def test_accuracy_is_that_of_samples_with_a_class_and_of_the_likeliest_class():
    """Label -100 is no class, as in the loss; of labels that are probabilities the largest counts."""
    model, x = identity_classifier(), seeded(4, 3)
    with torch.no_grad():
        labels = model(x).argmax(1)
        logged = {}
        model.log_dict = lambda values, batch_size, **_: logged.update(values, n=batch_size)
        model.validation_step((x, labels), 0)
        assert logged == {"val/loss": F.cross_entropy(model(x), labels), "val/accuracy": 1.0, "n": 4}
        model.validation_step((x, F.one_hot(labels, 3).float()), 0)
        assert (logged["val/accuracy"], logged["n"]) == (1.0, 4)
        with pytest.raises(RuntimeError, match="Long"):  # torch's, of labels that are neither
            model.validation_step((x, labels.float()), 0)
        labels[:2] = torch.tensor([-100, (labels[1] + 1) % 3])
        model.validation_step((x, labels), 0)
        assert logged == {"val/loss": F.cross_entropy(model(x), labels), "val/accuracy": torch.tensor(2 / 3), "n": 3}
        model.validation_step((x, torch.full((4,), -100)), 0)
        assert logged == {"val/loss": 0.0, "val/accuracy": 0.0, "n": 0}


def test_evaluation_weighs_batches_by_their_samples_with_a_class(tmp_path):
    x, labels = seeded(10, 3), torch.tensor([-100, -100, -100, 1, 0, 2, 1, 0, 2, 1])
    data = DatasetPartition(TensorDataset(x, labels), test=TensorDataset(x, labels), num_clients=2, eval_batch_size=4)
    model = identity_classifier()
    found = quiet_trainer(tmp_path, max_rounds=0).test(model, data, verbose=False)[0]["test/loss"]
    with torch.no_grad():
        assert found == pytest.approx(float(F.cross_entropy(model(x), labels)), rel=1e-6)
