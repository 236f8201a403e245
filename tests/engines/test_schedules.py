"""Hyperparameters that follow the round: every engine takes them as inputs, with the bits that numbers give."""

import pytest
import torch
from lightning.pytorch import Callback

from fedlight.algorithms import FedCM, FedProx
from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.engines.vmap import programs
from fedlight.engines.vmap.engine import Vmap
from fedlight.penalties.man import MAN
from fedlight.perturbations import ASAM, SAM, DualSAM
from fedlight.transforms import ClipUpdate
from tests.engines import cases
from tests.engines.tape import Tape

ENGINES = {
    "eager": lambda: {"engine": "eager"},
    "cuda_graph": lambda: {"engine": CudaGraph(slots=2, recorder=Tape)},
    "vmap": lambda: {"engine": Vmap()},
    "vmap, traced": lambda: {"engine": Vmap()},
    "vmap, compiled": lambda: {"engine": Vmap(), "compile": True},
}
SETTINGS = {"data": {"sizes": (8, 4)}, "clients_per_round": 2, "local_epochs": 1}
IN_ENGINES = pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("vmap")) for name in ENGINES]
)


@pytest.fixture(autouse=True)
def _quick_programs(monkeypatch, request):
    """Programs are traced, from their second run on; machine code, which takes seconds, is not made."""
    monkeypatch.setattr(programs, "BACKEND", lambda graph, inputs: graph.forward)
    monkeypatch.setattr(programs, "TRACE_AFTER", 2 if "traced" in request.node.name else 1000)
    yield
    torch.compiler.reset()


def constant(value):
    return {"schedule": "linear", "from": value, "to": value, "rounds": 5}


def methods(number):
    """Two methods that between them have each place where a step or the server reads a hyperparameter."""
    yield {
        "algorithm": FedProx(number(0.7), number(0.9)),
        "perturbation": ASAM(number(0.1), number(0.3)),
        "callbacks": [MAN(number(0.3))],
        "transforms": [ClipUpdate(number(0.11))],
    }
    yield {"algorithm": FedCM(number(0.3)), "perturbation": DualSAM(number(0.1))}


def train(root, engine, precision="32-true", **settings):
    found, rows = cases.train(root, precision=precision, **ENGINES[engine](), **SETTINGS, **settings)
    return found, [{k: v for k, v in row.items() if not k.startswith("schedule/")} for row in rows]


def differing(one, other):
    assert one[0].keys() == other[0].keys()
    return [k for k, v in one[0].items() if not torch.equal(v, other[0][k])] + [one[1]] * (one[1] != other[1])


@IN_ENGINES
def test_a_constant_schedule_has_the_bits_of_the_number(engine, tmp_path):
    for precision, numbers, schedules in zip(("64-true", "32-true"), methods(float), methods(constant), strict=True):
        found, expected = (train(tmp_path, engine, precision, **made) for made in (schedules, numbers))
        assert differing(found, expected) == []


def method(mu, rho, zeta):
    return {"algorithm": FedProx(mu), "perturbation": SAM(rho), "callbacks": [MAN(zeta)], "max_rounds": 3}


@IN_ENGINES
def test_each_round_has_its_value_and_nothing_is_recorded_anew(engine, tmp_path, monkeypatch):
    """By hand: mu 0, .25, .5, then it stays; rho after one round from .1 to .3; zeta .4, .2, .1."""
    values = [(0.0, 0.1, 0.4), (0.25, 0.1, 0.2), (0.5, 0.3, 0.1)]

    class ByHand(Callback):
        def on_round_start(self, trainer, module):
            mu, rho, zeta = values[trainer.current_round]
            trainer.algorithm.mu, trainer.perturbation.rho, trainer.callbacks[0].zeta = mu, rho, zeta

    by_hand = method(0.1, 0.1, 0.1)
    by_hand["callbacks"].append(ByHand())
    expected = train(tmp_path, engine, **by_hand)
    made, init = [], programs.Program.__init__
    monkeypatch.setattr(programs.Program, "__init__", lambda *args, **kw: made.append(0) or init(*args, **kw))
    monkeypatch.setattr(Tape, "recordings", 0)
    counts = []
    for schedules in (
        method(
            {"schedule": "linear", "from": 0, "to": 0.5, "rounds": 2},
            {"schedule": "cosine", "from": 0.1, "to": 0.3, "rounds": 1, "after": 1},
            {"schedule": "exponential", "from": 0.4, "to": 0.1, "rounds": 2},
        ),
        method(constant(0.5), constant(0.1), constant(0.3)),
    ):
        found = train(tmp_path, engine, **schedules)
        counts.append((len(made), Tape.recordings))
        if len(counts) == 1:
            assert differing(found, expected) == []
    assert counts[1] == (2 * counts[0][0], 2 * counts[0][1])
    assert any(counts[0]) == (engine != "eager")
