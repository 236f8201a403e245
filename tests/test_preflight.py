"""What does not fit together is found before the first round, and the trial leaves no trace."""

import copy
import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric

from fedlight import algorithms
from fedlight.algorithms.fedbn import FedBN
from fedlight.algorithms.scaffold import SCAFFOLD
from fedlight.data import DatasetPartition, DirichletClients
from fedlight.data.arrays import ArrayDataset
from fedlight.data.datamodule import class_counts
from fedlight.data.dataset_partition import find_targets
from fedlight.data.federated import draw_clients
from fedlight.models import MLP, Classifier
from fedlight.personal import PersonalParts
from fedlight.run import labels
from fedlight.server.sampling import WeightedBySamples
from tests.helpers.tiny import Clients, Regression, Samples, quiet_trainer, seeded, weights


class Labelled(Clients):
    """Clients with three classes of which the table is known."""

    def dataset(self, x, y):
        return super().dataset(x, y.argsort() % 3)

    def partition_counts(self):
        return torch.tensor([[2, 2, 1], [4, 4, 4], [3, 3, 2], [1, 1, 1]])


class Counted(Labelled):
    """The table is an array."""

    def partition_counts(self):
        return super().partition_counts().numpy()


def refused(tmp_path, message, model=None, data=None, **settings):
    model = Regression() if model is None else model
    before = weights(model)
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, **settings).fit(model, Clients() if data is None else data)
    assert torch.equal(weights(model), before)
    assert not list(tmp_path.glob("default/*"))


def test_a_table_of_the_partition_may_be_an_array(tmp_path):
    """Also of clients that are held out, and pooled: it ended in errors of Python's."""
    for number, settings in enumerate(({}, {"centralized": True})):
        data = Counted(held_out_clients=1)
        trainer = quiet_trainer(tmp_path / str(number), max_rounds=1, views=("server",), **settings)
        trainer.fit(Regression(), data)
        counts = class_counts(trainer.datamodule)
        assert counts.sum() == 28 - data.partition_counts()[list(draw_clients(data)[1])].sum()
    wrong = Counted()
    wrong.partition_counts = lambda: [[1, 2, 3]] * 3
    refused(tmp_path, r"data: Counted.partition_counts\(\) has the shape \[3, 3\]; it must be \[4 clients,", data=wrong)


def test_shapes_that_do_not_fit(tmp_path):
    message = (
        r"model and data do not fit: Regression.training_step failed on a batch of \(float32 \(4, 3\), float32 \(4,"
    )
    refused(tmp_path, message, Regression(net=nn.Linear(5, 1)))


class LossInTraining(Regression):
    """As the detectors of torchvision."""

    def training_step(self, batch, batch_idx):
        assert self.training, "no loss"
        return super().training_step(batch, batch_idx)


def test_a_loss_that_nothing_can_be_trained_by_is_found(tmp_path):
    class Detached(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).detach()

    class OneLogit(Regression):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), (batch[1] > 0).float()[:, None])

    refused(tmp_path, "the loss of Detached.training_step leads to no parameter", Detached())
    with pytest.warns(UserWarning, match="the gradient of OneLogit.training_step is 0 in every entry"):
        quiet_trainer(tmp_path, max_rounds=1).fit(model := OneLogit(), Clients())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z, y: nn.CrossEntropyLoss()(z.softmax(1), y), "gives cross_entropy probabilities, as of a softmax"),
        (lambda z, y: cross_entropy(z.softmax(1), y), "gives cross_entropy probabilities, as of a softmax"),
        (lambda z, y: cross_entropy(z.sigmoid(), y), "gives cross_entropy what a sigmoid puts out"),
        (lambda z, y: F.nll_loss(z, y), "gives nll_loss no logarithms of probabilities"),
        (lambda z, y: nn.BCEWithLogitsLoss()(z.sigmoid()[:, :1].squeeze(1), y.float()), "with_logits what a sigmoid"),
        (lambda z, y: cross_entropy(z, y), None),
        (lambda z, y: cross_entropy(z[:, 0].sigmoid().exp()[:, None] * z, y), None),
        (lambda z, y: F.nll_loss(z.log_softmax(1), y), None),
        (lambda z, y: nn.BCEWithLogitsLoss()(z[:, 0], y.float()), None),
    ],
)
def test_a_loss_that_gets_what_it_does_not_take_is_said(tmp_path, loss, message, recwarn):
    class Losses(Regression):
        def training_step(self, batch, batch_idx):
            return loss(self.net(batch[0]) * torch.tensor([1.0, -1.0]), (batch[1] > 0).long())

    quiet_trainer(tmp_path, max_rounds=1).fit(Losses(), Clients())
    said = [str(warning.message) for warning in recwarn]
    assert [message in text for text in said] == [True] * (message is not None)


