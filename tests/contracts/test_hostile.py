"""Aggregators and attacks give the same bits in two processes as in one, and after an interruption."""

import pytest
import torch

from tests.contracts.hostile import CASES, run
from tests.contracts.test_contracts import _one_thread, assert_same_bits  # noqa: F401
from tests.helpers.pair import in_pair

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    return in_pair("tests.contracts.hostile", tmp_path_factory.mktemp("pair"))


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
