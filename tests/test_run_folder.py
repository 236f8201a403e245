"""Run folders: versions, locks, and files that are whole or not there."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.run_folder import RunFolder, atomic_write, versions
from tests.helpers.runif import RunIf
from tests.helpers.tiny import Clients, Regression, quiet_trainer


def test_new_runs_at_the_same_time_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: RunFolder.create(tmp_path, "run").path, range(40)))
    assert sorted(made) == sorted(tmp_path / "run" / f"version_{n}" for n in range(40))
    assert versions(tmp_path / "run") == list(range(40))


def test_versions_follow_the_highest_and_ignore_other_names(tmp_path):
    for name in ("version_2", "version_10", "version_x", "other"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "version_99").write_text("a file")
    assert versions(tmp_path / "run") == [2, 10]
    assert RunFolder.create(tmp_path, "run").path.name == "version_11"
    assert versions(tmp_path / "nothing") == []


def test_the_latest_run_is_the_newest_that_has_the_checkpoint(tmp_path):
    for n in (0, 1, 2):
        folder = RunFolder.create(tmp_path, "run")
        if n < 2:
            folder.checkpoint("last").touch()
    (tmp_path / "run" / "version_0" / "checkpoints" / "best.ckpt").touch()
    assert RunFolder.latest(tmp_path, "run", "last").path.name == "version_1"
    assert RunFolder.latest(tmp_path, "run", "best").path.name == "version_0"
    with pytest.raises(MisconfigurationException, match="Check trainer.default_root_dir and trainer.name"):
        RunFolder.latest(tmp_path, "other", "last")


@RunIf(linux=True)
def test_a_folder_is_one_runs_alone(tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True);"
        " input()"
    )
    command = [sys.executable, "-c", hold, str(folder.path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(MisconfigurationException, match="version_0 is in use by another run. Wait for it"):
            folder.lock()
        other.communicate("\n")
    folder.lock()
    assert (folder.path / ".lock").read_text() == f"{os.getpid()}\n"
    folder.unlock()
    folder.unlock()


def test_a_run_that_is_going_on_cannot_be_resumed_beside_itself(tmp_path):
    class Intruder(Regression):
        def on_round_end(self):
            if self.current_epoch == 2:
                other = quiet_trainer(tmp_path)
                with pytest.raises(MisconfigurationException, match="is in use by another run"):
                    other.fit(Regression(), Clients(), ckpt_path="last")

    # Every checkpoint is on disk before its round is over, so the intruder finds one.
    trainer = quiet_trainer(tmp_path, callbacks=[Checkpoint(max_overhead=1)])
    trainer.fit(Intruder(), Clients())
    assert trainer.current_round == 3
    assert (trainer.run_dir / "metrics.csv").read_text().count("\n") == 4
    quiet_trainer(tmp_path, max_rounds=4).fit(Regression(), Clients(), ckpt_path="last")  # now it can


def test_what_a_run_leaves_behind(tmp_path):
    trainer = quiet_trainer(tmp_path, name="mine", max_rounds=2)
    trainer.fit(Regression(), Clients())
    assert trainer.run_dir == tmp_path / "mine" / "version_0"
    names = {str(p.relative_to(trainer.run_dir)) for p in trainer.run_dir.rglob("*") if p.is_file()}
    assert names >= {"metrics.csv", "summary.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt"}
    summary = json.loads((trainer.run_dir / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert summary["final"]["round"] == 1
    assert summary["best"]["val/loss"].keys() == {"value", "round"}
    assert summary["best"]["val/loss"]["value"] <= summary["final"]["val/loss"]
    assert {"seed", "seconds", "versions", "algorithm", "parameters", "engine"} <= summary.keys()


def test_a_run_that_fails_before_its_first_round_leaves_no_folder(tmp_path):
    class Failing(Regression):
        def on_round_start(self):
            if self.current_epoch == self.at:
                raise KeyError("mine")

    for at, left in ((0, False), (1, True)):
        model = Failing()
        model.at = at
        trainer = quiet_trainer(tmp_path, name=f"at{at}")
        with pytest.raises(KeyError):
            trainer.fit(model, Clients())
        assert (tmp_path / f"at{at}" / "version_0").exists() == left
        assert (trainer.run_dir is not None) == left


def test_atomic_write_replaces_or_leaves(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="nothing"):
        atomic_write(tmp_path / "nothing" / "a.txt", b"")