def test_a_loss_that_gets_no_tensor_is_an_error_of_torch(tmp_path):
    class NoTensor(Regression):
        def training_step(self, batch, batch_idx):
            return cross_entropy([self.net(batch[0])], (batch[1] > 0).long())

    refused(tmp_path, "TypeError: cross_entropy_loss.*must be Tensor, not list", NoTensor())


def test_a_batch_is_tried_in_the_mode_of_training(tmp_path):
    quiet_trainer(tmp_path, max_rounds=1).fit(LossInTraining().eval(), Clients())
    broken = LossInTraining()
    broken.training_step = lambda batch, batch_idx: torch._assert(False, "no boxes")
    refused(tmp_path / "broken", "LossInTraining.training_step failed on a batch of .*AssertionError: no boxes", broken)


def test_batches_that_the_module_does_not_expect(tmp_path):
    class OfDictionaries(Regression):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self(batch["x"]), batch["y"])

    refused(tmp_path, "OfDictionaries.training_step failed on a batch of .*TypeError", OfDictionaries())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: None, "it returned NoneType"),
        (lambda loss: torch.stack([loss, loss]), r"it returned Tensor float32 \(2,\)"),
        (lambda loss: {"error": loss}, "must return a scalar loss or a dictionary"),
        (lambda loss: 3.0, "it returned float"),
    ],
)
def test_a_step_must_return_a_loss(tmp_path, returned, message):
    class Odd(Regression):
        def training_step(self, batch, batch_idx):
            return returned(super().training_step(batch, batch_idx))

    refused(tmp_path, message, Odd())


def test_more_classes_in_the_data_than_in_the_model(tmp_path):
    model = Classifier(MLP(3, 2), num_classes=2)
    data = Labelled()
    refused(
        tmp_path, r"model.num_classes=2 is too small: the data has label 2. Set model.num_classes to 3", model, data
    )


class Classes(Clients):
    """Every client has a dataset of its own, and the last one a label of its own."""

    def __init__(self, last=2, dataset=torch.utils.data.TensorDataset):
        self.last, self.kind, self.made = last, dataset, 0
        super().__init__()

    def dataset(self, x, y):
        self.made += 1
        labels = torch.arange(len(x)) % 3
        labels[-1] = self.last if self.made == 4 else labels[-1]
        return self.kind(x, labels)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x)


