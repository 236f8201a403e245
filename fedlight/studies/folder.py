"""What a study keeps on disk: ``<root>/<study>/study.json``, and a folder for every run."""

import fcntl
import json
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from fedlight.run.folder import atomic_write, versions, writing
from fedlight.studies.plan import PlannedRun
from fedlight.studies.study import Study

OUTPUT = "output.log"
_ERROR = re.compile(r"(fedlight: )?error:|[^ :]*(Error|Exception):")


class RunSlot:
    """The folder of one planned run in that of its ``study``, which one process at a time may work on.

    It holds ``output.log``, ``run.json`` (parameters, command and how the run ended) and the run's own
    ``version_<n>`` folders.
    """

    def __init__(self, run: PlannedRun, study: Path) -> None:
        self.run, self.path = run, study / run.name
        self._lock: IO[str] | None = None

    def take(self) -> int | None:
        """Lock the folder: the file descriptor that holds the lock, or None while another process has it.

        A child that inherits the descriptor holds the lock, too: a run outlives a study that was killed, and until it
        ends no other study begins it again.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return None
        return self._lock.fileno()

    def release(self) -> None:
        """Let go of the folder; a child that inherited the lock keeps it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def summary(self) -> dict[str, Any] | None:
        """The summary of a version that is finished, or None."""
        for version in reversed(versions(self.path)):
            with suppress(OSError, ValueError, TypeError):
                return dict(json.loads((self.path / f"version_{version}" / "summary.json").read_text()))
        return None

    def resumable(self) -> bool:
        """Whether the newest version, which counts, has a checkpoint to continue from."""
        return any((self.path / f"version_{v}/checkpoints/last.ckpt").exists() for v in versions(self.path)[-1:])

    def record(self, command: Sequence[str], **result: Any) -> None:
        """Write ``run.json``."""
        content = {"parameters": dict(self.run.parameters), "command": list(command), **result}
        _write_json(self.path / "run.json", content)


def write_plan(folder: Path, study: Study, runs: Sequence[PlannedRun]) -> None:
    """Write ``study.json``: all runs that the study has, so that a report can name those that are missing.

    Runs that it had before and that have begun stay: those that ``--only`` leaves out, or whose values were taken out.
    """
    file, before = folder / "study.json", list[dict[str, Any]]()
    with suppress(OSError, ValueError, TypeError, KeyError):
        before = [run for run in json.loads(file.read_text())["runs"] if versions(folder / run["folder"])]
    planned = [{"folder": run.name, "label": run.label, "parameters": dict(run.parameters)} for run in runs]
    planned += [run for run in before if run["folder"] not in {run.name for run in runs}]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(file, {"name": study.name, "method": study.method, "metric": study.metric, "runs": planned})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def log_tail(path: Path, lines: int = 8) -> str:
    """What a run said last: from its last line that speaks of an error, or else its last line."""
    try:
        text = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    begin = next((i for i in reversed(range(len(text))) if _ERROR.match(text[i])), max(0, len(text) - 1))
    return "\n".join(text[begin : begin + lines])


def now() -> str:
    """The present time, for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S")
