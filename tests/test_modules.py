"""Modules and data of every kind: buffers, frozen and tied weights, precision, batches of any shape."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from fedlight.algorithms.fedavg import FedAvg
from fedlight.algorithms.moon import MOON
from fedlight.data import DatasetPartition
from fedlight.data.datamodule import FederatedDataModule
from fedlight.seeding import generator
from tests.helpers.half import scaled  # noqa: F401  (a fixture)
from tests.helpers.tiny import Clients, Keep, Regression, Samples, quiet_trainer, seeded, weights


def fit(tmp_path, model=None, data=None, **settings):
    model = Regression() if model is None else model
    trainer = quiet_trainer(tmp_path, **settings)
    trainer.fit(model, Clients(SIZES) if data is None else data)
    return model, trainer


SIZES = (6, 12, 8, 3)  # no batch of one sample, for BatchNorm


def normalised():
    return Regression(net=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("algorithm", [FedAvg(), MOON()])
def test_a_part_of_torchscript_trains_as_it_does_in_python(tmp_path, algorithm):
    """Its parameters and buffers lie in what is no dictionary of Python's."""
    found = []
    for i, scripted in enumerate((False, True)):
        model = normalised()
        if scripted:
            model.net[1] = torch.jit.script(model.net[1])
        fit(tmp_path / str(i), model, algorithm=algorithm, engine="eager", max_rounds=2)
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


# --- data ------------------------------------------------------------------------------------------------------------


class Dictionaries(Samples):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return {"inputs": {"x": x}, "y": y, "name": f"sample {index}"}