class OfNoNumber(Regression):
    """Says nowhere how many classes it has."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1].long())

    def validation_step(self, batch, batch_idx): ...

    test_step = validation_step


@pytest.mark.parametrize("label", [3, 250, -1])
@pytest.mark.parametrize("dataset", [torch.utils.data.TensorDataset, ArrayDataset])
def test_a_label_of_any_client_is_tried_before_training(tmp_path, label, dataset):
    message = f"failed on a batch of .* client 3's samples from 2 on: IndexError: Target {label} is out of bounds"
    refused(tmp_path, message, OfNoNumber(net=Plain()), Classes(label, dataset))


def test_labels_of_data_that_clients_share_are_read_until_their_ends_are_found(monkeypatch):
    class Shared(Clients):
        """Clients with two rows each of one storage."""

        num_clients = 70

        def client_dataset(self, client):
            return rows.view(torch.tensor([2 * client % 14, 2 * client % 14 + 1]), None)

    rows, read = ArrayDataset(seeded(14, 3), torch.tensor([0, 1, 2] * 4 + [0, 7])), []
    monkeypatch.setattr(labels, "find_targets", lambda data: read.append(len(data)) or find_targets(data))
    data = Shared()
    data.num_clients = 70
    assert labels.extreme_labels(data) == [(0, 0, 0), (7, 6, 1)]
    assert read == [14, *[2] * 7]  # the other 63 clients have no other rows


def test_labels_of_a_partition_are_tried_too(tmp_path):
    labels = torch.arange(40) % 3
    labels[17] = 5
    data = torch.utils.data.TensorDataset(seeded(40, 3), labels)
    refused(tmp_path, "IndexError: Target 5 is", OfNoNumber(net=Plain()), DatasetPartition(data, num_clients=4))
    labels[17] = -1
    refused(tmp_path, "IndexError: Target -1 is", OfNoNumber(net=Plain()), DatasetPartition(data, num_clients=4))


@pytest.mark.parametrize(("label", "said"), [(-100, "-100, below 0"), (10**12, "10{12}, and there are 4 labels")])
def test_labels_that_number_no_classes_are_counted_by_nobody(tmp_path, caplog, label, said):
    labels = torch.arange(40) % 3
    labels[17] = label
    data = torch.utils.data.TensorDataset(seeded(40, 3), labels)
    with pytest.raises(ValueError, match=f"sample 17 has label {said}: DirichletClients needs classes 0, 1, "):
        DatasetPartition(data, num_clients=4, partitioner=DirichletClients(1.0)).setup()
    parts = DatasetPartition(data, val=data, num_clients=4)
    parts.setup()
    assert parts.partition_counts() is parts.client_val_dataset(0) is parts.num_classes is None
    assert re.search(f"sample 17 has label {said}: they number no classes", caplog.text)


@pytest.mark.parametrize(("label", "kind"), [(3, "val"), (-1, "val"), (-1, "test")])
def test_a_label_of_held_out_data_that_the_model_does_not_have_is_found_before_training(tmp_path, caplog, label, kind):
    x, labels = seeded(40, 3), torch.arange(40) % 3
    train, odd = TensorDataset(x, labels), TensorDataset(x, labels.where(torch.arange(40) != 9, label))
    labels[:7] = -100  # which is no class
    data = DatasetPartition(train, num_clients=4, **{"val": train, "test": train, kind: odd})
    what = rf"data: the {kind}\w* data has label {label} \(row 9\), those of clients 0 to 2"
    model = Classifier(MLP(3, 3), num_classes=3)
    if kind == "test":
        quiet_trainer(tmp_path, max_rounds=1).fit(model, data)
        assert re.search(f"{what}; model.num_classes=3, so it cannot be tested", caplog.text)
        return
    refused(tmp_path, f"{what}; model.num_classes=3", model, data)

    class Model(OfNoNumber):
        def on_validation_epoch_start(self):
            self.seen = []

        def validation_step(self, batch, batch_idx):
            self.seen.append(self.training_step(batch, batch_idx))

    refused(tmp_path, f"{what}; validation_step: Target {label} is out of bounds", Model(net=Plain()), data)
    quiet_trainer(tmp_path, max_rounds=1, limit_val_batches=0).fit(Model(net=Plain()), data)


def test_normalisation_without_statistics_is_tried_on_a_sample_alone_in_evaluation(tmp_path):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 1))
    message = "cannot evaluate a batch of one sample .* Set data.eval_batch_size, which is {}, "
    refused(tmp_path, message.format(3), Regression(net=net), Clients((4, 8), eval_batch_size=3))  # 10 to evaluate on
    trainer = quiet_trainer(tmp_path, max_rounds=1, clients_per_round=1)
    trainer.fit(Regression(net=net), Clients((4, 8), eval_batch_size=5))
    with pytest.raises(MisconfigurationException, match=message.format(9)):
        trainer.test(Regression(net=net), Clients((4, 8), eval_batch_size=9))


def test_samples_that_make_no_batch(tmp_path):
    ragged = [(torch.zeros(3 + i % 2), 0.0) for i in range(8)]
    said = "data: client 0's samples 0 to 3 make no batch: RuntimeError: stack .* one shape, .*; or give a collate_fn"
    refused(tmp_path, said, data=DatasetPartition(ragged, num_clients=2))


def test_samples_that_are_batches_come_alone(tmp_path):
    class Batches(Samples):
        def __getitem__(self, index):
            return seeded(2, 3, seed=index), seeded(2)

    def first(batch):
        return batch[0]

    batches = Batches(seeded(8), seeded(8))
    wrong = "collate_fn gives one of the samples that it gets, so that 31 of 32 are lost. .* set data.{}: 1"
    for sizes, key in (({}, "batch_size"), ({"batch_size": 1, "eval_batch_size": 32}, "eval_batch_size")):
        data = DatasetPartition(batches, val=batches, num_clients=2, collate_fn=first, **sizes)
        refused(tmp_path, wrong.format(key), data=data)
    right = DatasetPartition(batches, num_clients=2, collate_fn=first, batch_size=1)
    quiet_trainer(tmp_path, max_rounds=1).fit(Regression(), right)


def test_a_step_of_validation_is_tried(tmp_path):
    """It may come many rounds after the first."""
    train, val = (torch.utils.data.TensorDataset(seeded(8, n), seeded(8)) for n in (3, 5))
    data = DatasetPartition(train, val=val, num_clients=2)
    where = "Regression.validation_step failed on the first samples of DatasetPartition.val_dataset"
    refused(tmp_path, f"model and data do not fit: {where}: RuntimeError: .*shapes cannot be multiplied", data=data)
    quiet_trainer(tmp_path, limit_val_batches=0).fit(Regression(), data)


def test_what_callbacks_bring_is_not_missed_before(tmp_path):
    class Brings(Callback):
        def on_validation_start(self, trainer, pl_module):
            pl_module.brought = torch.ones(())

    class Needs(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val/brought", self.brought)

    trainer = quiet_trainer(tmp_path, callbacks=[Brings()], client_val_every_n_rounds=0, views=["server"])
    trainer.fit(Needs(), Clients())
    assert trainer.callback_metrics["val/brought"] == 1
    refused(tmp_path / "without", "Needs.validation_step failed .* no attribute 'brought'", Needs())


class Asks(Regression):
    scale = None

    def training_step(self, batch, batch_idx):
        return self.scale * super().training_step(batch, batch_idx)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_batch_start"])
@pytest.mark.parametrize("frozen", [False, True])  # then steps are tried after the hooks of the start, too
def test_what_callbacks_bring_to_training_is_not_missed_before(tmp_path, hook, frozen):
    def brings(callback, trainer, pl_module, *args):
        pl_module.scale = torch.full((), 2.0)

    net = nn.Sequential(nn.Linear(3, 3).requires_grad_(not (frozen and "batch" not in hook)), nn.Linear(3, 1))
    expected, found = Asks(net=copy.deepcopy(net)), Asks(net=net)
    expected.scale = 2.0
    quiet_trainer(tmp_path).fit(expected, Clients())
    quiet_trainer(tmp_path, callbacks=type("Brings", (Callback,), {hook: brings})()).fit(found, Clients())
    assert torch.equal(weights(found), weights(expected))
    refused(tmp_path / "without", "Asks.training_step failed .*NoneType", Asks())


def test_a_tried_step_of_validation_leaves_no_trace(tmp_path):
    stages = []

    class Counts(Regression):
        def __init__(self):
            super().__init__()
            self.seen, self.mean = [], MeanMetric()

        def validation_step(self, batch, batch_idx):
            stages.append((self.trainer.sanity_checking, self.trainer.validating, self.trainer.training))
            self.seen.append(len(batch[0]))
            self.mean.update(batch[0].sum())
            self.log("val/mean", self.mean)

    trainer, module = quiet_trainer(tmp_path, max_rounds=1, views=["server"], client_val_every_n_rounds=0), Counts()
    data = Clients((4, 8), eval_batch_size=5)  # 10 to evaluate on
    trainer.fit(module, data)
    assert module.seen == [5, 5]
    assert stages == [(True, False, False), *[(False, True, False)] * 2]
    x = torch.stack([x.sum() for x in torch.stack([x for x, _ in data.val_dataset()]).split(5)])
    assert trainer.callback_metrics["val/mean"] == pytest.approx(float(x.mean()), rel=1e-6)


def test_an_error_of_an_evaluation_says_where_it_was(tmp_path):
    class Fails(Regression):
        def validation_step(self, batch, batch_idx):
            assert batch_idx == 0, "on purpose"

    with pytest.raises(AssertionError, match="on purpose") as caught:
        quiet_trainer(tmp_path).fit(Fails(), Clients((4, 8), eval_batch_size=5))
    assert "This happened in validation_step, batch 1 of an evaluation." in caught.value.__notes__


def test_where_labels_are_unknown_it_is_said_what_can_be_done(tmp_path):
    data = Classes(7, lambda x, y: list(zip(x.unbind(), y.unbind(), strict=True)))
    with pytest.raises(IndexError, match="Target 7 is out of bounds") as caught:
        quiet_trainer(tmp_path, clients_per_round=4).fit(OfNoNumber(net=Plain()), data)
    notes = " ".join(caught.value.__notes__)
    assert "This happened in round 1, client 3." in notes
    assert "checked before training where the dataset has `.targets`, or data.targets does" in notes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_arrays_is_found_wherever_it_is(tmp_path, value):
    x, y = seeded(50, 3), seeded(50)
    x[31, 1] = value
    data = DatasetPartition(torch.utils.data.TensorDataset(x, y), num_clients=4)
    refused(tmp_path, "data: 1 of 50 inputs hold NaN or infinity, the first in row 31. Remove or replace", data=data)
    x[31, 1], y[7] = 0, value
    data = DatasetPartition(torch.utils.data.TensorDataset(x, y), num_clients=4)
    refused(tmp_path, "data: 1 of 50 targets hold NaN or infinity, the first in row 7", data=data)


def test_nan_in_validation_data_is_found(tmp_path):
    train = torch.utils.data.TensorDataset(seeded(50, 3), seeded(50))
    test = torch.utils.data.TensorDataset(torch.full((4, 3), float("nan")), seeded(4))
    refused(tmp_path, "data: 4 of 4 inputs hold NaN", data=DatasetPartition(train, test, num_clients=4))


def test_nan_in_the_first_samples_of_any_dataset_is_found(tmp_path):
    data = Clients()
    data.datasets[0] = Samples(torch.full((5, 3), float("nan")), torch.zeros(5))
    refused(tmp_path, "data: the first samples of client 0 hold NaN or infinity", data=data)


class WithoutLR(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-0.1)


def test_an_algorithm_that_divides_by_the_learning_rate_needs_one(tmp_path):
    class Model(Regression):
        def configure_optimizers(self):
            return WithoutLR(self.parameters())

    refused(tmp_path, "algorithm: SCAFFOLD divides by the local learning rate", Model(), algorithm=SCAFFOLD())
    quiet_trainer(tmp_path).fit(Model(), Clients())
    refused(tmp_path / "zero", "found 0.0", Regression(lr=0.0), algorithm=SCAFFOLD())


def test_fedbn_without_batchnorm_warns(tmp_path):
    with pytest.warns(UserWarning, match="FedBN") as caught:
        quiet_trainer(tmp_path, algorithm=FedBN(), max_rounds=1).fit(Regression(), Clients())
    assert len([w for w in caught if "FedBN" in str(w.message)]) == 1


def test_every_client_empty(tmp_path):
    refused(tmp_path, "data: every client is empty", data=Clients(sizes=(0, 0)))


def test_a_module_without_parameters_or_with_lazy_or_mixed_ones(tmp_path):
    frozen = Regression()
    frozen.requires_grad_(False)
    refused(tmp_path, "model: the module has no trainable parameter", frozen)
    mixed = Regression(net=nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)))
    mixed.net[1].double()
    refused(
        tmp_path, "must share one data type, found net.0.weight is torch.float32, net.1.weight is torch.float64", mixed
    )
    lazy = Regression()
    lazy.net = nn.LazyLinear(1)
    with pytest.raises(MisconfigurationException, match="parameter 'net.weight' is lazy"):
        quiet_trainer(tmp_path).fit(lazy, Clients())


def test_the_trial_leaves_no_trace(tmp_path):
    """Buffers, metrics, random numbers and modes are as if no trial had been made."""

    class Curious(Regression):
        def __init__(self):
            super().__init__(net=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Dropout(0.5)))
            self.seen = MeanMetric()
            self.register_buffer("calls", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.calls += 1
            self.seen(1.0 if self.trainer.training and self.net.training else 5.0)
            return super().training_step(batch, batch_idx)

        def on_fit_start(self):
            assert self.calls == 0
            assert self.seen.update_count == 0
            assert self.net.training

    model = Curious()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    quiet_trainer(tmp_path, max_rounds=0).fit(model, Clients(sizes=(6, 4)))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(model.net[0].running_mean, torch.zeros(3))


def test_a_step_may_take_gradients_itself(tmp_path):
    """A gradient penalty: the gradient of w·x + b with respect to x is w."""

    class Penalized(Regression):
        def training_step(self, batch, batch_idx):
            x = batch[0].requires_grad_()
            (gradient,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
            return gradient.square().sum(1).mean()

    model = Penalized()
    expected = model.net.weight.detach() * (1 - 0.1 * 2) ** 2
    quiet_trainer(tmp_path, max_rounds=1, local_steps=2).fit(model, Clients())
    assert torch.allclose(model.net.weight, expected)


ESTIMATING = ("SCAFFOLD", "FedDC", "FedGAMMA", "FedLESAM_S")


@pytest.mark.parametrize("name", ["FedAvg", "FedDyn", "FedSpeed", "FedSMOO", "FedLESAM_D", "FedCM", *ESTIMATING])
def test_very_unequal_clients_are_a_warning_where_an_estimate_is_divided_by_their_share(tmp_path, name):
    method = getattr(algorithms, name)

    def fit(algorithm, smallest):
        trainer = quiet_trainer(tmp_path, algorithm=algorithm, max_rounds=1, enable_checkpointing=False)
        trainer.fit(Regression(lr=0.001), Clients(sizes=(smallest, 41, 9, 0)))

    fit(method(), 5)  # 41 / 5 < 10; clients without samples do not count
    if name not in ESTIMATING:
        fit(method(), 4)
        return
    with pytest.warns(UserWarning, match=rf"algorithm: {name} divides .*have 4 to 41 samples.*algorithm\.weighting to"):
        fit(method(), 4)
    fit(method(weighting="equal"), 4)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("SCAFFOLD", {"momentum": 0.9}, " and momentum"),
        ("SCAFFOLD", {"lr": 0.1}, " and several learning rates"),
        ("SCAFFOLD", {}, None),
        ("FedAvg", {"momentum": 0.9, "lr": 0.1}, None),
    ],
)
def test_an_estimate_of_gradients_is_said_to_be_of_another_size(tmp_path, caplog, name, settings, said):
    """It is divided by the learning rates of the first group."""
    model = Regression()
    groups = [{"params": [model.net.weight]}, {"params": [model.net.bias], **settings}]
    model.configure_optimizers = lambda: torch.optim.SGD(groups, lr=0.01)
    quiet_trainer(tmp_path, algorithm=getattr(algorithms, name)(), max_rounds=0).fit(model, Clients())
    assert (f"That is so of plain SGD; with SGD{said} it has another size." in caplog.text) is (said is not None)


@pytest.mark.parametrize(("name", "said"), [("FedAvg", True), ("FedDyn", False)])
def test_samples_that_count_in_sampler_and_mean_are_said(tmp_path, caplog, name, said):
    settings = {"algorithm": getattr(algorithms, name)(), "sampler": WeightedBySamples(), "max_rounds": 0}
    quiet_trainer(tmp_path, **settings).fit(Regression(), Clients())
    assert (f"draws clients by their samples, by which {name} weighs their models again" in caplog.text) is said


@pytest.mark.parametrize("anew", [False, True])
def test_datasets_that_are_made_at_every_call_are_said(tmp_path, caplog, anew):
    class Makes(Clients):
        def client_dataset(self, client):
            return self.dataset() if anew else self.datasets[client]

        def dataset(self, *given):
            return Samples(seeded(4, 3), seeded(4))

    quiet_trainer(tmp_path, max_rounds=1).fit(Regression(), Makes())
    assert ("data: Makes.client_dataset makes a Samples at every call, in each round again" in caplog.text) == anew


def test_settings_that_change_nothing_are_said(tmp_path, caplog):
    idle = {"swa_start": 0.5, "swa_every_n_rounds": 2, "gradient_clip_algorithm": "value"}
    others = {"tf32": True, "buffers": "local", "channels_last": True, "client_val_every_n_rounds": 2}
    without = {"limit_val_batches": 0, "personal": PersonalParts(["net.bias"], epochs=2)}
    quiet_trainer(tmp_path, max_rounds=1, **idle, **others, **without).fit(Regression(), Clients())
    said = [f"trainer.{key}={value!r} changes nothing, as " for key, value in (idle | others).items()]
    said += ["trainer.personal.epochs=2 changes nothing, as no part alternates"]
    assert [text for text in said if text not in caplog.text] == []
    caplog.clear()
    quiet_trainer(tmp_path, algorithm=SCAFFOLD(), max_rounds=1, centralized=True).fit(Regression(), Clients())
    assert "trainer.centralized: algorithm, clients_per_round play no part, as there are no clients." in caplog.text
    caplog.clear()
    quiet_trainer(tmp_path, max_rounds=1, views=["server", "swa"], gradient_clip_val=1.0, **idle).fit(
        Regression(), Clients()
    )
    assert "changes nothing" not in caplog.text
