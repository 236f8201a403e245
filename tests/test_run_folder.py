"""Run folders: versions, locks, and files that are whole or not there."""

import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler

from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.data.sources import download_source, load_source
from fedlight.data.tables import read_tables
from fedlight.run.folder import RunFolder, atomic_write, versions, writing
from tests.helpers.runif import RunIf
from tests.helpers.tiny import Clients, Regression, quiet_trainer


def test_new_runs_at_the_same_time_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: RunFolder.create(tmp_path, "run").path, range(40)))
    assert sorted(made) == sorted(tmp_path / "run" / f"version_{n}" for n in range(40))
    assert versions(tmp_path / "run") == list(range(40))


def test_a_home_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trainer = quiet_trainer("~/runs", max_rounds=1)
    trainer.fit(Regression(), Clients())
    assert trainer.run_dir == tmp_path / "runs" / "default" / "version_0"
    trainer.validate(Regression(), Clients(), ckpt_path="~/runs/default/version_0/checkpoints/last.ckpt")
    trainer.export(Regression(), Clients(), ckpt_path="last", to="~/model.pt")
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (
            lambda trainer: trainer.validate(Regression(), Clients(), ckpt_path="$RUNS/last.ckpt"),
            "ckpt_path='.RUNS/last.ckpt'",
        ),
        (lambda trainer: trainer.export(Regression(), Clients(), to="$OUT/model.pt"), "to='.OUT/model.pt'"),
        (lambda trainer: trainer.predict(Regression(), Clients(), output="${OUT}"), "output='..OUT}'"),
        (lambda trainer: load_source("$DATA/x.npz", "data"), "data.source='.DATA/x.npz'"),
        (lambda trainer: read_tables("$DATA/x.csv"), "data.source='.DATA/x.csv'"),
        (lambda trainer: download_source("cifar10", "$DATA"), "data.root='.DATA'"),
    ],
)
def test_variables_of_a_shell_are_refused_in_every_path(tmp_path, monkeypatch, call, key):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MisconfigurationException, match=f"{key}: .VARIABLES are replaced by shells, not in files"):
        call(quiet_trainer(tmp_path))
    assert not list(tmp_path.glob("*$*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logger": CSVLogger("~/logs")}, "trainer.logger: CSVLogger writes to '~/logs'"),
        ({"logger": [CSVLogger("$LOGS/x")]}, "trainer.logger: CSVLogger writes to '.LOGS/x'"),
        ({"profiler": SimpleProfiler("~/profile")}, "trainer.profiler: SimpleProfiler writes to '~/profile'"),
    ],
)
def test_folders_of_loggers_and_profilers_are_looked_at(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MisconfigurationException, match=message):
        quiet_trainer(tmp_path, **settings).fit(Regression(), Clients())
    assert not list(tmp_path.iterdir())


def test_what_torch_says_of_a_full_disk_is_said_in_words(tmp_path):
    said = "[enforce fail at inline_container.cc:672] . unexpected pos 282624 vs 282528"
    with pytest.raises(MisconfigurationException, match="the disk is full"), writing(tmp_path):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="another"), writing(tmp_path):
        raise RuntimeError("another")


def test_versions_follow_the_highest_and_ignore_other_names(tmp_path):
    for name in ("version_2", "version_10", "version_x", "other"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "version_99").write_text("a file")
    assert versions(tmp_path / "run") == [2, 10]
    assert RunFolder.create(tmp_path, "run").path.name == "version_11"
    assert versions(tmp_path / "nothing") == []


def held(tmp_path, *names):
    """The next version, with these checkpoints."""
    folder = RunFolder.create(tmp_path, "run")
    for name in names:
        folder.checkpoint(name).parent.mkdir(exist_ok=True)
        folder.checkpoint(name).touch()
    return folder


