"""What becomes of memory that is freed."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback

from fedlight.run import device
from tests.helpers.runif import RunIf
from tests.helpers.tiny import Clients, Regression, quiet_trainer


class Calls(Callback):
    """Stands in for the C library, and notes what it was asked for by the end of the first round."""

    def __init__(self):
        self.all, self.in_a_round = [], None
        ask = self.all.append
        self.library = SimpleNamespace(mallopt=lambda *what: ask(what), malloc_trim=lambda pad: ask("trim"))

    def on_round_end(self, trainer, pl_module):
        self.in_a_round = self.in_a_round or [*self.all]


@RunIf(linux=True)
@pytest.mark.parametrize("chosen", [False, True])
def test_a_fit_keeps_freed_blocks_and_gives_them_back(tmp_path, monkeypatch, chosen):
    """Numbers of mallopt(3): -1 is when the heap is trimmed, -3 and -4 which and how many blocks lie outside of it."""
    for name in device._OWN:
        monkeypatch.delenv(name, raising=False)
    if chosen:  # the user's own choice stays
        monkeypatch.setenv("MALLOC_TOP_PAD_", "131072")
    calls = Calls()
    monkeypatch.setattr(device, "ctypes", SimpleNamespace(CDLL=lambda name: calls.library))
    quiet_trainer(tmp_path, callbacks=[calls]).fit(Regression(), Clients())
    assert calls.in_a_round == ([] if chosen else [(-4, 0), (-1, -1)])
    assert calls.all[len(calls.in_a_round) :] == ([] if chosen else [(-4, 2**16), (-3, 2**25), (-1, 2**26), "trim"])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs the GNU C library")
def test_a_block_that_is_kept_has_no_page_faults():
    """In a process of its own, whose heap has no holes yet: at least a fault for each huge page of 2 MB otherwise."""
    program = """
import resource
from contextlib import ExitStack
import torch
from lightning.fabric import Fabric
from fedlight.run.device import keep_freed_blocks

def faults():
    for _ in range(4):  # the first hole may be too small by what aligns the next block
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [faults()]
with ExitStack() as cleanup:
    keep_freed_blocks(Fabric(accelerator="cpu", devices=1), cleanup)
    found.append(faults())
assert found[1] < 16 < 32 <= found[0], found
"""
    subprocess.run([sys.executable, "-c", program], check=True)
