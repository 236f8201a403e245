"""What the cuda_graph engine keeps and waits for, seen with the stand-in for CUDA graphs."""

import gc
import weakref

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from fedlight.data.arrays import _Storage
from fedlight.engines.cuda_graph import client_loop, engine
from fedlight.engines.cuda_graph.client_loop import RecordedLoop
from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.penalties.man import MAN
from tests.engines import cases
from tests.engines.tape import Tape
from tests.engines.test_cuda_graph import assert_same, train
from tests.helpers.half import scaled  # noqa: F401  (a fixture)

SKEWED = tuple(range(6, 17))
"""Clients with one to four batches of four, and last batches of one to four."""


class Louder(Callback):
    """Changes in each round what a step has frozen."""

    def __init__(self, man, seen=lambda: None):
        self.man, self.seen = man, seen

    def on_round_start(self, trainer, module):
        self.man.zeta = 2.0 * trainer.current_round

    def on_round_end(self, trainer, module):
        self.seen()


@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    settings = {"data": {"sizes": SKEWED}, "clients_per_round": 4, "max_rounds": 5, "net": {"dropout": 0.5}}
    settings["net"]["optimizer"] = lambda params: torch.optim.SGD(params, lr=0.125, momentum=0.9, fused=True)
    return settings, cases.train(tmp_path_factory.mktemp("eager"), "eager", **settings)


@pytest.mark.parametrize("most", [3, pytest.param(64, marks=pytest.mark.slow)])
def test_recordings_of_unequal_clients_are_bounded(most, skewed, tmp_path, monkeypatch):
    """Pieces that are rare, or too many, are done step by step, with the same bits."""
    settings, expected = skewed
    monkeypatch.setattr(client_loop, "_MOST", most)
    monkeypatch.setattr(Tape, "recordings", 0)
    held = []

    class Watch(Callback):
        def on_round_end(self, trainer, module):
            held.append([len(slot._recordings) for slot in trainer._session.engine._slots])

    found = train(tmp_path, CudaGraph(slots=2, recorder=Tape), **settings, callbacks=[Watch()])
    assert_same(found, expected)
    # The largest client, of 16 in four batches: eight steps in two epochs, one recording a slot, before training.
    assert Tape.recordings == sum(held[-1])
    assert max(held[-1]) <= most
    assert (max(held[-1]) == 3) == (most == 3)
    # Lengths 1, 2, 4 and 8 of full batches, length 1 of three others: no slot needs more than seven.
    assert max(held[-1]) <= 7


def test_rare_pieces_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(Tape, "recordings", 0)
    train(tmp_path, CudaGraph(slots=1, recorder=Tape), data={"sizes": (8, 5)}, clients_per_round=2, local_epochs=1)
    # The client of 8 has two full batches: one piece. That of 5 has one, and one of 1, in two rounds: 2 steps of each.
    assert Tape.recordings == 1


def test_the_data_are_no_part_of_what_a_slot_takes(tmp_path, monkeypatch):
    """A device of 1,000,000 bytes: the data take 900,000 and a slot 10,000."""
    copied, planned, plan, to = [], [], engine.plan_slots, _Storage.to

    def free(device):
        return 1_000_000 - 900_000 * bool(copied) - 10_000 * Tape.recordings

    monkeypatch.setattr(Tape, "recordings", 0)
    monkeypatch.setattr(engine, "_check_optimizer", lambda *args: copied.clear())  # the trial before has copied as well
    monkeypatch.setattr(_Storage, "to", lambda self, device: copied.append(device) or to(self, device))
    monkeypatch.setattr(engine, "_free", free)
    monkeypatch.setattr(engine, "plan_slots", lambda *args: planned.append(args) or plan(*args))
    train(tmp_path, CudaGraph(recorder=Tape), data={"sizes": cases.EQUAL}, max_rounds=1)
    assert planned == [(4, 90_000, 10_000)]


def test_what_is_recorded_anew_waits_for_nobody_and_frees_the_old_slots(tmp_path, monkeypatch):
    """A thread may be writing a checkpoint by then, which an error for whoever waits for the device would hit, too."""
    strict, slots, alive, mans = [], [], [], MAN(0.0)
    begin, watch = RecordedLoop.__init__, Tape.strict

    def counted(self):
        strict.append(len(slots))
        return watch(self)

    def noted(self, training, module, *args):
        slots.append(weakref.ref(module))
        begin(self, training, module, *args)

    monkeypatch.setattr(Tape, "strict", counted)
    monkeypatch.setattr(RecordedLoop, "__init__", noted)
    louder = Louder(mans, lambda: alive.append(sum(ref() is not None for ref in slots)))
    gc.disable()
    try:
        train(tmp_path, CudaGraph(slots=2, recorder=Tape), callbacks=[mans, louder], max_rounds=3)
    finally:
        gc.enable()
    assert strict == [1]  # once, when the first slot was made
    assert len(slots) == 6  # two in the beginning, and two after each change
    assert alive == [2, 2, 2]


@pytest.mark.usefixtures("scaled")
def test_the_scale_of_16_mixed_is_not_waited_for(tmp_path, monkeypatch):
    finish, scales = RecordedLoop.finish, []

    def finished(self, job):
        with monkeypatch.context() as patch:
            patch.setattr(torch.amp.GradScaler, "get_scale", lambda self: pytest.fail("this waits for the device"))
            result = finish(self, job)
        scales.append(result.loss_scale)
        return result

    monkeypatch.setattr(RecordedLoop, "finish", finished)
    train(tmp_path, CudaGraph(slots=2, recorder=Tape), precision="32-true")
    assert len(scales) == 8
    assert {float(scale) for scale in scales if isinstance(scale, torch.Tensor)} == {65536, 32768}  # some overflow once


def test_recurrent_dropout_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "Net", cases.Recurrent)
    with pytest.raises(MisconfigurationException, match="cuda_graph: rnn draws its dropout in cuDNN"):
        train(tmp_path, CudaGraph(recorder=Tape))
