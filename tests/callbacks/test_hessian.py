"""Curvature in the row of its round: against the Hessian by hand, and without a trace in training."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning_utilities.core.apply_func import apply_to_collection
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, WeightedRandomSampler, default_collate

from fedlight import MAN, Checkpoint, HessianSpectrum, LossLandscape, RoundProgress
from fedlight.analysis import pictures, records
from fedlight.callbacks.pictures import PartitionPicture
from fedlight.data.arrays import ArrayDataset
from fedlight.data.dataset_partition import DatasetPartition
from fedlight.run.loggers import read_metrics
from tests.helpers.tiny import Clients, Regression, Samples, quiet_trainer, seeded, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _drawing_is_quick(request, monkeypatch):
    """Pictures take longer than what they show: all but one test get files without content."""

    def touch(*args):
        args[-1].parent.mkdir(exist_ok=True)
        args[-1].touch()
        return args[-1]

    if "pictures" not in request.node.name:
        for name in ("draw_density", "draw_layers", "draw_eigenvalues"):
            monkeypatch.setattr(pictures, name, touch)


class Net(Regression):
    """Layers that an analysis could disturb: BatchNorm and dropout."""

    def __init__(self):
        net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 1))
        super().__init__(lr=0.05, net=net)


def spectrum(**settings):
    return HessianSpectrum(**{"every_n_rounds": 1, "density": False, "float64": True, **settings})


def fit(tmp_path, *callbacks, model=None, data=None, **settings):
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **settings)
    model = Regression() if model is None else model
    trainer.fit(model, Clients() if data is None else data)
    rows = [] if trainer.run_dir is None else read_metrics(trainer.run_dir / "metrics.csv")
    return trainer, model, rows


def by_hand(x):
    """Eigenvalues, descending, and the Hessian of mean((w·x + b − y)²) in (w, b)."""
    z = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    hessian = 2 * z.T @ z / len(z)
    return torch.linalg.eigvalsh(hessian).flip(0).tolist(), hessian


class Summed(Regression):
    """The loss is a sum over samples."""

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1], reduction="sum")


def test_a_loss_that_is_a_sum_over_samples_is_said(tmp_path):
    with pytest.warns(UserWarning, match="HessianSpectrum: training_step gives a sum over samples"):
        fit(tmp_path, spectrum(), model=Summed(), max_rounds=1)


def inputs(dataset):
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


def test_the_figures_of_every_round_are_those_of_the_hessian(tmp_path):
    _, _, rows = fit(tmp_path, spectrum(top_k=2, tolerance=1e-10))
    values, hessian = by_hand(torch.cat([inputs(d) for d in Clients().datasets]))
    for row in rows:  # the loss is quadratic: its curvature is the same everywhere
        found = [row["hessian/lambda_max"], row["hessian/lambda_2"], row["hessian/lambda_min"]]
        assert found == pytest.approx([*values[:2], values[-1]], rel=1e-8)
        assert abs(row["hessian/trace"] - hessian.trace().item()) <= 3 * row["hessian/trace_error"] + 1e-6
        assert row["hessian/layer/net/lambda_max"] == pytest.approx(values[0], rel=1e-8)
        assert row["hessian/lambda_max_residual"] < 1e-8
        assert row["time/hessian_s"] > 0
    assert len({row["hessian/loss"] for row in rows}) == 3


def test_it_measures_the_task_loss_at_the_servers_weights(tmp_path):
    _, model, rows = fit(tmp_path, MAN(zeta=3.0), spectrum(), model=Net(), data=Clients(batch_size=8))
    pooled = [Clients().datasets[c][i] for c in range(4) for i in range(len(Clients().datasets[c]))]
    x, y = torch.stack([p[0] for p in pooled]), torch.stack([p[1] for p in pooled])
    model.eval()
    loss = F.mse_loss(model(x), y)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.cat([g.reshape(-1) for g in gradient]).norm()
    assert rows[-1]["hessian/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert rows[-1]["hessian/gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert [k for k in rows[-1] if k.startswith("hessian/layer")] == [
        "hessian/layer/net.0/lambda_max",
        "hessian/layer/net.1/lambda_max",
        "hessian/layer/net.4/lambda_max",
    ]


def test_it_measures_when_it_is_due_and_after_the_last_round(tmp_path):
    callback = spectrum(every_n_rounds=2)
    _, _, rows = fit(tmp_path, callback, max_rounds=5)
    assert [int(row["round"]) for row in rows if "hessian/lambda_max" in row] == [1, 3, 4]
    assert callback.results["server"].lambda_max == rows[-1]["hessian/lambda_max"]
    assert len(rows) == 5


class Stop(Callback):
    def on_round_start(self, trainer, pl_module):
        trainer.should_stop = trainer.current_round == 2


def test_it_measures_where_a_run_stops_by_itself(tmp_path):
    _, _, rows = fit(tmp_path, Stop(), spectrum(every_n_rounds=10), max_rounds=9)
    assert [int(row["round"]) for row in rows if "hessian/lambda_max" in row] == [2]


def test_training_is_the_same_to_the_bit(tmp_path):
    runs = {}
    for name, callbacks in {"without": [], "with": [spectrum(density=True, top_k=2, data="clients")]}.items():
        torch.manual_seed(1)
        data = Clients(batch_size=8)
        _, model, rows = fit(tmp_path, MAN(zeta=0.1), *callbacks, model=Net(), data=data, name=name)
        kept = [{k: v for k, v in row.items() if not k.startswith(("time/", "hessian/"))} for row in rows]
        runs[name] = weights(model), kept, torch.get_rng_state(), model.training, "training_step" in vars(model)
    assert torch.equal(runs["with"][0], runs["without"][0])
    assert runs["with"][1] == runs["without"][1]
    assert torch.equal(runs["with"][2], runs["without"][2])
    assert runs["with"][3:] == runs["without"][3:]


def test_views_have_their_names(tmp_path):
    _, _, rows = fit(tmp_path, spectrum(views=["server", "all"]), model=Net(), data=Clients(batch_size=8))
    row = rows[-1]
    assert row["hessian/lambda_max"] != row["hessian/lambda_max_all"]
    assert "hessian/layer/net.0/lambda_max_all" in row
    assert not any(name.startswith("hessian/") and name.endswith("_selected") for name in row)
    assert "time/hessian_s_all" not in row


def test_validation_data(tmp_path):
    _, _, rows = fit(tmp_path, spectrum(data="val"))
    assert rows[0]["hessian/lambda_max"] == pytest.approx(by_hand(inputs(Clients().held_out))[0][0], rel=1e-3)
    assert rows[-1]["hessian/loss"] == pytest.approx(rows[-1]["val/loss"], rel=1e-5)
    samples = Samples(*Clients().held_out.storage.leaves)
    loaders = [DataLoader(samples, 5, collate_fn=how) for how in (None, doubled)]
    _, _, rows = fit(tmp_path, spectrum(data="val"), data=DatasetPartition(*loaders, num_clients=2))
    assert rows[-1]["hessian/loss"] == pytest.approx(rows[-1]["val/loss"], rel=1e-5)


def doubled(samples):
    x, y = default_collate(samples)
    return 2 * x, y


def test_each_clients_own_loss(tmp_path):
    _, _, rows = fit(tmp_path, spectrum(data="clients"))
    own = [by_hand(inputs(d))[0][0] for d in Clients().datasets]
    assert rows[0]["hessian/clients/lambda_max_mean"] == pytest.approx(sum(own) / 4, rel=1e-2)
    assert rows[0]["hessian/clients/lambda_max_max"] == pytest.approx(max(own), rel=1e-2)
    pooled = by_hand(torch.cat([inputs(d) for d in Clients().datasets]))[0][0]
    assert rows[0]["hessian/lambda_max"] == pytest.approx(pooled, rel=1e-3)


class BreaksOnFive(Regression):
    """Its loss of five samples is NaN in evaluation."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (math.nan if len(batch[1]) == 5 and not self.training else 1)


