"""``fedlight analyze`` and ``FederatedTrainer.analyze``: the same figures after training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight import MAN, HessianSpectrum
from fedlight.analysis import pictures, run
from fedlight.cli.command import main
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

QUICK = {"top_k": 1, "density": False, "float64": True, "verbose": False}


@pytest.fixture(autouse=True)
def _drawing_is_quick(request, monkeypatch):
    if "pictures" in request.node.name:
        return
    for module, name in [(pictures, "draw_density"), (pictures, "draw_layers"), (run, "draw_eigenvalues")]:
        monkeypatch.setattr(module, name, lambda *args: args[-1])
    for name in ("draw_contour", "draw_surface", "draw_line"):
        monkeypatch.setattr(pictures, name, lambda thing, path, *args: path)


def trained(tmp_path, *callbacks, model=None, **settings):
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **settings)
    model = model or Regression()
    trainer.fit(model, Clients())
    return trainer, model


def analyze(tmp_path, ckpt_path="last", model=None, data=None, **options):
    trainer = quiet_trainer(tmp_path)
    return trainer.analyze(model or Regression(), data or Clients(), ckpt_path, **{**QUICK, **options})


def test_it_finds_what_the_callback_found(tmp_path):
    callback = HessianSpectrum(every_n_rounds=9, density=False, float64=True, views=["server", "all"], data="clients")
    trained(tmp_path, callback)
    found = analyze(tmp_path, top_k=1, views=["server", "all"], on="clients")
    assert list(found) == ["server", "all"]
    # Equal to the bit, but for the clock.
    assert found == {view: replace(result, seconds=found[view].seconds) for view, result in callback.results.items()}


def test_the_module_holds_the_servers_model_and_nothing_else_changes(tmp_path):
    trainer, model = trained(tmp_path)
    before = {p: p.read_bytes() for p in trainer.run_dir.rglob("*") if p.is_file()}
    fresh, rng = Regression(), torch.get_rng_state()
    analyze(tmp_path, model=fresh)
    assert torch.equal(weights(fresh), weights(model))
    assert torch.equal(torch.get_rng_state(), rng)
    assert {p: p.read_bytes() for p in before} == before


def test_pictures_and_files_next_to_the_run(tmp_path, capsys):
    trainer, _ = trained(tmp_path, MAN(zeta=0.0), model=Net())
    analyze(tmp_path, model=Net(), density=True, top_k=2, landscape="random", landscape_points=3, verbose=True)
    plots = {p.name for p in (trainer.run_dir / "plots").iterdir()}
    wanted = {"curves.png", "density_last.png", "eigenvalues_last.png", "layers_last.png"}
    assert plots == wanted | {"landscape_last_contour.png", "landscape_last_surface.png"}
    files = {p.name for p in (trainer.run_dir / "hessian").iterdir()}
    assert files == {"last.npz", "last_density.csv", "landscape_last.npz"}
    printed = capsys.readouterr().out
    for part in ("last, after 3 rounds", "λ_1 (max)", "λ_min", "trace", "sharpness", "λ_max of layer net.0", "seconds"):
        assert part in printed
    assert "density_last.png" in printed.replace("\n", "")


class Net(Regression):
    def __init__(self):
        super().__init__(net=torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)))


def test_layers_are_drawn_with_the_norms_that_the_run_logged(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "draw_layers", lambda layers, path: drawn.append(layers) or path)
    trained(tmp_path, MAN(zeta=0.0), model=Net())
    found = analyze(tmp_path, model=Net())["server"]
    first, last = drawn[-1]
    assert (first.name, [*first.norms]) == ("net.0", [1, 2, 3])
    assert (first.lambda_max, last.lambda_max) == ({3: found.layers["net.0"]}, {3: found.layers["net.2"]})
    assert (last.name, last.norms) == ("net.2", {})


def test_eigenvalues_are_drawn_once_by_rank_also_where_the_run_logged_some(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run, "draw_eigenvalues", lambda rounds, results, path: drawn.append(len(results)) or path)
    monkeypatch.setattr(pictures, "draw_eigenvalues", lambda rounds, results, path: drawn.append(len(results)) or path)
    trained(tmp_path, HessianSpectrum(every_n_rounds=1, density=False, trace=False, layerwise=False))
    drawn.clear()
    analyze(tmp_path)
    assert drawn == [1]


def test_a_module_as_it_is(tmp_path):
    found = analyze(tmp_path, ckpt_path=None)
    assert found["server"].samples == 28
    assert (tmp_path / "default" / "analysis" / "hessian" / "model.npz").exists()


def test_another_folder(tmp_path):
    trainer, _ = trained(tmp_path)
    path = trainer.run_dir / "checkpoints" / "last.ckpt"
    moved = path.rename(tmp_path / "moved.ckpt")
    analyze(tmp_path, moved)
    assert (tmp_path / "default" / "analysis" / "hessian" / "moved.npz").exists()
    analyze(tmp_path, moved, output=tmp_path / "there")
    assert (tmp_path / "there" / "hessian" / "moved.npz").exists()


def test_the_line_to_another_run(tmp_path):
    trainer, _ = trained(tmp_path, name="first")
    trained(tmp_path, name="second", model=Regression(lr=0.3))
    path = str(trainer.run_dir / "checkpoints" / "last.ckpt")
    second = quiet_trainer(tmp_path, name="second")
    second.analyze(Regression(), Clients(), "last", line_to=path, landscape_samples=None, **QUICK)
    here = second.analyze(Regression(), Clients(), "last", **QUICK)["server"].loss
    there = analyze(tmp_path, path)["server"].loss
    with np.load(tmp_path / "second" / "version_0" / "hessian" / "line_last_training.npz") as saved:
        at = dict(zip(saved["t"].tolist(), saved["loss"].tolist(), strict=True))
    assert (at[0.0], at[1.0]) == pytest.approx((here, there), rel=1e-6)


class NoValidation(Clients):
    def val_dataset(self):
        return None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "analyze: `top_k: 9`, but the model has 4 parameters"),
        ({"layerwise": ["conv"]}, "analyze: `layerwise` names 'conv'"),
        ({"on": "val", "data": NoValidation()}, "there is no validation data"),
        ({"line_to": "nowhere.ckpt"}, "analyze: line_to='nowhere.ckpt' does not exist"),
        ({"ckpt_path": "nowhere.ckpt"}, "ckpt_path='nowhere.ckpt' does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, options, message):
    trained(tmp_path, max_rounds=1)
    with pytest.raises(MisconfigurationException, match=message):
        analyze(tmp_path, **options)


CONFIG = [
    *("--model=Classifier", "--model.net=fedlight.models.MLP", "--model.net.in_features=64", "--model.net.hidden=[4]"),
    *("--model.num_classes=10", "--data=ImageData", "--data.source=digits", "--data.num_clients=4"),
    *("--trainer.max_rounds=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu", "--trainer.devices=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.client_val_every_n_rounds=0"),
]


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured = ["--trainer.callbacks+=HessianSpectrum", "--trainer.callbacks.density=false"]
    main(["fit", *CONFIG, *measured, "--trainer.callbacks.max_samples=50", "--trainer.callbacks.top_k=2"])
    options = ["--top_k=2", "--density=false", "--max_samples=50"]
    main(["analyze", *CONFIG, "--ckpt_path=last", *options])
    assert "50 samples" in capsys.readouterr().out
    folder = tmp_path / "runs" / "default" / "version_0" / "hessian"
    with np.load(folder / "round1.npz") as during, np.load(folder / "last.npz") as after:
        assert during["eigenvalues"].tolist() == after["eigenvalues"].tolist()
        assert during["trace"] == after["trace"]
    saved = folder.parent / "config.yaml"
    main(["analyze", "-c", str(saved), "--ckpt_path=best", *options, "--verbose=false"])
    assert (folder / "best.npz").exists()


def test_a_wrong_layer_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["analyze", *CONFIG, "--layerwise=[net.fc7]"])
    assert stop.value.code == 2
    assert "`layerwise` names 'net.fc7'" in capsys.readouterr().err
