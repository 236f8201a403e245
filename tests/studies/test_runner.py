"""Studies on this machine: skip, resume, fail, share."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.studies.command import StudyRunner, main, selected
from fedlight.studies.plan import PlannedRun, RunSlot, log_tail, plan
from tests.studies.helpers import STUB, read, run, write_study


def folders(path: Path) -> list[Path]:
    return sorted(p for p in (path.parent / "runs" / "tiny").iterdir() if p.is_dir())


def rounds(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "rounds.txt").read_text().split()]


def result(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_every_run_trains_in_a_folder_of_its_own(tmp_path, capsys):
    path = write_study(tmp_path, {"algorithm": ["FedAvg", "FedDyn"], "seed_everything": [0, 1]})
    code, _ = run(path)
    assert code == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"study tiny: 4 runs, 0 finished before, 4 to do, in {tmp_path / 'runs' / 'tiny'}"
    assert [re.sub(r" in \d+ s", "", line) for line in said[1:]] == [
        "[1/4] FedAvg_seed0: finished, val/accuracy 0.5",
        "[2/4] FedAvg_seed1: finished, val/accuracy 0.5",
        "[3/4] FedDyn_seed0: finished, val/accuracy 0.5",
        "[4/4] FedDyn_seed1: finished, val/accuracy 0.5",
    ]
    assert [f.name.rsplit("-", 1)[0] for f in folders(path)] == [
        "FedAvg_seed0",
        "FedAvg_seed1",
        "FedDyn_seed0",
        "FedDyn_seed1",
    ]
    options = json.loads((folders(path)[3] / "version_0" / "config.yaml").read_text())
    assert (options["algorithm"], options["seed_everything"]) == ("FedDyn", "1")
    assert result(folders(path)[3])["status"] == "finished"
    assert result(folders(path)[3])["parameters"] == {"algorithm": "FedDyn", "seed_everything": 1}


def test_what_is_finished_is_skipped_and_what_is_new_is_run(tmp_path, capsys):
    path = write_study(tmp_path, {"seed_everything": [0, 1]})
    assert run(path)[0] == 0
    assert run(path)[0] == 0
    assert "2 runs, 2 finished before, 0 to do" in capsys.readouterr().out
    assert [rounds(f) for f in folders(path)] == [[0, 1], [0, 1]]
    path = write_study(tmp_path, {"seed_everything": [0, 1, 2]})
    assert run(path)[0] == 0
    assert "3 runs, 2 finished before, 1 to do" in capsys.readouterr().out
    assert [rounds(f) for f in folders(path)] == [[0, 1], [0, 1], [0, 1]]


def test_a_configuration_that_was_changed_after_a_run_is_named(tmp_path, capsys):
    base = tmp_path / "base.yaml"
    base.write_text("")
    command = [sys.executable, str(STUB), "fit", f"--config={base}", "${args}"]
    path = write_study(tmp_path, {"seed_everything": [0, 1]}, command=command)
    assert [run(path)[0], run(path)[0]] == [0, 0]
    assert "written after" not in capsys.readouterr().out
    os.utime(base, (time.time() + 9, time.time() + 9))
    assert run(path)[0] == 0
    assert f"{base}: written after 2 finished runs began, which stay as they are." in capsys.readouterr().out


def test_a_parameter_that_begins_to_vary_makes_no_other_runs_of_those_there_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for lrs, state in (([1], "2 runs, 0 finished"), ([1, 2], "4 runs, 2 finished"), ([2], "2 runs, 2 finished")):
        assert main([str(write_study(tmp_path, {"lr": lrs, "seed_everything": [0, 1]}))]) == 0
        assert state in capsys.readouterr().out
    assert len(folders(tmp_path / "tiny.yaml")) == 4


def test_a_report_knows_of_runs_that_are_left_out_later(tmp_path):
    path = write_study(tmp_path, {"seed_everything": [0, 1]})
    run(path)
    study, runs = read(path)
    for fewer in (selected(runs, ["seed_everything=1"]), read(write_study(tmp_path, {"seed_everything": [1, 2]}))[1]):
        StudyRunner(study, fewer, tmp_path / "runs").run()
        kept = json.loads((tmp_path / "runs" / "tiny" / "study.json").read_text())["runs"]
        assert {entry["folder"] for entry in kept} == {r.name for r in [*runs, *fewer]}
    assert len(kept) == 3


def test_runs_are_chosen_by_values_that_are_no_yaml():
    runs = [PlannedRun({"layer": value}, value, value) for value in ("*.weight", "[a-z]: x")]
    assert selected(runs, ["layer=*.weight"]) == runs[:1]
    with pytest.raises(MisconfigurationException, match="no run with layer=@"):
        selected(runs, ["layer=@"])


def test_another_setting_of_the_command_is_another_run(tmp_path):
    path = write_study(tmp_path, {"seed_everything": [0]})
    before = read(path)[1]
    path = write_study(tmp_path, {"seed_everything": [0]}, program="other")
    assert before[0].name != read(path)[1][0].name
    assert before[0].name == plan(read(write_study(tmp_path, {"seed_everything": [0]}))[0])[0].name


def test_failures_are_listed_and_do_not_stop_the_rest(tmp_path, capsys):
    path = write_study(tmp_path, {"fail": [True, False], "seed_everything": [0, 1]})
    code, runner = run(path)
    assert code == 1
    assert len(runner.failed) == 2
    said = capsys.readouterr().out
    assert "[1/4] fail-true_seed0: FAILED: exit code 1" in said
    assert re.search(r"\[4/4\] fail-false_seed1: finished in \d+ s", said)
    assert said.count("FloatingPointError: the update of every client is NaN") == 2
    failed = [f for f in folders(path) if f.name.startswith("fail-true")]
    assert result(failed[0])["status"] == "failed"
    assert "FloatingPointError" in result(failed[0])["error"]
    # The same command tries again, from the last checkpoint.
    assert run(path)[0] == 1
    assert rounds(failed[0]) == [0, 1, 1]


def test_bad_input_says_what_the_parser_said(tmp_path, capsys):
    path = write_study(tmp_path, {"unknown": [1]})
    assert run(path)[0] == 1
    assert "did you mean 'known'" in capsys.readouterr().out


def test_a_command_that_does_not_exist(tmp_path, capsys):
    path = write_study(tmp_path, {"seed_everything": [0]}, command=["/no/such/program", "fit", "${args}"])
    assert run(path)[0] == 1
    assert "/no/such/program cannot be started: No such file or directory" in capsys.readouterr().out


def test_jobs_train_at_the_same_time_and_share_the_cores(tmp_path, monkeypatch):
    path = write_study(tmp_path, {"seed_everything": [0, 1, 2], "round_s": {"value": 0.2}})
    study, runs = read(path)
    runner = StudyRunner(study, runs, tmp_path / "runs", jobs=2)
    most = []
    begin = runner._begin

    def counted(*args):
        begin(*args)
        most.append(len(runner._active))

    monkeypatch.setattr(runner, "_begin", counted)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("fedlight.run.processes.available_cores", lambda: 8)
    assert runner.run() == 0
    assert max(most) == 2
    assert [runner._environment(job)["CUDA_VISIBLE_DEVICES"] for job in (0, 1)] == ["3", "5"]
    assert runner._environment(0)["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert runner._environment(0)["OMP_NUM_THREADS"] == "1"


def test_ctrl_c_lets_the_round_end_and_the_same_command_goes_on(tmp_path, capsys):
    path = write_study(tmp_path, {"seed_everything": [0, 1], "rounds": {"value": 4}, "round_s": {"value": 0.25}})
    log = tmp_path / "runs" / "tiny"

    def interrupt():
        while not list(log.glob("*/rounds.txt")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, _ = run(path)
    thread.join()
    assert code == 130
    said = capsys.readouterr().out
    assert "1 runs end their round; Ctrl-C again" in said
    assert "the same command goes on from here" in said
    (first,) = folders(path)
    assert result(first)["status"] == "interrupted"
    done = len(rounds(first))
    assert done < 4
    assert run(path)[0] == 0
    assert rounds(first) == list(range(4)), "no round was trained twice"
    assert [p.name for p in first.glob("version_*")] == ["version_0"]


@pytest.fixture
def killed_study(tmp_path):
    """A study whose process was killed by kill -9 while a run was training; the run lives on."""
    path = write_study(tmp_path, {"seed_everything": [0, 1], "rounds": {"value": 8}, "round_s": {"value": 0.25}})
    program = "import sys; from tests.studies.helpers import run; from pathlib import Path; run(Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=Path(__file__).parents[2])
    try:
        while not any(f.read_text().count("\n") > 1 for f in (tmp_path / "runs" / "tiny").glob("*/rounds.txt")):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    return path


@pytest.mark.slow
def test_after_kill_9_no_run_is_trained_twice(killed_study, capsys):
    """The run outlived its study: the next study waits for it instead of beginning it again."""
    assert run(killed_study)[0] == 0
    said = capsys.readouterr().out
    assert "finished by another process" in said
    assert [rounds(f) for f in folders(killed_study)] == [list(range(8))] * 2


@pytest.mark.slow
def test_after_kill_9_of_all_an_interrupted_run_resumes(killed_study, capsys):
    (first,) = folders(killed_study)
    os.kill(result(first)["pid"], signal.SIGKILL)
    done = len(rounds(first))
    assert done < 8
    assert run(killed_study)[0] == 0
    again = rounds(first)
    assert again[done:][0] >= done - 1, "it went on from its checkpoint"
    assert again[-1] == 7
    assert [p.name for p in first.glob("version_*")] == ["version_0"]


def test_two_studies_share_a_folder(tmp_path):
    path = write_study(tmp_path, {"seed_everything": [0]})
    _, runs = read(path)
    one, two = (RunSlot(runs[0], tmp_path) for _ in range(2))
    assert one.take() is not None
    assert two.take() is None
    one.release()
    assert two.take() is not None
    two.release()


def test_the_end_of_a_log(tmp_path):
    log = tmp_path / "output.log"
    log.write_text("Traceback:\n  File x\nValueError: first\nmore\nerror: Parser key 'a':\n  wrong\n'a' is not known\n")
    assert log_tail(log) == "error: Parser key 'a':\n  wrong\n'a' is not known"
    log.write_text("fine\nlast words\n\n")
    assert log_tail(log) == "last words"
    assert log_tail(tmp_path / "none") == ""


def test_only_the_newest_version_of_a_run_is_continued(tmp_path):
    slot = RunSlot(PlannedRun({}, "run", "run"), tmp_path)
    assert not slot.resumable()
    (tmp_path / "run" / "version_0" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt").touch()
    (tmp_path / "run" / "version_0" / "summary.json").write_text('{"final": {}}')
    assert slot.resumable()
    assert slot.summary() == {"final": {}}
    (tmp_path / "run" / "version_1").mkdir()  # the report counts the newest, too
    assert not slot.resumable()
    assert slot.summary() is None