def test_the_newest_run_is_meant_and_an_older_one_never_taken_in_its_place(tmp_path):
    held(tmp_path, "last", "best")
    held(tmp_path, "last")
    assert RunFolder.newest(tmp_path, "run", "last").path.name == "version_1"
    with pytest.raises(MisconfigurationException) as error:
        RunFolder.newest(tmp_path, "run", "best")
    assert str(error.value) == (
        f"ckpt_path='best': the newest run, {tmp_path}/run/version_1, has no checkpoint of that name. It has"
        f" ckpt_path={tmp_path}/run/version_1/checkpoints/last.ckpt. The newest run that has one is another:"
        f" ckpt_path={tmp_path}/run/version_0/checkpoints/best.ckpt."
    )
    (tmp_path / "run" / "version_7").mkdir()  # versions may have gaps
    with pytest.raises(MisconfigurationException) as error:
        RunFolder.newest(tmp_path, "run", "last")
    assert str(error.value) == (
        f"ckpt_path='last': the newest run, {tmp_path}/run/version_7, has no checkpoint of that name. To begin it anew,"
        f" fit without ckpt_path. The newest run that has one is another:"
        f" ckpt_path={tmp_path}/run/version_1/checkpoints/last.ckpt."
    )
    own = tmp_path / "run" / "version_0"  # of a trainer that has trained: its own run is meant
    assert RunFolder.newest(tmp_path, "run", "best", own).path == own
    with pytest.raises(MisconfigurationException, match="the run of this trainer, .*version_7, has no .*/version_1/"):
        RunFolder.newest(tmp_path, "run", "last", tmp_path / "run" / "version_7")
    with pytest.raises(MisconfigurationException, match="Check trainer.default_root_dir and trainer.name"):
        RunFolder.newest(tmp_path, "other", "last")


def test_a_newest_run_that_is_still_training_is_named_as_such(tmp_path):
    held(tmp_path, "last")
    running = RunFolder.create(tmp_path, "run")
    running.lock()
    with pytest.raises(MisconfigurationException, match="version_1, has no checkpoint of that name yet; it is still"):
        RunFolder.newest(tmp_path, "run", "last")
    running.unlock()
    with pytest.raises(
        MisconfigurationException, match=r"version_1, has no checkpoint of that name\. To begin it anew"
    ):
        RunFolder.newest(tmp_path, "run", "last")


@pytest.mark.parametrize("command", ["fit", "validate", "test", "analyze"])
def test_no_command_takes_an_older_run_and_each_says_which_file_it_reads(tmp_path, caplog, command):
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")

    def run(rounds=4, **kwargs):
        trainer = quiet_trainer(tmp_path, max_rounds=rounds)
        settings = {"density": False, "trace": False, "top_k": 1} if command == "analyze" else {}
        settings |= {} if command == "fit" else {"verbose": False}
        getattr(trainer, command)(Regression(), Clients(), **settings, **kwargs)
        return trainer

    first = quiet_trainer(tmp_path, max_rounds=2)
    first.fit(Regression(), Clients())
    (tmp_path / "default" / "version_1").mkdir()  # killed before its first checkpoint
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    caplog.clear()
    with pytest.raises(MisconfigurationException, match="the newest run, .*version_1, has no checkpoint"):
        run(ckpt_path="last")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not caplog.messages
    path = first.run_dir / "checkpoints" / "last.ckpt"
    run(ckpt_path=path)
    said = f"Continuing {path} after round 2." if command == "fit" else f"Reading {path}, written after 2 rounds."
    assert caplog.messages[: 1 if command == "fit" else None] == [said]


def test_a_trainer_that_has_trained_means_its_own_run(tmp_path):
    trainer = quiet_trainer(tmp_path, max_rounds=1)
    trainer.fit(Regression(), Clients())
    quiet_trainer(tmp_path, max_rounds=2).fit(Regression(), Clients())
    trainer.test(Regression(), Clients(), ckpt_path="best", verbose=False)
    assert trainer.current_round == 1
    trainer.max_rounds = 3
    trainer.fit(Regression(), Clients(), ckpt_path="last")
    assert trainer.run_dir == tmp_path / "default" / "version_0"


def test_a_run_that_is_finished_stays_as_it_is(tmp_path, caplog):
    trainer = quiet_trainer(tmp_path, max_rounds=2)
    trainer.fit(Regression(), Clients())
    before = {p: p.read_bytes() for p in trainer.run_dir.rglob("*") if p.name != ".lock" and p.is_file()}
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    for rounds in (2, 1):
        quiet_trainer(tmp_path, max_rounds=rounds).fit(Regression(), Clients(), ckpt_path="last")
        assert f"after round 2: the run is finished, as trainer.max_rounds={rounds}." in caplog.text
        assert {p: p.read_bytes() for p in before} == before
    (trainer.run_dir / "summary.json").unlink()  # it was killed before its last line was written
    quiet_trainer(tmp_path, max_rounds=2).fit(Regression(), Clients(), ckpt_path="last")
    assert json.loads((trainer.run_dir / "summary.json").read_text())["rounds"] == 2


