"""Real ``fedlight`` processes: a study that is killed and resumed, and W&B that cannot be reached."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fedlight.cli.command import main as fedlight
from fedlight.run.loggers import read_metrics
from fedlight.studies.command import main as run_study

REPOSITORY = Path(__file__).parents[2]
FIT = ["-c", str(REPOSITORY / "configs" / "quickstart.yaml"), "--data.limit_samples=200", "--trainer.max_rounds=12"]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run without what depends on the clock."""
    rows = read_metrics(folder / "version_0" / "metrics.csv")
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


@pytest.mark.slow
def test_a_study_that_is_killed_ends_with_the_same_numbers(tmp_path, monkeypatch):
    study = tmp_path / "study.yaml"
    parameters = {"algorithm": {"value": "SCAFFOLD"}, "trainer.callbacks": {"value": [{"class_path": "MAN"}]}}
    content = {"method": "grid", "command": ["fedlight", "fit", *FIT, "${args}"], "parameters": parameters}
    study.write_text(yaml.safe_dump(content))
    program = [sys.executable, "-m", "fedlight", "study", str(study), "--root", str(tmp_path)]
    process = subprocess.Popen(program, env=environment(), process_group=0)
    try:
        while not any(len(read_metrics(path)) > 2 for path in tmp_path.glob("study/*/version_0/metrics.csv")):
            assert process.poll() is None
            time.sleep(0.02)
        (folder,) = (path.parent for path in tmp_path.glob("study/*/run.json"))
        pid = int(yaml.safe_load((folder / "run.json").read_text())["pid"])
    finally:
        process.kill()
        process.wait()
    os.kill(pid, signal.SIGKILL)
    assert not (folder / "version_0" / "summary.json").exists()

    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_study([str(study), "--root", str(tmp_path)]) == 0
    assert "--ckpt_path=last" in (folder / "output.log").read_text()
    resumed = metrics(folder)
    assert [row["round"] for row in resumed] == list(range(12))
    where = [f"--trainer.default_root_dir={tmp_path}", "--trainer.name=whole", "--trainer.enable_progress_bar=false"]
    fedlight(["fit", *FIT, "--algorithm=SCAFFOLD", "--trainer.callbacks=[{'class_path': 'MAN'}]", *where])
    assert resumed == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_offline_where_wandb_cannot_be_reached(tmp_path):
    wandb = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "1"}
    ours = ["--trainer.logger=wandb", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_rounds=1"]
    program = [sys.executable, "-m", "fedlight", "fit", *FIT, *ours]
    done = subprocess.run(program, env=environment(**wandb), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("quickstart/version_0/wandb/offline-run-*")
    said = " ".join(done.stderr.split())
    assert "W&B cannot be reached" in said
    assert f"To upload it later: wandb sync {folder}" in said
    assert (folder.parents[1] / "summary.json").exists()
    assert list(folder.glob("*.wandb"))
