"""Two processes share clients and evaluation, and end with the bits of one."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from fedlight.run.checkpoint import load_checkpoint
from fedlight.run.processes import lost_process, raised_in
from tests.helpers import processes
from tests.helpers.runif import RunIf

pytestmark = RunIf(linux=True)


def start(folder, *command):
    """Run a module; its exit code, its errors, and what each process saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", *command]
    with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as process:
        try:
            errors = process.communicate(timeout=240)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    saved = [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1) if (folder / f"rank{rank}.pt").exists()]
    return process.returncode, errors, saved


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    threads = torch.get_num_threads()
    found = processes.everything(tmp_path_factory.mktemp("one"), 1)
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    code, errors, saved = start(folder, *torchrun, "-m", "tests.helpers.processes", str(folder))
    assert code == 0, errors
    return folder, saved


@pytest.mark.parametrize("case", processes.CASES)
def test_two_processes_end_with_the_bits_of_one(one, two, case):
    expected = one[case]
    assert expected["world"] == 1
    for rank, found in enumerate(two[1]):
        found = found[case]
        assert found["world"] == 2
        assert torch.equal(found["weights"], expected["weights"])
        assert found["views"].keys() == expected["views"].keys()
        assert all(torch.equal(found["views"][view], params) for view, params in expected["views"].items())
        assert found["left out"] == (expected["left out"] if rank == 0 else [])
        assert len(found["predicted"]) == len(expected["predicted"]) == 3
        assert all(map(torch.equal, found["predicted"], expected["predicted"]))
    rows = two[1][0][case]["rows"]
    assert len(rows) == len(expected["rows"])
    for row, other in zip(rows, expected["rows"], strict=True):
        assert row.keys() == other.keys()
        # What torchmetrics computes itself is summed in another order.
        # A client whose loss is infinite makes a standard deviation of NaN.
        different = {k for k in row if row[k] != other[k] and not (math.isnan(row[k]) and math.isnan(other[k]))}
        assert different <= {"val/mse", "val/mse_selected", "val/mse_all"}
        assert all(row[k] == pytest.approx(other[k], rel=1e-5) for k in different)
    assert two[1][0][case]["tested"] == two[1][1][case]["tested"] == expected["tested"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_more_processes_end_with_the_bits_of_one(one, tmp_path, world):
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(world))
    code, errors, saved = start(tmp_path, *torchrun, "-m", "tests.helpers.processes", str(tmp_path), "many")
    assert code == 0, errors
    for case in processes.MANY:
        for found in saved:
            assert found[case]["world"] == world
            assert torch.equal(found[case]["weights"], one[case]["weights"])
            assert found[case]["views"].keys() == one[case]["views"].keys()
            assert all(torch.equal(v, one[case]["views"][k]) for k, v in found[case]["views"].items())
        assert saved[0][case]["clients"] == one[case]["clients"]


def test_a_client_that_diverges_is_left_out(one, two):
    assert len(one["a client diverges"]["left out"]) == 3
    assert "left out clients [1]" in two[1][0]["a client diverges"]["left out"][0]


def test_when_all_diverge_every_process_stops(one, two):
    assert one["fails"] == two[1][0]["fails"] == two[1][1]["fails"]
    assert "the update of every client ([0, 1]) is NaN or infinite" in one["fails"]


def test_a_signal_to_one_process_stops_all_after_the_same_round(two):
    folder, (first, second) = two
    assert first["stopped"] == 143
    assert second["stopped"] == 0  # launchers kill everyone when another process than the first one fails
    assert load_checkpoint(folder / "stopped" / "version_0" / "checkpoints" / "last.ckpt")["epoch"] == 2


@pytest.mark.parametrize("case", processes.CASES)
def test_a_row_is_kept_once_and_is_that_of_one_process(one, two, case):
    expected, (first, second) = one[case]["kept"], (found[case]["kept"] for found in two[1])
    assert not first.keys() & second.keys()
    found = first | second
    assert found.keys() == expected.keys()
    assert bool(second) == (case not in ("perturbed", "one client, so one process is idle"))
    for client, row in expected.items():
        assert row.keys() == found[client].keys()
        for part, state in row.items():
            assert state.keys() == found[client][part].keys()
            assert all(torch.equal(value, found[client][part][name]) for name, value in state.items())