def test_a_client_whose_loss_is_not_finite_is_named_by_its_number(tmp_path):
    with pytest.warns(UserWarning, match=r"the loss of clients \[2\] is NaN"):
        trainer, *_ = fit(
            tmp_path, spectrum(data="clients"), model=BreaksOnFive(), data=Clients((0, 4, 5, 3)), max_rounds=1
        )
    with np.load(trainer.run_dir / "hessian" / "round1.npz") as saved:
        assert saved["client_numbers"].tolist() == [1, 2, 3]
        assert np.isnan(saved["clients"]).tolist() == [False, True, False]


def test_a_sample_of_the_data(tmp_path):
    callback = spectrum(max_samples=7, layerwise=["net"])
    fit(tmp_path, callback, max_rounds=1)
    assert callback.results["server"].samples == 7
    assert callback.results["server"].trace is not None


class Breaks(Regression):
    """Its loss is NaN in evaluation from some round on; training goes on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        broken = not self.training and self.trainer.current_round >= 2
        return loss * float("nan") if broken else loss


def test_a_loss_that_is_not_finite_is_reported_and_the_run_goes_on(tmp_path):
    callback = spectrum(top_k=2, data="clients", density=True)
    with pytest.warns(UserWarning, match=r"HessianSpectrum: The loss is nan.*the run goes on"):
        _, model, rows = fit(tmp_path, callback, model=Breaks())
    names = [[k for k in row if k.startswith("hessian/")] for row in rows]
    assert set(names[0]) == set(names[1]) == set(names[2])
    assert all(math.isfinite(rows[0][name]) for name in names[0])
    assert all(math.isnan(rows[2][name]) for name in names[2])
    assert weights(model).isfinite().all()
    assert callback.results["server"].density is None


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.sign()


class Abs(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class NoValidation(Clients):
    def val_dataset(self):
        return None


class LossInTraining(Regression):
    """As the detectors of torchvision."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if self.training else self.no_loss


