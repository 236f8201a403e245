"""The cuda_graph engine with real CUDA graphs: `make test-gpu` runs this where a GPU is at hand."""

import gc

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import optim

from fedlight.engines.cuda_graph import engine
from fedlight.engines.cuda_graph.client_loop import RecordedLoop
from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.penalties.man import MAN
from fedlight.perturbations import SAM
from tests.engines import cases
from tests.engines.test_cuda_graph import CASES, HALF, MOMENTUM, assert_same, begin_with_scale, train
from tests.helpers.runif import RunIf

pytestmark = RunIf(min_cuda_gpus=1)
GPU = {"accelerator": "gpu", "devices": 1}


@pytest.fixture(autouse=True)
def _deterministic_kernels(monkeypatch):
    """The two engines must run the same kernels, so these must not be chosen by a race."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.parametrize("name", CASES)
def test_graphs_equal_the_eager_engine_bit_for_bit(name, tmp_path):
    settings = {**GPU, **CASES[name]}
    expected = train(tmp_path, "eager", **settings)
    assert_same(train(tmp_path, CudaGraph(slots=3), **settings), expected)


def test_slots_replayed_side_by_side_do_not_disturb_each_other(tmp_path):
    """Matrices that need a workspace, in many slots at once, over and over."""
    settings = {
        **GPU,
        "precision": "32-true",
        "clients_per_round": 12,
        "max_rounds": 5,
        "local_epochs": 4,
        "data": {"sizes": (32,) * 12, "batch_size": 8},
        "net": {"optimizer": MOMENTUM, "dropout": 0.3},
        "perturbation": SAM(0.1),
        "callbacks": [MAN(0.3)],
    }
    expected = train(tmp_path, "eager", **settings)
    for slots in (12, 5, 1):
        assert_same(train(tmp_path, CudaGraph(slots=slots), **settings), expected)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("scale", [2.0**10, 2.0**20])
def test_16_mixed_equals_the_eager_engine_bit_for_bit(name, scale, tmp_path, monkeypatch):
    begin_with_scale(monkeypatch, scale)
    settings = {**GPU, **HALF[name], "precision": "16-mixed"}
    assert_same(train(tmp_path, CudaGraph(slots=3), **settings), train(tmp_path, "eager", **settings))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("engine", ["eager", "cuda_graph"])
def test_data_that_do_not_fit_change_nothing(engine, shared, tmp_path, monkeypatch):
    settings = {**GPU, "data": {"shared": shared}, "perturbation": SAM(0.1)}
    expected = train(tmp_path, "eager", **settings)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**9))
    with pytest.warns(UserWarning, match="stay in main memory"):
        found = train(tmp_path, CudaGraph(slots=2) if engine == "cuda_graph" else engine, **settings)
    assert_same(found, expected)


def test_reruns_give_the_same_bits(tmp_path):
    settings = {**GPU, "precision": "bf16-mixed", "net": {"optimizer": MOMENTUM, "dropout": 0.3}}
    assert_same(train(tmp_path, "cuda_graph", **settings), train(tmp_path, "cuda_graph", **settings))


def test_auto_is_cuda_graph(tmp_path):
    expected = train(tmp_path, "cuda_graph", **GPU)
    assert_same(train(tmp_path, "auto", **GPU), expected)


@pytest.mark.parametrize("what", ["branches", "takes to Python"])
def test_a_step_that_waits_for_the_device_is_named(what, tmp_path, monkeypatch):
    class Waits(cases.Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if what == "branches":
                return loss * 2 if loss > 1 else loss
            return loss * loss.item()

    monkeypatch.setattr(cases, "Net", Waits)
    with pytest.raises(
        MisconfigurationException, match=r"(?s)branches on the value of a tensor.*test_cuda_graph_gpu.py"
    ):
        train(tmp_path, "cuda_graph", **GPU)
    with pytest.warns(UserWarning, match="engine=auto is eager"):
        train(tmp_path, "auto", **GPU)


def test_an_optimizer_that_cannot_be_recorded_leads_to_eager(tmp_path):
    with pytest.warns(UserWarning, match="a step of RMSprop cannot be recorded"):
        train(tmp_path, "auto", net={"optimizer": lambda params: optim.RMSprop(params, lr=0.01)}, **GPU)


# ---- what a first run on a GPU has to show besides


class PerRound(Callback):
    """Calls something after each round; with a penalty, changes it, so that steps are recorded anew."""

    def __init__(self, then=lambda trainer: None, man=None):
        self.then, self.man = then, man

    def on_round_end(self, trainer, module):
        if self.man is not None:
            self.man.zeta = 0.1 + 0.01 * trainer.current_round
        self.then(trainer)


def test_random_numbers_of_the_host_lead_to_eager(tmp_path, monkeypatch):
    class Mixes(cases.Net):
        def training_step(self, batch, batch_idx):
            return float(np.random.beta(1, 1)) * super().training_step(batch, batch_idx)

    monkeypatch.setattr(cases, "Net", Mixes)
    expected = train(tmp_path, "eager", **GPU)
    with pytest.warns(UserWarning, match=r"engine=auto is eager.*numpy\.random"):
        assert_same(train(tmp_path, "auto", **GPU), expected)


def test_data_do_not_cost_slots(tmp_path, monkeypatch):
    """1 GB of images: a slot of this network takes a small part of that."""
    planned, plan = [], engine.plan_slots
    monkeypatch.setattr(engine, "plan_slots", lambda *args: planned.append(args) or plan(*args))
    each = 2**30 // 36 // 4
    train(tmp_path, "cuda_graph", **GPU, data={"sizes": (each,) * 4, "batch_size": 64}, local_steps=2, max_rounds=1)
    assert planned[0][2] < 2**29


def test_recordings_of_unequal_clients_are_bounded(tmp_path):
    held = []
    watch = PerRound(lambda trainer: held.append([len(s._recordings) for s in trainer._session.engine._slots]))
    settings = {**GPU, "data": {"sizes": tuple(range(20, 60)), "batch_size": 16}, "clients_per_round": 8}
    settings |= {"max_rounds": 20, "callbacks": [watch], "net": {"optimizer": MOMENTUM, "dropout": 0.3}}
    found = train(tmp_path, CudaGraph(slots=4), **settings)
    assert max(held[-1]) <= 64
    assert_same(found, train(tmp_path, "eager", **{**settings, "callbacks": []}))


def test_steps_are_recorded_anew_while_checkpoints_are_written(tmp_path):
    man = MAN(0.1)
    settings = {**GPU, "max_rounds": 20, "enable_checkpointing": True, "callbacks": [man, PerRound(man=man)]}
    found = train(tmp_path, CudaGraph(slots=2), **settings)
    man.zeta = 0.1
    assert_same(found, train(tmp_path, "eager", **settings))


def test_old_slots_give_their_memory_back(tmp_path):
    used, man = [], MAN(0.1)
    watch = PerRound(lambda trainer: used.append(torch.cuda.memory_allocated()), man)
    gc.disable()
    try:
        train(tmp_path, CudaGraph(slots=4), **GPU, max_rounds=10, callbacks=[man, watch])
    finally:
        gc.enable()
    assert used[-1] < 1.5 * used[1]


def test_dropout_between_recurrent_layers_leads_to_eager(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "Net", cases.Recurrent)
    with pytest.warns(UserWarning, match="engine=auto is eager.*rnn draws its dropout in cuDNN"):
        train(tmp_path, "auto", **{**GPU, "precision": "32-true"})


def test_workspaces_and_caches_may_be_cleared_between_rounds(tmp_path):
    def clear(trainer):
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.empty(2**28, device="cuda").fill_(float("nan"))

    settings = {**GPU, "max_rounds": 4, "net": {"optimizer": MOMENTUM, "dropout": 0.3}}
    expected = train(tmp_path, "eager", **settings)
    assert_same(train(tmp_path, "cuda_graph", **settings, callbacks=[PerRound(clear)]), expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_client_of_16_mixed_is_waited_for(tmp_path, monkeypatch):
    finish = RecordedLoop.finish

    def strictly(self, job):
        with self.recorder.strict():
            return finish(self, job)

    monkeypatch.setattr(RecordedLoop, "finish", strictly)
    train(tmp_path, CudaGraph(slots=3), **{**GPU, "precision": "16-mixed"})


@pytest.mark.parametrize("name", ["eager", "cuda_graph"])
def test_deterministic_gives_the_same_bits_in_every_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings = {**GPU, "deterministic": True, "precision": "32-true", "max_rounds": 3}
    expected = train(tmp_path, name, **settings)
    for _ in range(3):
        assert_same(train(tmp_path, name, **settings), expected)


def test_a_capture_that_fails_leaves_the_allocator_whole(tmp_path, monkeypatch):
    class Waits(cases.Net):
        def training_step(self, batch, batch_idx):
            if torch.cuda.is_current_stream_capturing():
                torch.zeros(()).cuda().item()
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(cases, "Net", Waits)
    with pytest.warns(UserWarning, match="engine=auto is eager"):
        train(tmp_path, "auto", **GPU)
    block, stream = torch.empty(2**20, device="cuda"), torch.cuda.Stream()
    block.record_stream(stream)
    del block
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_allocated() <= before + 512
