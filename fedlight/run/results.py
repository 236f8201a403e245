"""What commands leave behind that look at trained weights: where it goes, and the record of it."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlight.run.context import RunContext
from fedlight.run.folder import RunFolder, optional
from fedlight.run.loggers import tell


def destination(run: RunContext, output: str | Path | None = None) -> tuple[Path, str]:
    """The folder that results go to, and what their files are called after: the checkpoint.

    It is the run's; for weights of no run, ``<default_root_dir>/<name>/analysis/``.
    """
    trainer, stem = run.trainer, run.checkpoint_path.stem if run.resumed else "model"
    own = trainer.run_dir if not run.resumed else None if run.folder is None else run.folder.path
    return Path(output or own or trainer.default_root_dir / trainer.name / "analysis"), stem


def keep(run: RunContext, name: str, metrics: Mapping[str, float], folder: Path, **how: Any) -> None:
    """Hand metrics of evaluated weights to the loggers, and add a record of them to ``<name>_metrics.json``.

    The file holds a list, the newest record last. One of the same checkpoint, rounds and settings is replaced; those of
    other checkpoints, or of other rounds under the same name, stay. A file that cannot be written is warned of.

    Args:
        run: what evaluated them, in the first process.
        name: of what was done: ``test``, ``validate``, ``analyze``.
        metrics: by their names.
        folder: where the file is.
        how: settings that make a difference, of which None is left out.
    """
    rounds = run.trainer.current_round if run.resumed else None  # nobody knows what trained a module as it is
    row = {**metrics} if rounds is None else {**metrics, "round": rounds - 1.0}
    tell(run.loggers, lambda logger: logger.log_metrics(row, step=None if rounds is None else rounds - 1))
    about = {"checkpoint": checkpoint_name(run, folder), "rounds": rounds}
    about |= {key: value for key, value in how.items() if value is not None}
    path = folder / f"{name}_metrics.json"
    with optional(run, f"{path}: writing"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # two evaluations of a run may end at the same time
            kept = json.loads(path.read_text()) if path.exists() else []
            kept = [record for record in kept if {k: v for k, v in record.items() if k != "metrics"} != about]
            RunFolder(folder).write_json(path.name, [*kept, {**about, "metrics": dict(metrics)}])
        finally:
            os.close(handle)


def checkpoint_name(run: RunContext, folder: Path) -> str | None:
    """The checkpoint's path, in its run's folder from there; None for a module as it is."""
    if not run.resumed:
        return None
    path = run.checkpoint_path.resolve()
    return str(path.relative_to(folder.resolve()) if path.is_relative_to(folder.resolve()) else path)
