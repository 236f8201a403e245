"""What becomes of memory that is freed."""

import ctypes
import resource

import pytest
import torch
from lightning.pytorch import Callback

from fedlight.run.memory import _OWN
from tests.helpers.tiny import Clients, Regression, quiet_trainer

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the GNU C library")
SIZE = 2**24  # entries: 64 MB, which the library never keeps by itself


def faults_of_a_second_block() -> int:
    """Page faults of a block that is as large as one that has been freed."""
    torch.ones(SIZE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(SIZE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


class Faults(Callback):
    """Notes them in a round."""

    def on_round_end(self, trainer, pl_module):
        self.found = faults_of_a_second_block()


@glibc
def test_a_fit_keeps_freed_blocks_and_gives_them_back(tmp_path, monkeypatch):
    """At least one fault for every huge page of 2 MB shows that a block was not kept."""
    for name in _OWN:
        monkeypatch.delenv(name, raising=False)
    quiet_trainer(tmp_path, callbacks=[watch := Faults()]).fit(Regression(), Clients())
    assert watch.found < 16 < 32 <= faults_of_a_second_block()
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1])
    torch.ones(SIZE)
    with open("/proc/self/statm") as file:
        assert abs(int(file.read().split()[1]) - before) < SIZE * 4 // 4096 // 2


@glibc
def test_what_the_user_has_chosen_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "131072")
    quiet_trainer(tmp_path, callbacks=[watch := Faults()]).fit(Regression(), Clients())
    assert watch.found >= 32