class OfDictionaries(Regression):
    def training_step(self, batch, batch_idx):
        assert batch["name"][0].startswith("sample")
        return super().training_step((batch["inputs"]["x"], batch["y"]), batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step((batch["inputs"]["x"], batch["y"]), batch_idx)


class OfOneTensor(Regression):
    def training_step(self, batch):
        return F.mse_loss(self(batch[:, :3]), batch[:, 3])

    def validation_step(self, batch):
        self.log("val/loss", F.mse_loss(self(batch[:, :3]), batch[:, 3]), batch_size=len(batch))


class OfAny(Regression):
    def training_step(self, *args):
        batch, batch_idx = args
        return super().training_step(batch, batch_idx)

    validation_step = lambda this, batch, **named: Regression.validation_step(this, batch, 0)  # noqa: E731


class OfOne(Regression):
    def training_step(this, batch, *, scale=1.0):
        return Regression.training_step(this, batch, 0) * scale


class OneTensor(Samples):
    def __getitem__(self, index):
        return torch.cat([self.x[index], self.y[index : index + 1]])


def of(dataset):
    class Of(Clients):
        def dataset(self, x, y):
            return dataset(x, y)

    return Of(SIZES)


@pytest.mark.parametrize(
    ("model", "dataset"),
    [
        (Regression, Samples),
        (OfDictionaries, Dictionaries),
        (OfOneTensor, OneTensor),
        (OfAny, Samples),
        (OfOne, Samples),
    ],
)
def test_any_dataset_and_batch_trains_to_the_same_weights(tmp_path, model, dataset):
    expected, reference = fit(tmp_path)
    found, trainer = fit(tmp_path, model(), of(dataset))
    assert torch.equal(weights(found), weights(expected))
    for name in ("train/loss", "val/loss", "val/loss_all"):
        assert torch.equal(trainer.callback_metrics[name], reference.callback_metrics[name])


def test_a_collate_function_makes_the_batches(tmp_path):
    def padded(samples):
        x = nn.utils.rnn.pad_sequence([x[: 1 + i % 3] for i, (x, _) in enumerate(samples)], batch_first=True)
        return F.pad(x, (0, 3 - x.shape[1])), torch.stack([y for _, y in samples])

    data = of(Samples)
    data.collate_fn = padded
    found, _ = fit(tmp_path, data=data)
    expected, _ = fit(tmp_path)
    assert not torch.equal(weights(found), weights(expected))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_worker_processes_read_the_same_batches(tmp_path):
    data = of(Samples)
    data.num_workers = 1
    found, _ = fit(tmp_path, data=data, max_rounds=1)
    expected, _ = fit(tmp_path, max_rounds=1)
    assert torch.equal(weights(found), weights(expected))


def test_a_datamodule_of_ones_own(tmp_path):
    class Own(FederatedDataModule):
        """Reads its data in setup, and has neither validation nor test data."""

        prepared = 0

        def prepare_data(self):
            self.prepared += 1

        def setup(self, stage=None):
            self.clients = [TensorDataset(seeded(6, 3, seed=i), seeded(6, seed=10 + i)) for i in range(3)]
            self.num_clients = 3

        def client_dataset(self, client):
            return self.clients[client]

    data = Own(batch_size=2)
    _, trainer = fit(tmp_path, data=data)
    assert data.prepared == 1
    assert "train/loss" in trainer.callback_metrics
    assert not [name for name in trainer.callback_metrics if name.startswith("val/")]


def test_a_partition_of_any_dataset_is_read_in_batches_or_one_by_one_alike(tmp_path):
    x, y = seeded(60, 3), seeded(60, seed=1)
    found = []
    for dataset in (TensorDataset(x, y), Samples(x, y)):
        data = DatasetPartition(dataset, dataset, num_clients=5, batch_size=4)
        found.append(weights(fit(tmp_path, data=data)[0]))
    assert torch.equal(*found)


def test_transfer_hooks_of_the_module_are_used(tmp_path):
    class Doubles(Regression):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch[0], batch[1]

    class Doubled(Regression):
        def forward(self, x):
            return super().forward(2 * x)

    assert torch.equal(weights(fit(tmp_path, Doubles())[0]), weights(fit(tmp_path, Doubled())[0]))


# --- buffers ---------------------------------------------------------------------------------------------------------


def test_statistics_are_averaged_by_samples(tmp_path):
    keep = Keep()
    model, _ = fit(tmp_path, normalised(), algorithm=keep, clients_per_round=4)
    total = sum(SIZES)
    mean = sum(r.buffers["net.1.running_mean"] * (r.num_samples / total) for r in keep.rounds[-1])
    torch.testing.assert_close(model.net[1].running_mean, mean, rtol=0, atol=1e-7)
    batches = max(int(r.buffers["net.1.num_batches_tracked"]) for r in keep.rounds[-1])
    assert int(model.net[1].num_batches_tracked) == batches == 3 * 3


class Masked(Regression):
    """As causal masks; and as the smallest value that an observer has seen."""

    def __init__(self, seen=0.0):
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("seen", torch.tensor(seen))

    def training_step(self, batch, batch_idx):
        self.seen.copy_(torch.minimum(self.seen, batch[0].min()))
        return super().training_step(batch, batch_idx)


class Expanded(Regression):
    """As positions, and as a window with one kernel for all channels."""

    def __init__(self, own=False):
        super().__init__()
        seen = torch.zeros(1).expand(3)
        self.register_buffer("seen", seen.clone() if own else seen)
        self.register_buffer("positions", torch.arange(3).expand(2, 3))
        self.scale = nn.Parameter(torch.ones(1).expand(3), requires_grad=False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.seen = 0.9 * self.seen + x.mean(0)
        return super().training_step((x * self.scale + self.seen, y), batch_idx)


def test_expanded_buffers_have_entries_of_their_own(tmp_path):
    """Torch writes to no tensor of which several entries are one number."""
    found, expected = (fit(tmp_path, Expanded(own))[0].state_dict() for own in (False, True))
    assert len(found["seen"].unique()) == 3
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_infinite_buffers_that_stay_so_are_kept_and_those_that_become_so_are_named(tmp_path):
    model, trainer = fit(tmp_path, Masked())
    assert torch.equal(model.mask, torch.tensor([0.0, -torch.inf]))
    assert trainer.callback_metrics["clients/left_out"] == 0

    class Diverges(Masked):
        def on_train_epoch_end(self):
            self.seen.fill_(torch.inf)

    with pytest.raises(FloatingPointError, match=r"round 1: the buffers/seen of every client .* stay finite"):
        fit(tmp_path, Diverges())


@pytest.mark.parametrize("policy", ["average", "reset"])
def test_what_an_observer_sees_in_validation_alone_is_kept(tmp_path, policy):
    class Observes(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.tensor(torch.inf))

        def on_validation_epoch_end(self):
            self.seen.fill_(self.current_epoch)

    model, trainer = fit(tmp_path, Observes(), buffers=policy)
    assert trainer.callback_metrics["clients/left_out"] == 0
    assert model.seen == 3


def test_what_an_observer_has_seen_is_the_mean_over_the_clients_that_saw_something(tmp_path):
    class Observes(Masked):
        def on_train_epoch_end(self):
            if len(self.trainer.train_dataloader.dataset) == 3:  # a client that has seen nothing
                self.seen.fill_(torch.inf)

    data = Clients(SIZES)
    model, trainer = fit(tmp_path, Observes(torch.inf), data, max_rounds=1, clients_per_round=1.0)
    seen = [SIZES[c] * min(x.min() for x, _ in data.client_dataset(c)) for c in range(3)]
    assert trainer.callback_metrics["clients/left_out"] == 0
    assert model.seen == pytest.approx(float(sum(seen) / sum(SIZES[:3])), rel=1e-6)


def starting_statistics(tmp_path, policy, rounds=3):
    """The running mean that each client starts from, by round, and the one that it ended with."""
    starts, keep = {}, Keep()

    class See(Regression):
        def on_client_start(self, client):
            starts[(self.current_epoch, client)] = self.net[1].running_mean.clone()

    model = See(net=normalised().net)
    fit(tmp_path, model, algorithm=keep, buffers=policy, max_rounds=rounds)
    ends = {(t, r.client): r.buffers["net.1.running_mean"] for t, results in enumerate(keep.rounds) for r in results}
    return starts, ends


def test_reset_statistics_start_anew(tmp_path):
    starts, ends = starting_statistics(tmp_path, "reset")
    assert all(torch.equal(mean, torch.zeros(4)) for mean in starts.values())
    assert all(mean.abs().sum() > 0 for mean in ends.values())


def test_local_statistics_stay_with_their_client(tmp_path):
    starts, ends = starting_statistics(tmp_path, "local", rounds=6)
    latest = {}
    for key, start in starts.items():
        assert torch.equal(start, latest.get(key[1], torch.zeros(4)))
        latest[key[1]] = ends[key]
    assert len(starts) > len(latest)


def test_averaged_statistics_are_the_servers(tmp_path):
    starts, ends = starting_statistics(tmp_path, "average")
    for round in (1, 2):
        before = [end for (t, _), end in ends.items() if t == round - 1]
        for (t, _), start in starts.items():
            if t == round:
                assert before[0].min() <= start.min() or before[1].min() <= start.min()
                assert torch.equal(start, next(s for (u, _), s in starts.items() if u == round))


def test_statistics_are_exchanged_only_if_they_are_averaged(tmp_path):
    parameters, buffers = 3 * 4 + 4 + 8 + 4 + 1, 8 * 4 + 8
    for policy, size in (("average", 4 * parameters + buffers), ("local", 4 * parameters), ("reset", 4 * parameters)):
        _, trainer = fit(tmp_path, normalised(), buffers=policy, max_rounds=1)
        for way in ("up", "down"):
            assert trainer.callback_metrics[f"comm/{way}_mb"].item() == pytest.approx(2 * size / 1e6)


def test_a_batch_of_one_sample_is_refused_before_training(tmp_path):
    data = Clients(sizes=(4, 9, 8, 13))
    with pytest.raises(
        MisconfigurationException, match="BatchNorm cannot train on a batch of one .* client 1 has 9 sam"
    ):
        fit(tmp_path, normalised(), data)
    fit(tmp_path, normalised(), data, limit_train_batches=1)
    data.batch_size = 5
    fit(tmp_path, normalised(), data)


def test_sam_moves_statistics_in_the_first_pass_only(tmp_path):
    from fedlight.perturbations import SAM

    keep = Keep()
    fit(tmp_path, normalised(), algorithm=keep, perturbation=SAM(0.05), max_rounds=1)
    for r in keep.rounds[0]:
        assert int(r.buffers["net.1.num_batches_tracked"]) == r.num_steps


# --- parameters ------------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_and_are_not_sent(tmp_path):
    model = Regression(net=nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)))
    model.net[0].requires_grad_(False)
    before = copy.deepcopy(model.net)
    _, trainer = fit(tmp_path, model)
    assert torch.equal(model.net[0].weight, before[0].weight)
    assert not torch.equal(model.net[1].weight, before[1].weight)
    assert trainer.callback_metrics["comm/up_mb"].item() == pytest.approx(2 * 4 * 5 / 1e6)
    saved = torch.load(trainer.run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())


