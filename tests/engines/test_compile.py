"""With `trainer.compile` every engine runs the same step as one compiled program."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

import fedlight.algorithms as algorithms
from fedlight.engines.cuda_graph.engine import CudaGraph
from fedlight.engines.vmap import programs
from fedlight.engines.vmap.engine import Vmap
from fedlight.engines.vmap.programs import StackedParts
from fedlight.penalties.man import MAN
from fedlight.perturbations import SAM, DualSAM
from fedlight.run.loggers import read_metrics
from tests.engines import cases
from tests.engines.tape import Tape
from tests.helpers.tiny import Clients, Regression, quiet_trainer, seeded, weights

CASES = {
    "plain": {},
    "man, sam, scaffold": {"callbacks": [MAN(0.3)], "perturbation": SAM(0.1), "algorithm": algorithms.SCAFFOLD()},
    "dual sam, feddyn": {"perturbation": DualSAM(0.1), "algorithm": algorithms.FedDyn(0.1)},
    "fedcm, accumulate": {"algorithm": algorithms.FedCM(0.3), "accumulate_grad_batches": 2},
    "batch norm, clip": {
        "net": {"norm": True},
        "data": {"sizes": (6, 10, 14)},
        "clients_per_round": 3,
        "gradient_clip_val": 0.2,
    },
}
ENGINES = {"eager": lambda: "eager", "cuda_graph": lambda: CudaGraph(slots=2, recorder=Tape), "vmap": Vmap}


@pytest.fixture(autouse=True)
def _quick_backend(monkeypatch, request):
    """Everything but the making of machine code, which takes seconds a program."""
    if "inductor" not in request.node.name:
        monkeypatch.setattr(programs, "BACKEND", lambda graph, inputs: graph.forward)
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        *[pytest.param("eager", name, marks=[pytest.mark.slow] * (name != "batch norm, clip")) for name in CASES],
        ("cuda_graph", "man, sam, scaffold"),
        pytest.param("vmap", "man, sam, scaffold", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_is_the_step(engine, name, tmp_path):
    expected, rows = cases.train(tmp_path, "eager", **CASES[name])
    found, found_rows = cases.train(tmp_path, ENGINES[engine](), compile=True, **CASES[name])
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-8, msg=key)
    for row, found_row in zip(rows, found_rows, strict=True):
        assert found_row == pytest.approx(row, rel=1e-5, abs=1e-6)


class LogsItsLoss(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", 2 * loss)
        return loss


class Replaces(Regression):
    """Puts another tensor in the place of a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.seen = self.seen / 2 + batch[0].mean().detach()
        return super().training_step(batch, batch_idx) + self.net.bias.sum() * self.seen


class OfSeries(Regression):
    def forward(self, x):
        return self.net(x).mean((1, 2))


class Lengths(Clients):
    """Series of another length at every client."""

    def __init__(self):
        super().__init__()
        rows = (seeded(8, 2 + client, 3, seed=client) for client in range(self.num_clients))
        self.datasets = [self.dataset(x, x.mean((1, 2))) for x in rows]
        self.held_out = self.datasets[0]


@pytest.mark.parametrize(("model", "data"), [(LogsItsLoss, Clients), (Replaces, Clients), (OfSeries, Lengths)])
def test_batches_of_other_sizes_go_on_where_compiled_ones_have_come_to(model, data, tmp_path):
    found = []
    for compile in (False, True):
        trainer = quiet_trainer(tmp_path, engine="eager", compile=compile, max_rounds=1, local_epochs=2)
        trainer.fit(module := model(), data())
        (row,) = read_metrics(trainer.run_dir / "metrics.csv")
        found.append((weights(module), torch.tensor(row["train/loss"])))
    torch.testing.assert_close(*found)


@pytest.mark.slow
def test_compiled_programs_are_padded_to_few_sizes(tmp_path, monkeypatch):
    """Four clients of two to four steps: those that are left never make a program of their own size."""
    sizes = set()
    monkeypatch.setattr(StackedParts, "_compiles", lambda self, kind: kind == (4,))
    program = StackedParts.program
    monkeypatch.setattr(StackedParts, "program", lambda self, *key: sizes.add(key[:2]) or program(self, *key))
    cases.train(tmp_path, Vmap(), compile=True)
    assert {clients for kind, clients in sizes if kind == (4,)} == {1, 2, 4}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler looks into every module there is, deprecated ones too
def test_inductor_agrees(tmp_path):
    settings = {"callbacks": [MAN(0.3)], "data": {"sizes": cases.EQUAL}}
    expected, _ = cases.train(tmp_path, "eager", **settings)
    found, _ = cases.train(tmp_path, "vmap", compile=True, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_without_a_compiler_it_says_so_and_goes_on(tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no C++ compiler")

    settings = {"data": {"sizes": cases.EQUAL}}
    expected, _ = cases.train(tmp_path, "eager", **settings)
    monkeypatch.setattr(programs, "BACKEND", backend)
    with pytest.warns(UserWarning, match="trainer.compile: runs uncompiled, as compiling failed: .*"):
        found, _ = cases.train(tmp_path, "vmap", compile=True, **settings)
    torch.testing.assert_close(found, expected)


def test_hooks_within_a_step_are_refused(tmp_path):
    class Watches(Callback):
        def on_after_backward(self, trainer, module):
            pass

    with pytest.raises(MisconfigurationException, match="Watches overrides on_after_b.*Use trainer.compile=false"):
        cases.train(tmp_path, "eager", compile=True, callbacks=[Watches()])
