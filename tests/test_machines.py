"""Two machines: two launchers, each with a folder that the other does not see."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from tests.helpers import machines
from tests.helpers.runif import RunIf

pytestmark = [RunIf(linux=True), pytest.mark.slow]


def launch(folder, client_state, how):
    """Run on both machines; their exit codes, and the errors of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    script = "-m", "tests.helpers.machines"
    started = [
        subprocess.Popen(
            [
                *command,
                "--node_rank",
                str(rank),
                *script,
                str(folder / f"machine{rank}"),
                client_state,
                how,
                str(folder),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors[0]


@pytest.mark.parametrize("client_state", ["cpu", "disk"])
def test_two_machines_give_the_bits_of_one_also_after_one_was_lost(tmp_path, client_state):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = machines.train(tmp_path / "one", client_state, "whole", 1)
    torch.set_num_threads(threads)
    codes, errors = launch(tmp_path, client_state, "killed")
    assert codes[0] == 1
    assert codes[1] == -9
    last = tmp_path / "machine0" / "default" / "version_0" / "checkpoints" / "last.ckpt"
    assert f"continue with ckpt_path={last}" in errors
    assert torch.load(last, weights_only=True)["epoch"] == 3
    codes, errors = launch(tmp_path, client_state, "resumed")
    assert codes == [0, 0], errors
    assert not list((tmp_path / "machine1").rglob("*.ckpt"))
    first, second = (torch.load(tmp_path / f"resumed{rank}.pt") for rank in (0, 1))
    for found in (first, second):
        assert torch.equal(found["weights"], expected["weights"])
        assert torch.equal(found["all"], expected["all"])
    assert first["rows"]
    assert second["rows"]
    assert not first["rows"].keys() & second["rows"].keys()
    rows = first["rows"] | second["rows"]
    assert rows.keys() == expected["rows"].keys()
    assert all(torch.equal(value, rows[name]) for name, value in expected["rows"].items())
