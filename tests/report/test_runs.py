"""Reading run folders, whole or not."""

import fcntl
import json
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.report.groups import group_runs
from fedlight.report.naming import Method
from fedlight.report.runs import find_runs, read_run
from tests.report.folders import config, write_run


def test_a_finished_run(tmp_path):
    run = read_run(write_run(tmp_path / "version_0", [0.1, 0.4], config(seed=3)))
    assert (run.status, run.detail, run.seed, run.rounds) == ("finished", "", 3, 2)
    assert run.config["data.init_args.partitioner.init_args.alpha"] == 0.3
    assert run.last("val/accuracy") == 0.4
    assert run.last("none") is None
    assert run.series("val/accuracy") == {1: 0.1, 2: 0.4}
    assert run.total("comm/down_mb", "comm/up_mb") == 4.0
    assert run.total("none") is None


def _torn_config(path):
    (path / "config.yaml").write_text("trainer: {a: [")


def _torn_metrics(path):
    (path / "metrics.csv").write_text("round,val/accuracy\n0,abc\n1,2\n")


def _lost_row(path):
    lines = (path / "metrics.csv").read_text().splitlines()
    (path / "metrics.csv").write_text("\n".join([lines[0], lines[2], ""]))


def _foreign_config(path):
    (path / "config.yaml").write_text("trainer: {}\nmodel: {}\n")


def _torn_summary(path):
    (path / "summary.json").write_text('{"final": {"val')


@pytest.mark.parametrize(
    ("damage", "status", "detail"),
    [
        (_torn_config, "torn", "config.yaml cannot be read: expected the node content, but found '<st"),
        (_torn_metrics, "torn", "metrics.csv: lines 2 cannot be read"),
        (_torn_summary, "torn", "summary.json cannot be read: Unterminated string starting at: line 1 column 12 "),
        (lambda path: (path / "config.yaml").unlink(), "torn", "config.yaml is missing"),
        (lambda path: (path / "metrics.csv").unlink(), "torn", "metrics.csv has no rows"),
        (_lost_row, "torn", "metrics.csv lacks rows"),
        (lambda path: (path / "summary.json").unlink(), "interrupted", "2 of 3 rounds"),
        (
            lambda path: (path / "config.yaml").write_text("trainer: {}\nmodel: {}\n"),
            "foreign",
            "not written by fedlight",
        ),
    ],
)
def test_what_is_not_whole_is_shown_as_such(tmp_path, damage, status, detail):
    path = write_run(tmp_path / "version_0", [0.1, 0.4])
    damage(path)
    run = read_run(path)
    assert run.status == status
    assert detail in run.detail
    assert ("line 1 column" in run.detail) == ("cannot be read: " in detail)


def test_a_class_alone_is_one_without_settings(tmp_path):
    run = read_run(write_run(tmp_path / "version_0", [0.1], config() | {"algorithm": "FedAvg"}))
    assert Method(run.config).name == "FedAvg"


def test_a_torn_last_line_of_the_metrics_is_left_out(tmp_path):
    path = write_run(tmp_path / "version_0", [0.1, 0.4], finished=False)
    with (path / "metrics.csv").open("a") as file:
        file.write("2,0.")
    assert read_run(path).rounds == 2


def test_a_run_of_another_version(tmp_path):
    path = write_run(tmp_path / "version_0", [0.1])
    summary = json.loads((path / "summary.json").read_text())
    summary["versions"]["fedlight"] = "99.0.0"
    (path / "summary.json").write_text(json.dumps(summary))
    run = read_run(path)
    assert run.status == "finished"
    assert "written by fedlight 99.0.0" in run.detail


