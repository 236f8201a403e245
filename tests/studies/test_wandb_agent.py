"""The real ``wandb agent`` runs ``fedlight fit``, and the real ``wandb sync`` reads what the runs left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedlight.run.loggers import read_metrics
from tests.studies.wandb_server import WandbServer

REPOSITORY = Path(__file__).parents[2]
MAN = [{"class_path": "MAN", "init_args": {"zeta": 0.25, "layers": None}}]
SWEEP = {
    "method": "grid",
    "command": [
        *[sys.executable, "-m", "fedlight", "fit", "-c", "configs/quickstart.yaml"],
        *["--trainer.logger=wandb", "--data.limit_samples=200", "--trainer.enable_progress_bar=false", "${args}"],
    ],
    "parameters": {"seed_everything": {"values": [3, 4]}},
}


def sent(run: str, parameters: dict) -> dict:
    return {
        "type": "run",
        "run_id": run,
        "program": "fedlight",
        "args": {key: {"value": value} for key, value in parameters.items()},
    }


def wandb(arguments: list[str], server: WandbServer, folder: Path, **env: str) -> str:
    """Run wandb's command line; its output."""
    program = [sys.executable, "-m", "wandb", *arguments]
    settings = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "WANDB_DIR": str(folder), **env}
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **settings, "PYTHONPATH": path, "WANDB_CONFIG_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_wandb_sweep_and_its_agent_online(tmp_path):
    pytest.importorskip("wandb")
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP))
    short = {"trainer.default_root_dir": str(tmp_path), "trainer.max_rounds": 2, "trainer.name": "online"}
    with WandbServer(batches=[[sent("one", {"seed_everything": 3, **short})]]) as server:
        said = wandb(["sweep", "--project", "fedlight", str(path)], server, tmp_path)
        assert yaml.safe_load(server.sweep)["command"] == SWEEP["command"]
        assert "wandb agent me/fedlight/sweep" in said
        wandb(["agent", "me/fedlight/sweep"], server, tmp_path)
        run = server.runs["one"]
    (folder,) = tmp_path.glob("online/version_*")
    rows = read_metrics(folder / "metrics.csv")
    assert [row["val/accuracy"] for row in run.history if "val/accuracy" in row] == [r["val/accuracy"] for r in rows]
    assert (run.fields["sweep"], run.fields["groupName"], run.exit_code) == ("sweep", "online", 0)
    assert run.summary["best/val/accuracy"] == max(row["val/accuracy"] for row in rows)
    assert run.config["trainer.max_rounds"] == 2


@pytest.mark.slow
def test_three_runs_of_a_sweep(tmp_path):
    pytest.importorskip("wandb")
    short = {"trainer.default_root_dir": str(tmp_path), "trainer.max_rounds": 2}
    batch = [
        sent("one", {"seed_everything": 3, "trainer.callbacks": None, "trainer.name": "shared", **short}),
        sent(
            "two",
            {
                "algorithm": "configs/algorithm/feddyn.yaml",
                "algorithm.alpha": 0.25,
                "data.partitioner": "IID",
                "seed_everything": 4,
                "trainer.callbacks": MAN,
                "trainer.deterministic": True,
                "trainer.views": ["server", "all"],
                **short,
                "trainer.name": "shared",
            },
        ),
        sent("three", {"perturbation": "SAM", **short, "trainer.max_rounds": 100000, "trainer.name": "three"}),
    ]
    with WandbServer(yaml.safe_dump(SWEEP), [batch]) as server:
        stopped = tmp_path / "three" / "version_0"
        server.stop_when["three"] = lambda: (stopped / "checkpoints" / "last.ckpt").exists()
        said = wandb(["agent", "me/fedlight/sweep"], server, tmp_path, WANDB_MODE="offline")
        assert {"one", "two", "three"} in server.alive
        folders = {path.name.rsplit("-", 1)[1]: path for path in tmp_path.glob("*/version_*/wandb/offline-run-*")}
        assert set(folders) == {"one", "two", "three"}, said
        for folder in folders.values():
            wandb(["sync", str(folder)], server, tmp_path)
        runs = server.runs

    # Every argument has arrived.
    configs = {name: yaml.safe_load((path.parents[1] / "config.yaml").read_text()) for name, path in folders.items()}
    assert configs["one"]["trainer"]["callbacks"] is None
    assert configs["one"]["seed_everything"] == 3
    two = configs["two"]
    assert two["algorithm"]["class_path"].endswith("FedDyn")
    assert two["algorithm"]["init_args"]["alpha"] == 0.25
    assert two["data"]["init_args"]["partitioner"]["class_path"].endswith("IID")
    assert two["trainer"]["callbacks"][0]["init_args"] == {"zeta": 0.25, "layers": None}
    assert (two["trainer"]["views"], two["trainer"]["deterministic"]) == (["server", "all"], True)

    # Group and name follow from the config; config and metrics against `round` are in W&B.
    groups = {name: run.fields["groupName"] for name, run in runs.items()}
    assert groups == {"one": "shared", "two": "shared", "three": "three"}
    shown = {name: run.fields["displayName"] for name, run in runs.items()}
    assert shown["three"] == "FedAvg+SAM+MAN-seed0-version_0"
    # Two runs of one name at the same time: each has a version of its own.
    versions = {name: folders[name].parents[1].name for name in ("one", "two")}
    assert set(versions.values()) == {"version_0", "version_1"}
    assert shown["one"] == f"FedAvg-seed3-{versions['one']}"
    assert shown["two"] == f"FedDyn+MAN-seed4-{versions['two']}"
    assert {run.fields["sweep"] for run in runs.values()} == {"sweep"}
    assert runs["two"].config["algorithm"] == "configs/algorithm/feddyn.yaml", "as the sweep has it"
    assert runs["two"].config["algorithm.init_args.alpha"] == 0.25
    assert runs["two"].config["trainer.max_rounds"] == 2
    for name in ("one", "two"):
        rows = read_metrics(folders[name].parents[1] / "metrics.csv")
        history = [row for row in runs[name].history if "val/accuracy" in row]
        assert [row["round"] for row in history] == [0, 1]
        assert [row["val/accuracy"] for row in history] == pytest.approx([row["val/accuracy"] for row in rows])
    assert any(name.startswith("media/images/partition") for name in runs["two"].files), "the picture of the partition"
    assert "round" in json.dumps(runs["two"].config["_wandb"]["m"])

    # The run that the agent stopped ended its round, and did not fail.
    assert not (stopped / "summary.json").exists()
    assert len(read_metrics(stopped / "metrics.csv")) >= 1
    assert {name: run.exit_code for name, run in runs.items()} == {"one": 0, "two": 0, "three": 0}
    assert "failed runs" not in said