@pytest.mark.parametrize("case", ["local statistics and state on disk", "all kinds of metrics"])
def test_a_run_of_two_processes_goes_on_in_one(one, two, tmp_path, case):
    """Whose checkpoint has the rows of both; on disk, each has files of its own."""
    shutil.copytree(two[0] / case, tmp_path / case)
    if "disk" in case:
        assert {p.name for p in (tmp_path / case / "version_0" / "clients").iterdir()} == {"rank0", "rank1"}
    found = processes.outcome(case, tmp_path, 1, more=1)
    expected = processes.outcome(case, tmp_path / "one", 1, more=1)
    assert torch.equal(found["weights"], expected["weights"])
    assert all(torch.equal(found["views"][view], params) for view, params in expected["views"].items())
    assert found["kept"].keys() == expected["kept"].keys()


@pytest.mark.slow
def test_fabric_starts_the_second_process(one, tmp_path):
    """``devices: 2`` in one script that trains, tests, and trains again until it is told to stop."""
    code, errors, saved = start(tmp_path, "tests.helpers.processes", str(tmp_path), "launch")
    assert code == 143, errors
    expected = one["all kinds of metrics"]
    for found in saved:
        assert found["world"] == 2
        assert torch.equal(found["weights"], expected["weights"])
        assert found["tested"] == expected["tested"]
    assert len(saved) == 2
    assert load_checkpoint(tmp_path / "stopped" / "version_0" / "checkpoints" / "last.ckpt")["epoch"] == 2


class Lost(Callback):
    """The second process is killed, or fails, in the third round; or the first one is killed."""

    def __init__(self, how: str = "kill", rank: int = 1) -> None:
        self.how, self.rank = how, rank

    def on_client_end(self, trainer, pl_module, client):
        if trainer.current_round == 2 and trainer.global_rank == self.rank:
            last, end = trainer.run_dir / "checkpoints" / "last.ckpt", time.monotonic() + 60
            while not last.exists() and time.monotonic() < end:  # it is written while training goes on
                time.sleep(0.01)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("mine")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "rank", "said"),
    [
        ("kill", 1, r"process 1 of 2 \(pid \d+\) was killed by SIGKILL, perhaps for its memory. This one, process 0,"),
        ("raise", 1, r"process 1 of 2 \(pid \d+\) has ended with exit code 1; what it said is above"),
        ("kill", 0, r"another of the 2 processes has ended; if it said why, that is above. This one, process 1,"),
    ],
)
@pytest.mark.slow
def test_the_last_line_says_which_process_died_and_how_to_go_on(tmp_path, how, rank, said):
    words = ["--model=tests.helpers.tiny.Regression", "--data=tests.helpers.tiny.Clients"]
    words += ["--trainer.callbacks+=tests.test_processes.Lost", f"--trainer.callbacks.how={how}"]
    words += [f"--trainer.callbacks.rank={rank}", "--trainer.devices=2", "--trainer.accelerator=cpu"]
    words += ["--trainer.clients_per_round=4", f"--trainer.default_root_dir={tmp_path}"]
    code, errors, _ = start(tmp_path, "fedlight", "fit", *words)
    assert code == (1 if rank else -signal.SIGKILL)
    last = errors.splitlines()[-1]
    assert re.match(f"fedlight: error: {said}", last)
    assert last.endswith(f"continue with ckpt_path={tmp_path}/default/version_0/checkpoints/last.ckpt.")
    assert "gloo" not in errors.rpartition("All distributed processes registered")[2].partition("\n")[2]
    assert how == "kill" or "ZeroDivisionError: mine" in errors


def test_an_error_of_torch_distributed_is_replaced_and_no_other():
    session = SimpleNamespace(fabric=SimpleNamespace(world_size=2, global_rank=1), folder=None)
    with pytest.raises(ValueError, match="Default process group") as theirs:
        torch.distributed.barrier()
    with pytest.raises(RuntimeError) as ours:
        raise RuntimeError("Connection closed by peer")
    assert raised_in(theirs.value).startswith("torch.distributed")
    assert lost_process(session, ours.value) is None
    lost = RuntimeError("Connection closed by peer").with_traceback(theirs.value.__traceback__)
    assert lost_process(session, lost).startswith("another of the 2 processes has ended;")
    assert lost_process(session, lost).endswith("there is no checkpoint yet.")
