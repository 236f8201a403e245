"""W&B online: runs, their continuations and artifacts, as a server of its API sees them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.models import MLP, Classifier
from tests.helpers.tiny import Clients, Regression, quiet_trainer, two_classes, weights
from tests.studies.wandb_server import WandbServer

ID = "w1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("online")


@pytest.fixture(scope="module")
def server(folder):
    """A server, and the environment that leads to it."""
    wandb = pytest.importorskip("wandb")
    with WandbServer() as server, pytest.MonkeyPatch.context() as patch:
        places = {f"WANDB_{kind}_DIR": str(folder / kind) for kind in ("CONFIG", "CACHE", "DATA", "ARTIFACT")}
        known = {
            "BASE_URL": server.url,
            "API_KEY": "0" * 40,
            "SILENT": "true",
            "CONSOLE": "off",
            "DISABLE_CODE": "true",
        }
        for key, value in {**places, **{f"WANDB_{key}": value for key, value in known.items()}}.items():
            patch.setenv(key, value)
        wandb.teardown()  # what earlier tests have set up is not asked again for its settings
        yield server
        wandb.teardown()


def fit(folder, rounds, log_model, ckpt_path=None, **settings):
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(log_model=log_model, **settings)
    trainer = quiet_trainer(folder, logger=logger, max_rounds=rounds, name="study", seed=3)
    torch.manual_seed(0)
    trainer.fit(Classifier(MLP(3, 2), 2), two_classes(), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture(scope="module")
def trained(server, folder):
    """Two rounds with tags and notes of the user, and a third one that continues them."""
    fit(folder, 2, True, id=ID, tags=["mine"], notes="a note")
    server.runs[ID].fields["displayName"] = "renamed by its user"
    return fit(folder, 3, "all", "last")


def test_a_run_has_its_names_and_metrics_and_is_continued(server, trained):
    run = server.runs[ID]
    assert set(server.runs) == {ID}
    assert [row["round"] for row in run.history if "train/loss" in row] == [0, 1, 2]
    fields = {key: run.fields[key] for key in ("project", "groupName", "displayName", "tags", "notes")}
    names = {"project": "fedlight", "groupName": "study", "displayName": "renamed by its user"}
    assert fields == {**names, "tags": ["mine"], "notes": "a note"}
    assert run.exit_code == 0


def test_the_summary_has_the_best_and_the_last_of_accuracy_and_loss(server, trained):
    run = server.runs[ID]
    rows = [row for row in run.history if "val/loss" in row]
    # W&B itself begins anew where a run is continued; what is below best/ is of the whole run.
    assert run.summary["val/accuracy"] == {"max": rows[2]["val/accuracy"], "last": rows[2]["val/accuracy"]}
    assert run.summary["val/loss"] == {"min": rows[2]["val/loss"], "last": rows[2]["val/loss"]}
    for name, best in (("val/accuracy", max), ("val/loss", min)):
        row = best(rows, key=lambda row: row[name])
        assert (run.summary[f"best/{name}"], run.summary[f"best/{name}_round"]) == (row[name], row["round"])
    assert run.summary["best/val/accuracy_round"] == 1, "not the last one"


def test_checkpoints_are_artifacts_with_aliases_and_metadata(server, trained):
    models = [artifact for artifact in server.artifacts if artifact["artifactType"]["name"] == "model"]
    versions = {alias: artifact for artifact in models for alias in artifact["names"]}
    assert {a["artifactSequence"]["name"] for a in models} == {f"model-{ID}"}
    assert {"latest", "last", "best", "round-2", "round-3"} <= set(versions)
    assert versions["last"] is versions["latest"] is versions["round-3"]
    about = json.loads(versions["last"]["metadata"])
    assert (about["rounds"], about["original_filename"]) == (3, "last.ckpt")
    assert about["score"] == pytest.approx(server.runs[ID].summary["val/accuracy"]["last"])
    assert about["Checkpoint"]["every_n_rounds"] == 1
    assert all(a["state"] == "COMMITTED" for a in server.artifacts)


@pytest.mark.slow  # W&B takes seconds to load what asks for artifacts
def test_an_artifact_is_a_ckpt_path(server, trained, folder):
    path = f"wandb:me/fedlight/model-{ID}:best"
    again = quiet_trainer(folder / "elsewhere")
    module = Classifier(MLP(3, 2), 2)
    (metrics,) = again.validate(module, two_classes(), ckpt_path=path, verbose=False)
    best = torch.load(trained.run_dir / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, best[name]) for name, value in module.state_dict().items())
    assert metrics["val/accuracy"] == pytest.approx(server.runs[ID].summary["best/val/accuracy"])
    file = next(Path(folder / "ARTIFACT").rglob("model.ckpt"))
    assert file.read_bytes() == (trained.run_dir / "checkpoints" / "best.ckpt").read_bytes()
    quick = {"top_k": 1, "trace": False, "density": False, "layerwise": False, "verbose": False}
    for command, options in ((again.test, {}), (again.predict, {}), (again.analyze, quick)):
        command(Classifier(MLP(3, 2), 2), two_classes(), ckpt_path=path, **options)
        assert again.current_round == 2
    further = quiet_trainer(folder / "further", seed=3)
    further.fit(Classifier(MLP(3, 2), 2), two_classes(), ckpt_path=path)
    assert torch.equal(weights(further.lightning_module), weights(trained.lightning_module)), "the same third round"


@pytest.mark.slow  # W&B takes seconds to load what asks for artifacts
def test_an_artifact_that_is_not_there(server, folder):
    with pytest.raises(MisconfigurationException, match="W&B gives no artifact 'me/fedlight/model-x:best' .*not found"):
        quiet_trainer(folder).validate(Regression(), two_classes(), ckpt_path="wandb:me/fedlight/model-x:best")


@pytest.mark.slow
def test_parts_of_a_run_that_was_offline_are_sent_together(server, folder):
    from lightning.pytorch.loggers import WandbLogger

    for rounds, ckpt_path in ((2, None), (3, "last")):
        trainer = quiet_trainer(folder / "offline", logger=WandbLogger(mode="offline"), max_rounds=rounds)
        trainer.fit(Regression(), Clients(), ckpt_path=ckpt_path)
    parts = sorted(str(path) for path in (trainer.run_dir / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (run for id, run in server.runs.items() if id != ID)
    assert [row["round"] for row in run.history if "train/loss" in row] == [0, 1, 2]
    assert run.fields["displayName"] == "FedAvg-seed0-version_0"