def test_parts_in_evaluation_mode_stay_in_it(tmp_path):
    model = normalised()
    model.net[1].eval()
    fit(tmp_path, model)
    assert torch.equal(model.net[1].running_mean, torch.zeros(4))
    assert not model.net[1].training
    whole = normalised()
    whole.eval()
    fit(tmp_path, whole)
    assert not torch.equal(whole.net[1].running_mean, torch.zeros(4))


class Tied(Regression):
    """y = w·relu(Wᵀx) with one matrix used twice, under two names."""

    def __init__(self):
        super().__init__(net=nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False)))
        self.net[2].weight = self.net[0].weight
        self.head = nn.Linear(3, 1)
        with torch.no_grad():
            self.head.weight.fill_(0.3)
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(self.net(x))[:, 0]


def test_tied_weights_are_one_parameter_everywhere(tmp_path):
    data = Clients(sizes=(8,))
    model, trainer = fit(tmp_path, Tied(), data, clients_per_round=1, max_rounds=2)
    assert model.net[0].weight is model.net[2].weight
    assert trainer._session.layout.numel == 9 + 4
    expected = Tied()
    for round in range(2):
        optimizer = expected.configure_optimizers()
        for rows in torch.randperm(8, generator=generator(0, "order", round, 0)).split(4):
            optimizer.zero_grad()
            expected.training_step(data.client_dataset(0).batch(rows), 0).backward()
            optimizer.step()
    assert torch.equal(weights(model), weights(expected))