@pytest.mark.parametrize(
    ("settings", "others", "message"),
    [
        ({"top_k": 5}, {}, r"HessianSpectrum: `top_k: 5`, but the model has 4 parameters"),
        ({"layerwise": ["nett"]}, {}, r"`layerwise` names 'nett'.*Did you mean 'net'\?"),
        ({"data": "val"}, {"data": NoValidation()}, r"`data: val`, but there is no validation data"),
        ({"views": ["all"]}, {"views": ["server"]}, r"`views` has 'all'.*trainer\.views"),
        (
            {"data": "train"},
            {"model": Regression(net=nn.Sequential(nn.Linear(3, 1), Abs()))},
            r"second derivatives.*'net\.1' \(Abs\)",
        ),
        ({"data": "train"}, {"model": LossInTraining()}, r"evaluation mode, .* LossInTraining ends in AttributeError"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(tmp_path, settings, others, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, spectrum(**settings), **others)
    assert not list(tmp_path.rglob("metrics.csv"))


def test_a_loss_with_gradients_in_it_is_measured(tmp_path):
    class Known(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.slope(batch[0]).pow(2).sum()

        def slope(self, x):
            return self.net.weight.expand(len(x), -1)

    class OfGradients(Known):
        def slope(self, x):
            return torch.func.grad(lambda x: self.net(x).sum())(x)

    class OfTheGraph(Known):
        def slope(self, x):
            x = x.clone().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]

    found = []
    for model in (Known(), OfGradients(), OfTheGraph()):
        trainer, *_ = fit(tmp_path, spectrum(data="train"), model=model, max_rounds=1)
        found.append([float(v) for name, v in trainer.callback_metrics.items() if name.startswith("hessian/")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] == pytest.approx(found[2], rel=1e-4)


def test_what_on_train_start_brings_is_not_missed_before(tmp_path):
    class Centred(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", None)

        def on_train_start(self):
            self.centre = torch.ones(3)

        def forward(self, x):
            return super().forward(x - self.centre)

    trainer, *_ = fit(tmp_path, spectrum(data="train"), model=Centred(), max_rounds=1)
    assert trainer.callback_metrics["hessian/lambda_max"] > 0


def test_two_of_them_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="two HessianSpectrum"):
        fit(tmp_path, spectrum(), spectrum(data="val"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_rounds": 0}, "`every_n_rounds` must be at least 1"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"max_samples": 0}, "`max_samples` must be at least 1"),
        ({"sam_rho": 0.0}, "`sam_rho` must be a finite number above 0"),
        ({"tolerance": -1.0}, "`tolerance` must be a finite number above 0"),
        ({"data": "test"}, "`data` must be train, val or clients"),
        ({"views": ["best"]}, "`views` must be of server, selected, all, swa, got"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        HessianSpectrum(**settings)


def test_files_and_pictures(tmp_path):
    callback = spectrum(density=True, every_n_rounds=2, top_k=2, views=["server", "all"])
    trainer, _, rows = fit(tmp_path, MAN(zeta=0.0), callback, model=Net(), data=Clients(batch_size=8), max_rounds=5)
    run = trainer.run_dir
    plots = {path.name for path in (run / "plots").iterdir()}
    assert plots == {"curves.png", "density_round4.png", "density_round5.png", "layers.png", "eigenvalues.png"}
    stems = [f"round{r}{view}" for r in (2, 4, 5) for view in ("", "_all")]
    files = {f"{stem}{end}" for stem in stems for end in (".npz", "_density.csv")}
    assert {path.name for path in (run / "hessian").iterdir()} == files
    with np.load(run / "hessian" / "round5.npz", allow_pickle=False) as saved:
        assert saved["eigenvalues"].tolist() == callback.results["server"].eigenvalues
    with (run / "hessian" / "round5_density.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(float(r["eigenvalue"]), float(r["density"])) for r in table] == callback.results["server"].density_table()
    assert all("hessian/trace" in row for row in rows if row["round"] in (1, 3, 4))


def test_layers_are_drawn_with_the_activations_that_follow_them():
    names = "net.0", "net.1", "net.4"
    rows = [
        {"round": 0, "man/net.2": 5.0},
        {"round": 1, "man/net.2": 4.0, **{f"hessian/layer/{n}/lambda_max": float(i) for i, n in enumerate(names)}},
    ]
    histories = records.layer_histories(Net(), rows)
    assert [(h.name, h.lambda_max) for h in histories] == [
        ("net.0", {2: 0.0}),
        ("net.1", {2: 1.0}),
        ("net.4", {2: 2.0}),
    ]
    assert [h.norms for h in histories] == [{1: 5.0, 2: 4.0}, {1: 5.0, 2: 4.0}, {}]


def test_a_resumed_run_draws_what_came_before(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "draw_layers", lambda layers, path: drawn.append(layers) or path)
    monkeypatch.setattr(pictures, "draw_eigenvalues", lambda rounds, results, path: drawn.append(rounds) or path)
    fit(tmp_path, spectrum(), max_rounds=2)
    trainer = quiet_trainer(tmp_path, callbacks=[spectrum()], max_rounds=4)
    trainer.fit(Regression(), Clients(), ckpt_path="last")
    assert drawn[-1] == [1, 2, 3, 4]
    assert [*drawn[-2][0].lambda_max] == [1, 2, 3, 4]


class Seen(Logger):
    """A logger that takes tables and pictures, as W&B's does."""

    def __init__(self):
        super().__init__()
        self.tables, self.pictures, self.metrics = [], [], []

    name = version = "seen"

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.metrics.append(metrics)

    def log_table(self, key, columns, data):
        self.tables.append((key, columns, len(data), len(self.metrics)))

    def log_image(self, key, images):
        self.pictures.append((key, Path(images[0]).name, len(self.metrics)))


def test_loggers_get_scalars_and_densities(tmp_path):
    seen = Seen()
    fit(tmp_path, spectrum(density=True, views=["server", "all"], every_n_rounds=2), logger=seen)
    assert ["hessian/lambda_max" in row for row in seen.metrics] == [False, True, True]
    columns = ["eigenvalue", "density"]
    # After the row of their round, so that they stand at that round.
    assert [t for t in seen.tables if t[0] == "hessian/density"] == [
        ("hessian/density", columns, 1024, 2),
        ("hessian/density", columns, 1024, 3),
    ]
    assert len(seen.tables) == 4
    assert ("plots/density", "density_round2.png", 2) in seen.pictures
    assert ("plots/layers", "layers.png", 3) in seen.pictures
    assert ("plots/eigenvalues", "eigenvalues.png", 3) in seen.pictures


def test_nothing_is_written_in_a_fast_dev_run(tmp_path):
    callback = spectrum(density=True)
    fit(tmp_path, callback, fast_dev_run=True)
    assert callback.results["server"].density is not None
    assert not list(tmp_path.iterdir())


class Counting(Callback):
    def on_round_metrics(self, trainer, pl_module):
        return {"own/count": trainer.current_round}


class Quiet(Callback):
    def on_round_metrics(self, trainer, pl_module):
        return None


class Speaking(Regression):
    def on_round_metrics(self):
        return {"own/module": torch.tensor(2.5)}


def test_any_callback_and_the_module_can_add_to_the_row(tmp_path):
    trainer, _, rows = fit(tmp_path, Counting(), Quiet(), model=Speaking())
    assert [(row["own/count"], row["own/module"]) for row in rows] == [(1, 2.5), (2, 2.5), (3, 2.5)]
    assert trainer.callback_metrics["own/count"] == 3


class Plain(Regression):
    """For a stock trainer: the same module with data of its own."""

    def __init__(self, shuffle=True):
        super().__init__()
        x = seeded(30, 3, seed=4)
        self.data, self.shuffle = Samples(x, x.sum(1)), shuffle

    def train_dataloader(self):
        return DataLoader(self.data, 5, shuffle=self.shuffle)

    def val_dataloader(self):
        return DataLoader(self.data, 10)


def stock(tmp_path, *callbacks, model=None, data=None, **settings):
    torch.manual_seed(3)
    model = model or Plain()
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": 3, "log_every_n_steps": 1, "default_root_dir": tmp_path}
    trainer = Trainer(callbacks=list(callbacks), **{**quiet, **settings})
    trainer.fit(model, datamodule=data)
    return trainer, model


def test_in_a_stock_trainer(tmp_path):
    callback = spectrum(top_k=2, density=True, every_n_rounds=2)
    logger = CSVLogger(tmp_path, name="csv")
    trainer, model = stock(tmp_path, callback, logger=logger)
    values, _ = by_hand(model.data.x)
    assert float(trainer.callback_metrics["hessian/lambda_max"]) == pytest.approx(values[0], rel=1e-5)
    assert {p.name for p in Path(logger.log_dir).glob("*/*.png")} == {"density_epoch1.png", "density_epoch2.png"}
    assert torch.equal(weights(model), weights(stock(tmp_path)[1]))


class Unusual(Plain):
    """Reads some rows of its data, and logs by itself."""

    def __init__(self, **reading):
        super().__init__()
        self.reading = reading or {"batch_size": 5, "sampler": SubsetRandomSampler(range(10))}

    def train_dataloader(self):
        return DataLoader(self.data, **self.reading)

    def training_step(self, batch, batch_idx):
        self.logger.log_metrics({"own": 1.0})
        return super().training_step(batch, batch_idx)


def test_in_a_stock_trainer_the_rows_of_the_sampler_are_measured_and_the_loggers_left_alone(tmp_path):
    logger = Seen()
    trainer, model = stock(tmp_path, spectrum(), logger=logger, limit_val_batches=0, model=Unusual())
    largest = by_hand(model.data.x[:10])[0][0]
    assert float(trainer.callback_metrics["hessian/lambda_max"]) == pytest.approx(largest, rel=1e-5)
    assert sum("own" in row for row in logger.metrics) == 6  # steps of training


@pytest.mark.parametrize(
    "batches", [BatchSampler(SubsetRandomSampler(range(10)), 5, False), [[4, 3, 2, 1, 0], [5, 6, 7, 8, 9]]]
)
def test_in_a_stock_trainer_the_rows_of_a_batch_sampler_are_measured(tmp_path, batches):
    model = Unusual(batch_sampler=batches)
    trainer, _ = stock(tmp_path, spectrum(), logger=Seen(), limit_val_batches=0, model=model, max_epochs=1)
    largest = by_hand(model.data.x[:10])[0][0]
    assert float(trainer.callback_metrics["hessian/lambda_max"]) == pytest.approx(largest, rel=1e-5)


class Doubled(Plain):
    """Its loaders make batches in ways of their own."""

    def train_dataloader(self):
        return DataLoader(self.data, 5, collate_fn=doubled)


@pytest.mark.parametrize(("data", "factor"), [("train", 4), ("val", 1)])
def test_in_a_stock_trainer_the_loader_of_the_data_makes_the_batches(tmp_path, data, factor):
    callback = spectrum(data=data, every_n_rounds=3)
    _, model = stock(tmp_path, callback, model=Doubled(), max_epochs=1, limit_train_batches=1)
    x = model.data.x * factor**0.5
    assert callback.results["server"].lambda_max == pytest.approx(by_hand(x)[0][0], rel=1e-5)


class Scaling(LightningDataModule):
    """Its hooks scale by 2, which is undone in training."""

    def train_dataloader(self):
        return DataLoader(Plain().data, batch_size=5)

    val_dataloader = train_dataloader

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return apply_to_collection(batch, torch.Tensor, lambda x: 2 * x)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        factor = 0.5 if self.trainer.training or self.trainer.lightning_module.training else 1.0
        return apply_to_collection(batch, torch.Tensor, lambda x: factor * x)


@pytest.mark.parametrize("validated", [0, 1])
def test_in_a_stock_trainer_hooks_of_the_datamodule_are_called_as_in_an_evaluation(tmp_path, validated):
    callback = spectrum(every_n_rounds=3)
    settings = {"model": (model := Plain()), "max_epochs": 1, "limit_val_batches": validated}
    stock(tmp_path, callback, data=Scaling(), **settings)
    assert callback.results["server"].lambda_max == pytest.approx(by_hand(2 * model.data.x)[0][0], rel=1e-5)


class Fives(BatchSampler):
    pass


_DRAWN = WeightedRandomSampler([1.0, *[0.0] * 19], 10)


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ({"sampler": _DRAWN, "batch_size": 5}, "WeightedRandomSampler"),
        ({"batch_sampler": BatchSampler(_DRAWN, 5, False)}, "WeightedRandomSampler"),
        ({"batch_sampler": Fives(range(20), 5, False)}, "Fives"),
    ],
)
def test_in_a_stock_trainer_what_a_sampler_weighs_is_said(tmp_path, own, name, recwarn):
    model = Plain()
    model.train_dataloader = lambda: DataLoader(model.data, **own)
    stock(tmp_path, spectrum(), model=model, limit_val_batches=0, max_epochs=1)
    said = [str(warning.message) for warning in recwarn]
    assert sum(f"every row counts once in it, however often {name} draws it" in text for text in said) > 0


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Listed(Plain):
    """Its batches are lists of one."""

    def train_dataloader(self):
        return [super().train_dataloader()]


class Streamed(Plain):
    def train_dataloader(self):
        return DataLoader(self.data, batch_size=None)


@pytest.mark.parametrize(
    ("model", "callback", "message"),
    [
        (Plain, spectrum(views=["selected"]), "`views` has 'selected'.*which only FederatedTrainer has"),
        (Plain, LossLandscape(view="all"), "view 'all'.*which only FederatedTrainer has"),
        (Manual, spectrum(), "HessianSpectrum: Manual optimises manually"),
        (Streamed, spectrum(), "`data: train` needs a dataset of numbered samples"),
        (Listed, spectrum(), "`data: train` needs one DataLoader, found list"),
    ],
)
def test_what_a_stock_trainer_has_not_is_refused(tmp_path, model, callback, message):
    with pytest.raises(MisconfigurationException, match=message):
        stock(tmp_path, callback, model=model(), limit_val_batches=0)


@pytest.mark.parametrize("settings", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 5}, {"max_steps": 12}])
def test_in_a_stock_trainer_without_validation(tmp_path, settings):
    callback = spectrum(density=True, every_n_rounds=2)
    logger = CSVLogger(tmp_path, name="csv")
    trainer, model = stock(tmp_path, callback, logger=logger, **settings)
    values, _ = by_hand(model.data.x)
    assert float(trainer.callback_metrics["hessian/lambda_max"]) == pytest.approx(values[0], rel=1e-5)
    last = (trainer.global_step - 1) // len(model.train_dataloader())
    assert {p.name for p in Path(logger.log_dir).glob("*/*.png")} == {"density_epoch1.png", f"density_epoch{last}.png"}
    assert "on_train_epoch_end" not in vars(callback)  # a federated run of the same callback has no use for it


@pytest.mark.parametrize("interval", [2, 4])  # of 6 batches
def test_in_a_stock_trainer_an_epoch_is_measured_once_at_its_end(tmp_path, interval):
    class Steps(HessianSpectrum):
        def run(self, subject, view="server"):
            steps.append(subject.module.global_step)
            return super().run(subject, view)

    steps = []
    stock(tmp_path, Steps(every_n_rounds=1, density=False), val_check_interval=interval, max_epochs=2)
    assert steps == [6, 12]


@pytest.mark.parametrize("callback", [Checkpoint(), RoundProgress(), PartitionPicture()])
def test_callbacks_of_rounds_refuse_a_stock_trainer(tmp_path, callback):
    with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__} acts on rounds"):
        stock(tmp_path, callback)


def test_a_landscape_without_a_folder_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("fedlight.callbacks.landscape.rank_zero_warn", said.append)
    stock(tmp_path, LossLandscape(points=3), limit_val_batches=0)
    assert len(said) == 1
    assert said[0].startswith("LossLandscape has no folder")


def test_a_stock_trainer_has_no_clients(tmp_path):
    with pytest.raises(MisconfigurationException, match="this trainer has none"):
        stock(tmp_path, spectrum(data="clients"))


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = ["-m", "tests.callbacks.hessian_processes", str(tmp_path)]
    run = subprocess.run([*command, *script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    from tests.callbacks.hessian_processes import measure

    alone = measure(tmp_path / "alone", devices=1)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first == second
    assert first.keys() == alone.keys()
    assert first == pytest.approx(alone, rel=1e-6, abs=1e-9)


def test_array_datasets_are_pooled_without_augmentation(tmp_path):
    class Arrays(Clients):
        def pooled_dataset(self):
            x = torch.cat([inputs(d) for d in self.datasets])
            return ArrayDataset(x, torch.zeros(len(x)))

    _, _, rows = fit(tmp_path, spectrum(tolerance=1e-8), data=Arrays(), max_rounds=1)
    assert rows[0]["hessian/lambda_max"] == pytest.approx(
        by_hand(torch.cat([inputs(d) for d in Clients().datasets]))[0][0], rel=1e-6
    )
