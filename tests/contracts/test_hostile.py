"""Aggregators and attacks give the same bits in two processes as in one, and after an interruption."""

import os
import subprocess
import sys

import pytest
import torch

from tests.contracts.hostile import CASES, run
from tests.contracts.test_contracts import REPOSITORY, _one_thread, assert_same_bits  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.contracts.hostile", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_and_a_resume_give_the_same_bits(name, in_two_processes, tmp_path):
    whole = run(name, tmp_path)[1]
    first, second = (found[name] for found in in_two_processes)
    assert all(torch.equal(first[k], second[k]) for k in first.keys() & second.keys())
    assert_same_bits({**first, **second}, whole)
    half, _ = run(name, tmp_path, max_rounds=2)
    assert_same_bits(run(name, tmp_path, half.run_dir / "checkpoints" / "last.ckpt")[1], whole)


@pytest.mark.parametrize("name", CASES)
def test_vmap_agrees_with_eager(name, tmp_path):
    found, expected = (run(name, tmp_path, engine=engine)[1] for engine in ("vmap", "eager"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