def test_tied_weights_are_saved_alike_under_both_names(tmp_path):
    """The module last held another view's weights when the checkpoint was written."""
    _, trainer = fit(tmp_path, Tied(), clients_per_round=1)
    path = trainer.run_dir / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(saved["net.0.weight"], saved["net.2.weight"])
    server = trainer._session.layout.views(trainer._session.federation.params)
    assert torch.equal(saved["net.2.weight"], server["net.0.weight"])


# --- precision -------------------------------------------------------------------------------------------------------


def test_double_precision_trains_in_double(tmp_path):
    model, _ = fit(tmp_path, data=Clients(SIZES, dtype=torch.float64), precision="64-true")
    assert model.net.weight.dtype == torch.float64
    single, _ = fit(tmp_path)
    torch.testing.assert_close(weights(model).float(), weights(single), rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights(model).float(), weights(single))
    converted, _ = fit(tmp_path, precision="64-true")  # float32 data is converted on the way
    assert converted.net.weight.dtype == torch.float64


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_is_near_single_precision(tmp_path, precision):
    model, trainer = fit(tmp_path, precision=precision, max_rounds=1, algorithm=FedAvg())
    single, reference = fit(tmp_path, max_rounds=1)
    assert model.net.weight.dtype == (torch.float32 if precision == "bf16-mixed" else torch.bfloat16)
    difference = (weights(model).float() - weights(single)).abs().max().item()
    assert 0 < difference < 0.02
    assert abs((trainer.callback_metrics["val/loss"] - reference.callback_metrics["val/loss"]).item()) < 0.2


@pytest.mark.parametrize(("tf32", "inside"), [(True, "tf32"), (False, "ieee"), (None, None)])
def test_tf32_is_set_for_the_length_of_a_run(tmp_path, tf32, inside):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before, seen = [b.fp32_precision for b in backends], set()

    class Notes(Regression):
        def training_step(self, batch, batch_idx):
            seen.update(b.fp32_precision for b in backends)
            return super().training_step(batch, batch_idx)

    fit(tmp_path, Notes(), tf32=tf32)
    assert seen == ({inside} if inside else set(before))
    assert [b.fp32_precision for b in backends] == before


class Prepares(Regression):
    """Has what its steps need from the hooks of a start, as modules written for Lightning may."""

    def on_fit_start(self):
        self.fitted = getattr(self, "fitted", 0) + 1

    def on_train_start(self):
        self.scale = torch.full((), 0.5 * self.fitted)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * self.scale

    def validation_step(self, batch, batch_idx):
        self.log("val/scale", self.scale)