def test_a_run_that_is_still_training(tmp_path):
    path = write_run(tmp_path / "version_0", [0.1], finished=False)
    with (path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_run(path).status == "running"
    assert read_run(path).status == "interrupted"


def test_runs_are_found_wherever_they_are_and_once(tmp_path):
    for n in (0, 2, 10):
        write_run(tmp_path / "a" / f"version_{n}", [0.1])
    write_run(tmp_path / "deep" / "er" / "b" / "version_0", [0.1])
    (tmp_path / "a" / "wandb" / "files").mkdir(parents=True)
    runs = find_runs([tmp_path, tmp_path / "a", tmp_path / "a" / "version_2"])
    names = [str(run.path.relative_to(tmp_path)) for run in runs]
    assert names == ["a/version_0", "a/version_2", "a/version_10", "deep/er/b/version_0"]
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "a" / "best").symlink_to(tmp_path / "a" / "version_2")
    assert [run.path for run in find_runs([tmp_path])] == [run.path for run in runs]


def test_a_folder_of_another_user_is_listed_and_stops_nothing(tmp_path, monkeypatch):
    write_run(tmp_path / "a" / "version_0", [0.1])
    (tmp_path / "theirs").mkdir()
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "theirs":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    def is_file(path):
        if path.parent.name == "theirs":
            raise PermissionError(13, "Permission denied")
        return path.exists()

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(Path, "is_file", is_file)
    mine, theirs = find_runs([tmp_path])
    assert (mine.status, theirs.status) == ("finished", "torn")
    assert theirs.detail == "the folder cannot be read: Permission denied"


def test_a_studys_missing_and_failed_runs(tmp_path):
    study = tmp_path / "study"
    write_run(study / "one" / "version_0", [0.1], finished=False)
    write_run(study / "one" / "version_1", [0.2])
    write_run(study / "two" / "version_0", [0.2], finished=False)
    (study / "two" / "run.json").write_text(json.dumps({"status": "failed", "error": "exit code 1\nNaN everywhere"}))
    (study / "three").mkdir()
    (study / "three" / "run.json").write_text(json.dumps({"status": "failed", "error": "exit code 2\nbad key"}))
    plan = {"runs": [{"folder": name} for name in ("one", "two", "three", "four")]}
    (study / "study.json").write_text(json.dumps(plan))
    write_run(study / "by hand" / "version_0", [0.3])
    runs = {run.path.relative_to(study).parts[0]: run for run in find_runs([tmp_path])}
    assert {name: run.status for name, run in runs.items()} == {
        "one": "finished",
        "two": "failed",
        "three": "failed",
        "four": "missing",
        "by hand": "finished",
    }
    assert runs["one"].last("val/accuracy") == 0.2
    assert runs["two"].detail == "exit code 1 — NaN everywhere"


def test_folders_without_runs(tmp_path):
    with pytest.raises(MisconfigurationException, match="There is no folder"):
        find_runs([tmp_path / "none"])
    with pytest.raises(MisconfigurationException, match="There is no run in or below"):
        find_runs([tmp_path])


def test_a_run_whose_settings_changed_is_no_run_of_a_setting(tmp_path):
    path = write_run(tmp_path / "version_0", [0.1, 0.4])
    write_run(tmp_path / "version_1", [0.1, 0.6])
    (path / "config_history").mkdir()
    changes = path / "config_history" / "changes.json"
    changes.write_text(json.dumps({"1": {"algorithm.mu": [0.1, 0.2], "trainer.callbacks": [["MAN"], []]}}))
    found = read_run(path)
    assert found.status == "changed"
    assert found.detail == "algorithm.mu from round 2: 0.1 -> 0.2; trainer.callbacks from round 2: ['MAN'] -> []"
    study = group_runs(find_runs([tmp_path]))
    assert [run.path.name for run in study.used] == ["version_1"]
    assert len(study.runs) == 2
    for damaged in ("", "{", "[]", '{"1": 3}', '{"1": {"a": 3}}'):
        changes.write_text(damaged)
        assert read_run(path).detail.startswith("config_history/changes.json cannot be read: ")
    path = write_run(tmp_path / "version_2", [0.1], finished=False)
    (path / "config_history").mkdir()
    (path / "config_history" / "changes.json").write_text(json.dumps({"1": {"algorithm.mu": [0.1, 0.2]}}))
    assert read_run(path).status == "interrupted"
