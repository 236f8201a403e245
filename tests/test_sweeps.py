"""Every YAML in sweeps/ is one that W&B takes, and the commands that an agent makes of it run."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

from fedlight.cli.command import FederatedCLI
from fedlight.run.loggers import read_metrics

REPOSITORY = Path(__file__).parents[1]
SWEEPS = sorted((REPOSITORY / "sweeps").glob("*.yaml"), key=lambda path: path.stem)
QUICK = ["--trainer.max_rounds=1", "--trainer.limit_train_batches=1", "--trainer.enable_progress_bar=false"]


def first_command(sweep):
    """The command line of an agent's first run, with the flags that wandb itself makes of the parameters."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    first = {name: {"value": p["value"] if "value" in p else p["values"][0]} for name, p in sweep["parameters"].items()}
    flags = utils.create_sweep_command_args({"args": first})["args"]
    return [flag for word in sweep["command"] for flag in (flags if word == "${args}" else [word])]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_it_fits_the_schema_of_wandb(path):
    jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
    package = importlib.util.find_spec("sweeps")
    if package is None:
        pytest.skip("wandb's sweep schema is in its package `sweeps`: pip install --no-deps sweeps")
    schema = json.loads((Path(package.submodule_search_locations[0]) / "config" / "schema.json").read_text())
    sweep = yaml.safe_load(path.read_text())
    jsonschema.Draft7Validator(schema).validate(sweep)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate({**sweep, "method": "gird"})


@pytest.mark.parametrize("name", ["man_zeta", "methods"])
def test_the_command_of_an_agent_runs_to_its_end(name, tmp_path, monkeypatch, request):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    request.addfinalizer(lambda: sys.modules["wandb"].teardown())
    sweep = yaml.safe_load((REPOSITORY / "sweeps" / f"{name}.yaml").read_text())
    command = first_command(sweep)
    assert command[:2] == ["fedlight", "fit"]
    FederatedCLI([*command[1:], *QUICK, f"--trainer.default_root_dir={tmp_path}"])
    folder = tmp_path / name / "version_0"
    assert len(read_metrics(folder / "metrics.csv")) == 1
    assert list(folder.rglob("*.wandb"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["name"] == name
