"""What ``engine: auto`` is on a CPU: where clients train side by side, that is faster and gives the same bits."""

import logging
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from fedlight.engines.base import LocalTraining
from fedlight.engines.batch_order import StepSizes
from fedlight.engines.side_by_side import LARGEST, _Watch
from fedlight.engines.vmap import programs
from fedlight.engines.vmap.engine import Vmap
from fedlight.penalties.man import MAN
from fedlight.perturbations import SAM
from fedlight.run.device import _channels_last
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

SIZES = (10,) * 8 + (7, 7, 9)
"""With batches of four: a last batch that most clients share, and others of one or two clients."""

counted, noted, last, table = 0, [], None, {"x": torch.zeros(2)}
options, weight = SimpleNamespace(scale=1.0), 1.0
LOGGED = {}
"""What the last run logged."""


class Small(Regression):
    def __init__(self, width=16, between=nn.ReLU):
        super().__init__(0.02, nn.Sequential(nn.Linear(3, width), between(), nn.Linear(width, 1)))


class Keeps(Small):
    def training_step(self, batch, batch_idx):
        global last, table
        last, table = batch[0].detach(), {"x": batch[0]}
        return super().training_step(batch, batch_idx)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Watches(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        pass


class Knows(Small):
    """Looks whether the weight that it uses is the one that it began with."""

    def __init__(self):
        super().__init__()
        self.kept = id(self.net[0].weight)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + (id(self.net[0].weight) == self.kept))


class Prints(Small):
    def training_step(self, batch, batch_idx):
        print("here")
        return super().training_step(batch, batch_idx)


class Logs(Small):
    def training_step(self, batch, batch_idx):
        logging.getLogger("mine").warning("here")
        return super().training_step(batch, batch_idx)


class Powers(nn.Module):
    """An exponent that is trained, of every unit."""

    def __init__(self):
        super().__init__()
        self.exponent = nn.Parameter(torch.full((16,), 2.0))

    def forward(self, x):
        return (x.abs() + 0.1) ** self.exponent


class Counts(Small):
    def training_step(self, batch, batch_idx):
        global counted
        counted += 1
        return super().training_step(batch, batch_idx)


class Notes(Small):
    def training_step(self, batch, batch_idx):
        noted.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


def fit(folder, module, sizes=SIZES, **settings):
    """The engine's name and reason, and the module's weights."""
    settings = {"max_rounds": 1, "clients_per_round": 1.0, "local_epochs": 2, "enable_plots": False, **settings}
    trainer = quiet_trainer(folder, enable_checkpointing=False, **settings)
    trainer.fit(module, Clients(sizes))
    engine = trainer._session.engine
    LOGGED.update({name: value for name, value in trainer.callback_metrics.items() if "time/" not in name})
    return f"{type(engine).__name__}: {engine.reason}", weights(module)


@pytest.mark.parametrize(
    ("module", "settings", "expected"),
    [
        (Small, {}, "Vmap: auto; small steps"),
        (Small, {"callbacks": [MAN(0.1)], "perturbation": SAM(0.1), "gradient_clip_val": 1.0}, "Vmap: auto;"),
        (lambda: Small(64, nn.Tanh), {}, "Vmap: auto;"),
        (lambda: Small(16, nn.Sigmoid), {}, "Eager: auto; sigmoid"),
        (lambda: Small(16, lambda: nn.Dropout(0.1)), {"gradient_clip_val": 0.1}, "Vmap: auto;"),
        (lambda: Small(16, Powers), {}, "Eager: auto; pow may round differently"),
        (lambda: Small(16, Noise), {"gradient_clip_val": 0.1}, "Eager: auto; rand_like"),
        (lambda: Small(16, lambda: nn.BatchNorm1d(16)), {"sizes": (8,) * 9}, "Eager: auto; native_batch_norm"),
        (
            lambda: Small(LARGEST),
            {"gradient_clip_val": 0.1},
            f"Eager: auto; the model has more than {LARGEST:,} parameters",
        ),
        (Small, {"clients_per_round": 4}, "Eager: auto; steps of 4 clients are too few"),
        (Small, {"sizes": (80, *(4,) * 9)}, "Eager: auto; steps of 10 clients are too few, or too unlike"),
        (Small, {"precision": "bf16-mixed"}, "Eager: auto; trainer.precision"),
        (Small, {"callbacks": [Watches()]}, "Eager: auto; Watches overrides on_train_batch_end"),
        (Small, {"engine": "eager"}, "Eager: as trainer.engine says"),
        (Knows, {}, "Eager: auto; training_step gives another gradient"),
        (Prints, {}, "Eager: auto; Prints.training_step prints"),
        (Logs, {}, "Eager: auto; Logs.training_step logs"),
        (Keeps, {}, "Eager: auto; Keeps.training_step changes the variable last"),
        (Counts, {}, "Eager: auto; Counts.training_step changes the variable counted"),
        (Notes, {}, "Eager: auto; Notes.training_step changes the variable noted"),
    ],
)
def test_auto_is_the_fast_engine_where_nothing_is_lost(tmp_path, module, settings, expected):
    assert fit(tmp_path, module(), **settings)[0].startswith(expected)