def test_what_is_trained_again_is_said(tmp_path, caplog):
    class Worse(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", float(self.current_epoch))

    quiet_trainer(tmp_path, max_rounds=5).fit(Worse(), Clients())
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    quiet_trainer(tmp_path, max_rounds=5).fit(Worse(), Clients(), ckpt_path="best")
    said = [m for m in caplog.messages if m.startswith("Continuing")]
    assert "best.ckpt after round 1; 4 later rounds in its folder are trained again." in said[0]


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
    quiet_trainer(tmp_path, max_rounds=4).fit(Intruder(), Clients(), ckpt_path="last")  # now it can


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


def test_a_failed_start_takes_back_the_folders_that_were_made_for_it(tmp_path):
    class Writing(Callback):
        def on_fit_start(self, trainer, pl_module):
            (trainer.run_dir / "tensorboard").mkdir()
            (trainer.run_dir / "tensorboard" / "events").write_text("one")
            raise KeyError("mine")

    def fail(folder, name):
        with pytest.raises(KeyError):
            quiet_trainer(folder, name=name, callbacks=[Writing()]).fit(Regression(), Clients())

    fail(tmp_path / "runs" / "deep", "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine" / "name").mkdir(parents=True)  # what was there before stays
    fail(tmp_path / "mine", "name")
    fail(tmp_path / "mine", "other")
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "name"]
    trainer = quiet_trainer(tmp_path / "mine", name="name")
    trainer.fit(Regression(), Clients())
    fail(tmp_path / "mine", "name")
    assert versions(tmp_path / "mine" / "name") == [0]
    # A checkpoint that lies elsewhere begins a folder; it has a header of metrics before it has a round.
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes((trainer.run_dir / "checkpoints" / "last.ckpt").read_bytes())
    with pytest.raises(KeyError):
        quiet_trainer(tmp_path / "new", max_rounds=5, callbacks=[Writing()]).fit(Regression(), Clients(), copy)
    assert not (tmp_path / "new").exists()


def test_no_file_or_folder_is_empty(tmp_path):
    for name, settings in (("a", {}), ("b", {"enable_checkpointing": False, "client_state": "disk"})):
        trainer = quiet_trainer(tmp_path, name=name, **settings)
        trainer.fit(Regression(), Clients())
        for path in trainer.run_dir.rglob("*"):
            assert any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0, path
    trainer = quiet_trainer(tmp_path, name="c", profiler="simple")
    trainer.fit(Regression(), Clients())
    assert "training_step" in (trainer.run_dir / "fit-profile-0.txt").read_text()


def test_what_a_killed_run_was_writing_is_removed_by_the_next(tmp_path):
    trainer = quiet_trainer(tmp_path, max_rounds=1)
    trainer.fit(Regression(), Clients())
    torn = [trainer.run_dir / name for name in ("checkpoints/.last.ckpt.tmp", ".metrics.csv.tmp")]
    for fit in (
        lambda: quiet_trainer(tmp_path, max_rounds=2).fit(Regression(), Clients(), ckpt_path="last"),
        lambda: RunFolder.create(tmp_path, "default"),
    ):
        for path in torn:
            path.write_bytes(b"half")
        fit()
        assert not any(path.exists() for path in torn)
    folder = RunFolder(trainer.run_dir)
    folder.lock()  # a run that is alive is writing them
    torn[0].write_bytes(b"half")
    RunFolder.create(tmp_path, "default")
    assert torn[0].exists()
    folder.unlock()


@RunIf(linux=True)
def test_a_disk_without_room_for_a_byte_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(MisconfigurationException, match="trainer.default_root_dir: cannot write to "):
            RunFolder(tmp_path).lock()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_last_checkpoint_is_said_to_be_whole_where_there_is_one(tmp_path):
    class Diverging(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if self.current_epoch == self.at else 1)

    for at in (0, 1):
        model = Diverging()
        model.at = at
        with pytest.raises(FloatingPointError, match=f"round {at + 1}: the update of every client") as error:
            quiet_trainer(tmp_path, name=f"at{at}", callbacks=[Checkpoint(max_overhead=1)]).fit(model, Clients())
        path = tmp_path / f"at{at}" / "version_0" / "checkpoints" / "last.ckpt"
        assert str(error.value).endswith(f"The last checkpoint is whole: {path}") == (at == 1)
        assert ("whole" in str(error.value)) == (at == 1)


def test_atomic_write_replaces_or_leaves(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="nothing"):
        atomic_write(tmp_path / "nothing" / "a.txt", b"")
