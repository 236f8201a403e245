"""The cuda_graph engine with real CUDA graphs: `make test-gpu` runs this where a GPU is at hand."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import optim

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
