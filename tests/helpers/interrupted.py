"""Runs that are interrupted, each in a process of its own, of which the last line tells the exit codes.

``python -m tests.helpers.interrupted FOLDER`` forks once per case from a process that has imported everything: nothing
is timed, as every run sends itself its signal at a chosen moment.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from fedlight.callbacks import ClientMetrics
from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.cli.command import main
from tests.helpers.tiny import Clients, Regression, quiet_trainer

ROUNDS = 6
CASES = {
    "term": (signal.SIGTERM, 3, "client"),
    "int": (signal.SIGINT, 3, "client"),
    "kill in a client": (signal.SIGKILL, 3, "client"),
    "kill before a checkpoint": (signal.SIGKILL, 3, "round"),
    "kill while writing": (signal.SIGKILL, 3, "replace"),
    "int twice": (signal.SIGINT, 3, "twice"),
}


class Interrupt(Callback):
    """Sends the process a signal in the middle of a round.

    Args:
        number: the signal.
        round: in which round.
        moment: after the first ``client``, at the end of the ``round`` before its checkpoint is written, or when the
            new checkpoint is about to ``replace`` the old one; ``twice``, as an impatient user does.
    """

    def __init__(self, number: int, round: int, moment: str = "client") -> None:
        self.number, self.round, self.moment = number, round, moment
        self.sent = False

    def on_client_end(self, trainer: Any, pl_module: Any, client: int) -> None:
        if trainer.current_round == self.round and self.moment in ("client", "twice") and not self.sent:
            self.sent = True
            os.kill(os.getpid(), self.number)
            if self.moment == "twice":
                os.kill(os.getpid(), self.number)

    def on_round_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_round != self.round + 1:
            return
        if self.moment == "round":
            os.kill(os.getpid(), self.number)
        if self.moment == "replace":
            os.replace = lambda *_: os.kill(os.getpid(), self.number)


def run(folder: Path, case: str) -> None:
    """Train until the signal comes."""
    callbacks = [Interrupt(*CASES[case]), Checkpoint(max_overhead=1), ClientMetrics()]
    trainer = quiet_trainer(folder, name=case, max_rounds=ROUNDS, callbacks=callbacks, enable_plots=False)
    trainer.fit(Regression(), Clients())


def command_line(folder: Path, number: int) -> None:
    """The same through the command line, whose exit code says what happened."""
    trainer = {"default_root_dir": folder, "name": f"cli{number}", "accelerator": "cpu", "max_rounds": 6}
    trainer |= {"callbacks+": "tests.helpers.interrupted.Interrupt", "callbacks.number": number, "callbacks.round": 1}
    model, data = "--model=tests.helpers.tiny.Regression", "--data=tests.helpers.tiny.Clients"
    main(["fit", model, data, *(f"--trainer.{key}={value}" for key, value in trainer.items())])


def exit_code(function: Any, *args: Any) -> int:
    """What a forked process that calls a function ends with; negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args)
            code = 0
        except KeyboardInterrupt:
            code = 77  # not of the command line's: it reached the caller
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    codes = {case: exit_code(run, folder, case) for case in CASES}
    codes |= {f"cli{n}": exit_code(command_line, folder, n) for n in (signal.SIGTERM, signal.SIGINT)}
    print(json.dumps(codes))
