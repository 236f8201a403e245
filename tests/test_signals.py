"""A run that is interrupted at any moment goes on to the weights of one that was not."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from fedlight.callbacks import ClientMetrics
from fedlight.run.loggers import read_metrics
from fedlight.run.processes import deferred_signals
from tests.helpers.interrupted import CASES, ROUNDS
from tests.helpers.runif import RunIf
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

pytestmark = RunIf(linux=True)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder of interrupted runs, and their exit codes."""
    folder = tmp_path_factory.mktemp("interrupted")
    command = [sys.executable, "-m", "tests.helpers.interrupted", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The weights after all rounds, and what the clients reported."""
    model = Regression()
    trainer = quiet_trainer(tmp_path_factory.mktemp("whole"), max_rounds=ROUNDS, callbacks=[ClientMetrics()])
    trainer.fit(model, Clients())
    return weights(model), (trainer.run_dir / "clients.csv").read_text()


def test_exit_codes_say_what_happened(interrupted):
    _, codes, errors = interrupted
    assert codes["cli15"] == 143
    assert codes["cli2"] == 130
    assert codes["term"] == 143
    assert codes["int"] == codes["int twice"] == 77
    assert all(codes[case] == -signal.SIGKILL for case in CASES if case.startswith("kill"))
    assert "Traceback" not in errors


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_with_the_same_bits(interrupted, uninterrupted, case):
    folder, _, _ = interrupted
    run = folder / case / "version_0"
    before = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["fedlight"]["server"]["round"]
    # A gentle signal lets round 3 finish; a second one and kill -9 lose it.
    assert before == (4 if case in ("term", "int") else 3)
    settings = {"name": case, "max_rounds": ROUNDS, "callbacks": [ClientMetrics()]}
    trainer, model = quiet_trainer(folder, **settings), Regression()
    trainer.fit(model, Clients(), ckpt_path="last")
    assert trainer.run_dir == run
    end, clients = uninterrupted
    assert torch.equal(weights(model), end)
    assert (run / "clients.csv").read_text() == clients
    rows = read_metrics(run / "metrics.csv")
    assert [row["round"] for row in rows] == list(range(ROUNDS))
    whole = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(whole["fedlight"]["server"]["algorithm"]["params"], end)
    assert not list((run / "checkpoints").glob(".*"))  # no half of a file is left


def test_an_interrupted_run_closes_its_metrics_whole(interrupted):
    folder, _, _ = interrupted
    for name in ("cli15", "cli2"):
        assert [row["round"] for row in read_metrics(folder / name / "version_0" / "metrics.csv")] == [0, 1]
        assert (folder / name / "version_0" / "config.yaml").exists()
        assert not (folder / name / "version_0" / "summary.json").exists()


def test_the_second_signal_interrupts_at_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with deferred_signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit, match="143"):
            signals.raise_received(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signals.raise_received(signal.SIGINT)
        signals.raise_received(0)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_other_threads_and_commands_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def in_thread():
        with deferred_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    with deferred_signals(active=False):
        seen.append(signal.getsignal(signal.SIGINT))
    assert seen == [before, before]


def test_a_signal_before_the_first_round_ends_the_run_there(tmp_path):
    class Impatient(Regression):
        def on_train_start(self):
            os.kill(os.getpid(), signal.SIGINT)

    trainer = quiet_trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Impatient(), Clients())
    assert not list(tmp_path.glob("default/*"))
