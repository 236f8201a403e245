"""The loss around the final model and on the way to another one, against the loss itself."""

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fedlight import LossLandscape
from fedlight.analysis import pictures
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights


class Normed(Regression):
    """Buffers that the loss depends on."""

    def __init__(self, lr=0.05):
        super().__init__(lr=lr, net=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)))


def fit(tmp_path, *callbacks, model=None, data=None, **settings):
    model = Regression() if model is None else model
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **settings)
    trainer.fit(model, Clients(batch_size=8) if data is None else data)
    return trainer, model


def loss(model, data=None):
    """The loss of the module in eval mode over the pooled training data, or on validation data."""
    sets = Clients().datasets if data is None else [data]
    x, y = (torch.cat([torch.stack([d[i][k] for i in range(len(d))]) for d in sets]) for k in (0, 1))
    model.eval()
    with torch.no_grad():
        return F.mse_loss(model(x), y).item()


@pytest.fixture(autouse=True)
def _drawing_is_quick(request, monkeypatch):
    if "pictures" not in request.node.name:
        for name in ("draw_contour", "draw_surface", "draw_line"):
            monkeypatch.setattr(pictures, name, lambda thing, path, *args: path)


def test_pictures_and_grids(tmp_path):
    trainer, model = fit(tmp_path, LossLandscape(points=5, max_samples=None, float64=True))
    names = {p.name for p in (trainer.run_dir / "plots").iterdir()}
    assert names == {"curves.png", "landscape_contour.png", "landscape_surface.png"}
    with np.load(trainer.run_dir / "hessian" / "landscape.npz") as saved:
        assert saved["a"].tolist() == saved["b"].tolist() == [-1, -0.5, 0, 0.5, 1]
        assert saved["loss"].shape == (5, 5)
        assert saved["loss"][2, 2] == pytest.approx(loss(model), rel=1e-5)
        assert len(set(saved["loss"].ravel().tolist())) == 25


def test_along_eigenvectors_a_quadratic_rises_by_its_eigenvalues(tmp_path):
    trainer, _ = fit(tmp_path, LossLandscape("eigenvectors", points=5, max_samples=None, float64=True), max_rounds=40)
    x = torch.cat([torch.stack([d[i][0] for i in range(len(d))]) for d in Clients().datasets])
    z = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    first, second = torch.linalg.eigvalsh(2 * z.T @ z / len(z)).flip(0)[:2].tolist()
    with np.load(trainer.run_dir / "hessian" / "landscape.npz") as saved:
        a, values = saved["a"], saved["loss"]
    assert a.tolist() == [-0.5, -0.25, 0, 0.25, 0.5]
    # The second difference is the curvature, wherever the gradient points.
    assert (values[4, 2] - 2 * values[2, 2] + values[0, 2]) / 0.25 == pytest.approx(first, rel=1e-3)
    assert (values[2, 4] - 2 * values[2, 2] + values[2, 0]) / 0.25 == pytest.approx(second, rel=1e-2)


def test_training_is_the_same_to_the_bit(tmp_path):
    torch.manual_seed(1)
    models = [fit(tmp_path, *c, model=Normed())[1] for c in ((), (LossLandscape(points=3),))]
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_the_line_joins_two_models_with_their_buffers(tmp_path):
    first, other = fit(tmp_path, model=Normed(lr=0.01), name="other", max_rounds=2)
    callback = LossLandscape(points=3, max_samples=None, line_to=str(first.run_dir / "checkpoints" / "last.ckpt"))
    trainer, model = fit(tmp_path, callback, model=Normed(lr=0.1))
    for name, data in (("training", None), ("validation", Clients().held_out)):
        with np.load(trainer.run_dir / "hessian" / f"line_{name}.npz") as saved:
            at = dict(zip(saved["t"].tolist(), saved["loss"].tolist(), strict=True))
        assert at[0.0] == pytest.approx(loss(model, data), rel=1e-5)
        assert at[1.0] == pytest.approx(loss(other, data), rel=1e-5)
        assert min(at) == -0.5
        assert max(at) == 1.5


def test_other_weights_than_the_servers(tmp_path):
    trainer, model = fit(tmp_path, LossLandscape(points=3, view="all", max_samples=None, float64=True))
    nn.utils.vector_to_parameters(trainer._session.federation.state.views["all"], model.parameters())
    with np.load(trainer.run_dir / "hessian" / "landscape.npz") as saved:
        assert saved["loss"][1, 1] == pytest.approx(loss(model), rel=1e-5)


class Broken(Regression):
    """Its loss is NaN in evaluation when training is over."""

    def training_step(self, batch, batch_idx):
        over = not self.training and self.trainer.current_round == 3
        return super().training_step(batch, batch_idx) * (float("nan") if over else 1.0)


@pytest.mark.parametrize("directions", ["random", "eigenvectors"])
def test_a_loss_that_is_nowhere_finite_ends_no_run(tmp_path, directions):
    with pytest.warns(UserWarning, match="nowhere finite"):
        trainer, _ = fit(tmp_path, LossLandscape(directions, points=3), model=Broken())
    assert (trainer.run_dir / "summary.json").exists()
    assert not list((trainer.run_dir / "plots").glob("landscape*"))


class Plain(Regression):
    def train_dataloader(self):
        return DataLoader(Clients().datasets[1], 4)

    val_dataloader = train_dataloader


def test_in_a_stock_trainer(tmp_path):
    model, logger = Plain(), CSVLogger(tmp_path)
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    callback = LossLandscape(points=3, float64=True)
    Trainer(callbacks=[callback], logger=logger, enable_checkpointing=False, log_every_n_steps=1, **quiet).fit(model)
    with np.load(tmp_path / "lightning_logs" / "version_0" / "hessian" / "landscape.npz") as saved:
        assert saved["loss"][1, 1] == pytest.approx(loss(model, Clients().datasets[1]), rel=1e-5)


class NoValidation(Clients):
    def val_dataset(self):
        return None


@pytest.mark.parametrize(
    ("settings", "others", "message"),
    [
        ({"view": "all"}, {"views": ["server"]}, r"view 'all'.*trainer\.views"),
        ({"data": "val"}, {"data": NoValidation()}, "there is no validation data"),
        ({"line_to": "nowhere.ckpt"}, {}, r"LossLandscape: line_to='nowhere\.ckpt' does not exist"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_training(tmp_path, settings, others, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, LossLandscape(**settings), **others)
    assert not list(tmp_path.rglob("metrics.csv"))


def test_a_line_to_another_model_is_refused(tmp_path):
    trainer, _ = fit(tmp_path, max_rounds=1)
    with pytest.raises(MisconfigurationException, match=r"LossLandscape: line_to=.*belongs to another model"):
        fit(tmp_path, LossLandscape(line_to=str(trainer.run_dir / "checkpoints" / "last.ckpt")), model=Normed())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": "axes"}, "`directions` must be random or eigenvectors"),
        ({"radius": 0.0}, "`radius` must be a finite number above 0"),
        ({"points": 2}, "`points` must be at least 3"),
        ({"max_samples": 0}, "`max_samples` must be at least 1"),
        ({"data": "clients"}, "`data` must be train or val"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LossLandscape(**settings)