@pytest.mark.parametrize("engine", ["auto", "eager", "vmap"])
def test_steps_are_tried_with_what_hooks_of_the_start_prepare(tmp_path, engine):
    class Halved(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0.5

    module, trainer = fit(tmp_path, Prepares(), engine=engine)
    assert module.fitted == 1
    assert trainer.callback_metrics["val/scale"] == 0.5
    torch.testing.assert_close(weights(module), weights(fit(tmp_path, Halved(), engine=engine)[0]))


def test_a_step_that_fails_with_it_as_well_is_refused(tmp_path):
    class Breaks(Prepares):
        def on_train_start(self):
            self.other = 1

    with pytest.raises(MisconfigurationException, match=r"training_step failed .* has no attribute 'scale'"):
        fit(tmp_path, Breaks())


def test_a_hook_that_fails_when_it_is_tried_hides_no_batch_that_does_not_fit(tmp_path):
    class Early(Regression):
        def on_train_start(self):
            raise LookupError("too early")

    with pytest.raises(MisconfigurationException, match=r"training_step failed on .*: RuntimeError: .*multiplied"):
        fit(tmp_path, Early(net=nn.Linear(5, 1)))


class Pictures(Regression):
    """Convolutions of images ``[B, 3, 4, 5]`` made of the inputs; notes how its batches and their outputs lie."""

    def __init__(self, channels=3, view=False, note=True):
        net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU())
        super().__init__(0.01, nn.ModuleList([net, nn.Linear(24, 1)]))
        self.view, self.note, self.seen = view, note, set()

    def forward(self, x):
        features = self.net[0](x)
        if self.note:
            self.seen.add((x.stride(), features.stride()))
        return self.net[1](features.view(len(x), -1) if self.view else features.flatten(1))

    def on_train_start(self):  # after the steps that are tried
        self.seen.clear()


class OfPictures(Clients):
    def __init__(self, channels=3):
        super().__init__(SIZES)
        self.channels = channels

    def images(self, sizes):
        x = torch.randn(sizes, self.channels, 4, 5, generator=generator(0, "images"))
        return TensorDataset(x, x.mean((1, 2, 3), keepdim=True).flatten(1))

    def client_dataset(self, client):
        return self.images(SIZES[client])

    def val_dataset(self):
        return self.images(8)


@pytest.mark.parametrize("engine", ["eager", "vmap"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_is_how_images_lie_in_memory(tmp_path, channels, engine):
    def trained(channels_last):
        model = Pictures(channels, note=engine == "eager")
        return fit(tmp_path, model, OfPictures(channels), channels_last=channels_last, engine=engine)[0]

    last, first = trained(True), trained(False)
    torch.testing.assert_close(weights(last), weights(first), rtol=1e-5, atol=1e-6)
    if engine == "eager":  # in training as in evaluation
        assert last.seen == {((20 * channels, 1, 5 * channels, channels), (24, 1, 12, 4))}
        assert first.seen == {((20 * channels, 20, 5, 1), (24, 6, 3, 1))}


def test_a_view_that_channels_last_forbids_is_explained(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"For trainer\.channels_last, view must be flatten or reshape"):
        fit(tmp_path, Pictures(view=True), OfPictures(), channels_last=True)


def test_a_view_that_fails_anyway_is_not_explained_with_channels_last(tmp_path):
    class Turned(Pictures):
        def forward(self, x):
            return super().forward(x.transpose(2, 3).view(len(x), 3, 4, 5))

    with pytest.raises(MisconfigurationException, match="view size is not compatible") as caught:
        fit(tmp_path, Turned(), OfPictures())
    assert "channels_last" not in str(caught.value)


class Small(Regression):
    """A loss that float16 holds when it is multiplied by 65536."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / 1024


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 1e-3}, {"accumulate_grad_batches": 2}, {"sam": True}])
def test_16_mixed_unscales_gradients(tmp_path, monkeypatch, settings):
    from fedlight.perturbations import SAM

    settings = {k: v for k, v in settings.items() if k != "sam"} | (
        {"perturbation": SAM(0.1)} if "sam" in settings else {}
    )
    half, trainer = fit(tmp_path, Small(50.0), max_rounds=1, **settings)
    assert trainer._session.federation.state.loss_scale == 65536
    monkeypatch.undo()
    single, _ = fit(tmp_path, Small(50.0), max_rounds=1, **settings)
    moved = (weights(single) - weights(Regression())).abs().max().item()
    difference = (weights(half) - weights(single)).abs().max().item()
    assert 0 < difference < 0.02 * moved


@pytest.mark.usefixtures("scaled")
def test_16_mixed_lowers_its_scale_and_skips_the_step_on_overflow(tmp_path):
    class Large(Small):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 1e36 * 1e2 if batch_idx == 0 and self.current_epoch == 0 else loss

    model, trainer = fit(tmp_path, Large(), Clients(sizes=(4,)), clients_per_round=1, max_rounds=1)
    assert torch.equal(weights(model), weights(Regression()))
    assert trainer._session.federation.state.loss_scale == 32768
    saved = torch.load(trainer.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["fedlight"]["server"]["loss_scale"] == 32768


def test_deterministic_is_given_back(tmp_path):
    class See(Regression):
        def on_train_start(self):
            assert torch.are_deterministic_algorithms_enabled()

    fit(tmp_path, See(), deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