def test_what_mans_own_line_goes_through_makes_no_difference(tmp_path, monkeypatch, caplog):
    """With handlers at the root, as of `logging.basicConfig`, Lightning's loggers may pass their lines on."""
    for name in ("lightning.fabric", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    assert fit(tmp_path, Small(), callbacks=[MAN(0.1)])[0].startswith("Vmap: auto;")
    assert "MAN: 1 layer" in caplog.text
    assert fit(tmp_path, Logs(), callbacks=[MAN(0.1)])[0].startswith("Eager: auto; Logs.training_step logs")


def test_a_trial_leaves_no_trace_outside(tmp_path, capsys):
    steps = 2 * sum(-(-size // 4) for size in SIZES)
    for cls, found in ((Counts, lambda: counted), (Notes, lambda: len(noted))):
        before = found()
        fit(tmp_path, cls(), engine="eager")
        eager = found() - before
        fit(tmp_path, cls())
        assert found() - before - eager == eager >= steps
    capsys.readouterr()
    fit(tmp_path, Prints(), engine="eager")
    expected = capsys.readouterr().out.count("here\n")
    fit(tmp_path, Prints())
    assert capsys.readouterr().out.count("here\n") == expected >= steps


def test_bits_do_not_depend_on_who_trains_beside_whom(tmp_path, monkeypatch):
    settings = {"callbacks": [MAN(0.1)], "perturbation": SAM(0.1)}
    name, expected = fit(tmp_path, Small(), max_rounds=3, **settings)
    assert name.startswith("Vmap")
    torch.testing.assert_close(fit(tmp_path, Small(), max_rounds=3, engine="eager", **settings)[1], expected)

    def dropping():
        return Small(16, lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.2)))

    dropped = fit(tmp_path, dropping())[1]
    train, logged = Vmap.train, dict(LOGGED)
    assert "train/loss" in logged
    for width in (1, 4, 6):

        def some(self, round, tasks, width=width):
            tasks = list(tasks)
            for begin in range(0, len(tasks), width):
                yield from train(self, round, tasks[begin : begin + width])

        monkeypatch.setattr(Vmap, "train", some)
        assert torch.equal(fit(tmp_path, Small(), max_rounds=3, **settings)[1], expected), width
        assert torch.equal(fit(tmp_path, dropping())[1], dropped), width
        assert logged == LOGGED, width


class Reads(Small):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * options.scale * weight


class Anneals(Callback):
    def on_round_start(self, trainer, pl_module):
        global weight
        options.scale, weight = 0.5**trainer.current_round, 1.0 + trainer.current_round


def test_a_variable_that_a_step_reads_may_change_from_round_to_round(tmp_path, monkeypatch):
    expected = fit(tmp_path, Reads(), engine="eager", callbacks=[Anneals()], max_rounds=3)[1]
    monkeypatch.setattr(programs, "TRACE_AFTER", 2)
    name, found = fit(tmp_path, Reads(), callbacks=[Anneals()], max_rounds=3)
    assert name.startswith("Vmap")
    torch.testing.assert_close(found, expected)


def test_what_cannot_be_traced_runs_as_it_did(tmp_path, monkeypatch):
    expected = fit(tmp_path, Small())[1]
    monkeypatch.setattr(programs, "TRACE_AFTER", 2)
    monkeypatch.setattr(programs, "make_fx", lambda function: 1 / 0)
    assert torch.equal(fit(tmp_path, Small())[1], expected)


def test_a_processor_that_rounds_by_position_is_not_trusted(tmp_path, monkeypatch):
    step = Vmap.try_step
    monkeypatch.setattr(Vmap, "try_step", lambda self, n, m, *s: step(self, n, m, *s) + 1e-7 * (n > 2 and m == 2))
    assert (
        fit(tmp_path, Small())[0] == "Eager: auto; it draws, or this processor rounds, differently beside other clients"
    )


def test_which_steps_are_taken_alike():
    sizes = Counter({10: 8, 7: 2, 9: 2, 4: 4})  # K = 8 of 16: 4 of ten, 1 of seven, 1 of nine, 2 of four
    training = LocalTraining(None, None, 0, batch_size=4, epochs=3, steps=None, per_round=8, sizes=sizes)
    found = StepSizes(training)
    # Ten samples are steps of 4, 4, 2; nine 4, 4, 1; seven 4, 3; four one step of 4.
    assert found.shared == {(4,), (2,)}
    assert [(n,) in found.alone for n in (1, 2, 3, 4)] == [True, False, True, False]
    assert found.steps == pytest.approx((10 * 3 + 2 * 2 + 4 * 1) / 16)
    assert found.single == pytest.approx(1 + 1)
    two = 1 - (6 / 16) ** 8  # somebody takes two full steps
    assert found.batched == pytest.approx(1 + (2 * two + (1 - two)))
    accumulated = StepSizes(replace(training, accumulate_grad_batches=2, per_round=16))
    assert accumulated.shared == {(4, 4), (2,), (4,)}


ROWWISE = [
    *(torch.add, torch.sub, torch.mul, torch.div, torch.maximum),
    *(partial(loss, reduction="none") for loss in (F.mse_loss, F.smooth_l1_loss, F.huber_loss)),
    lambda x, y: torch.addcmul(x, x, y, value=0.37),
    lambda x, y: torch.addcdiv(x, x, y, value=-0.37),
    lambda x, y: torch.lerp(x, y, 0.1),
    lambda x, y: torch.add(x, y, alpha=-0.37),
    lambda x, y: x.abs().sqrt() + y.pow(2) + y.reciprocal(),
    lambda x, y: x.relu() * y.clamp(-0.5, 0.5) + F.leaky_relu(x, 0.013) / 3,
    lambda x, y: x.unsqueeze(2).bmm(y.unsqueeze(1)),
    lambda x, y: torch.log_softmax(x, 1),
    lambda x, y: torch.linalg.vector_norm(x, dim=1) + y.sum(1) + x.mean(1),
]


@pytest.mark.parametrize("operation", ROWWISE)
def test_exact_operations_treat_rows_alike(operation):
    rng = torch.Generator().manual_seed(0)
    for columns in (1, 3, 10, 31, 100):
        x, y = torch.randn(2, 12, columns, generator=rng)
        whole = operation(x, y)
        for begin, end in ((0, 2), (1, 4), (5, 12)):
            assert torch.equal(operation(x[begin:end].clone(), y[begin:end].clone()), whole[begin:end])


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_lie_channels_last_are_no_reason(channels):
    with _Watch(4) as watch:
        out = _channels_last(torch.arange(4 * channels * 64.0).view(4, channels, 8, 8))
    assert watch.found == []
    assert out.stride() == (channels * 64, 1, channels * 8, channels)
    assert torch.equal(out.flatten(), torch.arange(4 * channels * 64.0))
