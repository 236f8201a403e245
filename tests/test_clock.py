"""Where a round's seconds go."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.profilers import Profiler, SimpleProfiler

from fedlight.run.loggers import read_metrics
from tests.helpers.tiny import Clients, Regression, quiet_trainer

PARTS = ("train", "wait", "aggregate", "evaluate")


class Recorder(Profiler):
    """Keeps the order of what it is told."""

    def __init__(self):
        super().__init__()
        self.events = []

    def start(self, action_name):
        self.events.append(("start", action_name))

    def stop(self, action_name):
        self.events.append(("stop", action_name))


class Idle(Callback):
    def on_round_end(self, trainer, pl_module):
        pass


def test_parts_of_a_round_add_up(tmp_path):
    trainer = quiet_trainer(tmp_path)
    trainer.fit(Regression(), Clients())
    rows = read_metrics(trainer.run_dir / "metrics.csv")
    for row in rows:
        assert 0 < sum(row[f"time/{part}_s"] for part in PARTS) <= row["time/round_s"]
    assert rows[0]["time/save_s"] == 0
    assert all(row["time/save_s"] > 0 for row in rows[1:])


def test_a_profiler_sees_parts_and_hooks(tmp_path):
    profiler = Recorder()
    quiet_trainer(tmp_path, max_rounds=2, callbacks=[Idle()], profiler=profiler).fit(Regression(), Clients())
    started = [name for kind, name in profiler.events if kind == "start"]
    parts = [name for name in started if name.startswith("[FederatedTrainer]")]
    one_round = ["clients.training_step", "wait", "aggregate", "evaluate"]
    assert parts == [f"[FederatedTrainer]{part}" for part in one_round] * 2
    assert started.count("[Callback]Idle.on_round_end") == 2
    open_actions = []
    for kind, name in profiler.events:  # properly nested
        if kind == "start":
            open_actions.append(name)
        else:
            assert open_actions.pop() == name
    assert not open_actions


def test_a_part_that_fails_is_closed(tmp_path):
    class Fails(Regression):
        def validation_step(self, batch, batch_idx):
            if self.trainer.validating:
                raise RuntimeError("on purpose")

    profiler = Recorder()
    with pytest.raises(RuntimeError, match="on purpose"):
        quiet_trainer(tmp_path, profiler=profiler).fit(Fails(), Clients())
    assert profiler.events[-1] == ("stop", "[FederatedTrainer]evaluate")


@pytest.mark.parametrize(
    ("profiler", "says"),
    [
        ("simple", "[FederatedTrainer]aggregate"),
        ("advanced", "function calls"),
        ("pytorch", "aten::mse_loss"),
        (SimpleProfiler(filename="mine"), "[Callback]Checkpoint"),
    ],
)
def test_the_report_is_left_in_the_run_folder(tmp_path, profiler, says):
    trainer = quiet_trainer(tmp_path, max_rounds=6, profiler=profiler)
    trainer.fit(Regression(), Clients())
    name = "profile" if isinstance(profiler, str) else "mine"
    assert says in (trainer.run_dir / f"fit-{name}-0.txt").read_text()


def test_names_are_lightnings(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"trainer.profiler='fast' must be one of \['simple'"):
        quiet_trainer(tmp_path, profiler="fast").fit(Regression(), Clients())
