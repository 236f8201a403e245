"""Where metrics go: ``metrics.csv`` always, W&B and TensorBoard on request."""

import csv
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from fedlight.run import wandb
from fedlight.run.folder import atomic_write, optional

LoggerName = Literal["csv", "wandb", "tensorboard"]


class MetricsCSV(Logger):
    """``metrics.csv``: one row per round; columns appear as their metrics do."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: dict[int, dict[str, float]] = {}
        self._columns = ["round"]
        self._lines: list[str] = []
        self._own: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"metrics.csv has no `{name}`: set trainer.logger to tensorboard, wandb or another one.")

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Version of the run's folder."""
        return self.path.parent.name

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration has a file of its own."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a round's row; what modules log here themselves, without a ``round``, joins the next one."""
        if odd := [k for k, v in metrics.items() if not hasattr(v, "__float__")]:
            raise TypeError(f"metrics.csv takes numbers, and {odd[0]!r} is {metrics[odd[0]]!r:.80}: log it elsewhere.")
        self._own |= {k: float(v) for k, v in metrics.items()}
        if "round" not in metrics:
            return
        metrics, self._own = self._own, {}
        key = int(metrics["round"])
        new_row = key not in self._rows
        row = self._rows.setdefault(key, {})
        row.update({k: float(v) for k, v in metrics.items()} | {"round": key})
        if new_row and row.keys() <= {*self._columns} and self.path.exists():
            self._lines.append(csv_line(self._cells(row)))
            with self.path.open("a", newline="") as file:
                file.write(self._lines[-1])
        else:
            self._rewrite()

    @property
    def text(self) -> str:
        """What the file should hold."""
        return "".join(self._lines)

    def sync(self) -> None:
        """Wait until the rows are on the disk; a file that was taken away is written anew with the next one."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def resume(self, rounds: int, known: str | None) -> None:
        """Take over the rows of the first ``rounds`` rounds, from the checkpoint's ``text`` if it is ``known``."""
        before = read_metrics(self.path) if (there := self.path.exists()) else []
        if known is not None:
            atomic_write(self.path, known.encode())
        self._rows = {int(row["round"]): row for row in read_metrics(self.path) if row["round"] < rounds}
        found = {row["round"]: str(row) for row in before}
        if bad := [r for r in range(rounds) if r not in found or found[r] != str(self._rows.get(r))]:
            what = "the checkpoint does not hold them" if known is None else "they are restored from the checkpoint"
            say = rank_zero_warn if there else rank_zero_info
            named = str([r + 1 for r in bad[:10]])[1:-1]
            say(f"{self.path}: the rows of rounds {named} are missing or damaged; {what}.")
        self._rewrite()

    def _cells(self, row: dict[str, float]) -> list[str]:
        return [csv_number(row[c]) if c in row else "" for c in self._columns]

    def _rewrite(self) -> None:
        self._columns = list(dict.fromkeys(["round", *(k for row in self._rows.values() for k in row)]))
        self._lines = [csv_line(self._columns), *(csv_line(self._cells(self._rows[k])) for k in sorted(self._rows))]
        atomic_write(self.path, self.text.encode())


csv_line: Callable[[list[str]], str] = csv.writer(SimpleNamespace(write=str)).writerow
"""A line of a CSV file: a writer's ``writerow`` returns what ``write`` does."""


def csv_number(value: float) -> str:
    """A number as it is written: whole ones as such, others with all their digits."""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e15 else repr(float(value))


def read_metrics(path: Path, strict: bool = False) -> list[dict[str, float]]:
    """The rows of a ``metrics.csv``, each with the columns that it has a value for.

    A torn last line is left out; so are others that cannot be read or give a round again, which are named in a warning,
    or where this is ``strict`` in a ValueError.
    """
    lines = path.read_bytes().decode(errors="replace").split("\n")[:-1] if path.exists() else []
    rows: dict[float, dict[str, float]] = {}
    bad: list[int] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            header, cells = csv.reader([lines[0], line])
            row = {name: float(cell) for name, cell in zip(header, cells, strict=True) if cell != ""}
            if not row["round"].is_integer() or rows.setdefault(row["round"], row) is not row:
                bad.append(number)
        except (ValueError, KeyError, csv.Error):
            bad.append(number)
    if bad:
        what = f"lines {str(bad[:10])[1:-1]} cannot be read"
        if strict:
            raise ValueError(f"{path.name}: {what}")
        rank_zero_warn(f"{path}: {what}, and are left out.")
    return list(rows.values())


def make_loggers(
    wanted: Logger | LoggerName | list[Logger | LoggerName] | bool | None,
    folder: Path,
    ids: dict[str, str],
    name: str | None = None,
) -> list[Logger]:
    """The loggers of a run in its folder, as ``trainer.logger`` has them; ``metrics.csv`` is always the first.

    ``ids`` are those of an earlier part of the same run, by logger class, and ``name`` is what W&B gets before the
    run's version; the name of the experiment is its group there.
    """
    entries = wanted if isinstance(wanted, list) else [] if wanted in (None, True, False) else [wanted]
    loggers: list[Logger] = [MetricsCSV(folder / "metrics.csv")]
    for entry in entries:
        if entry == "csv":
            continue
        logger = _by_name(entry, folder) if isinstance(entry, str) else entry
        if not isinstance(logger, Logger):
            raise MisconfigurationException(
                f"trainer.logger={entry!r} is no logger: use wandb, tensorboard, csv or the class of a logger."
            )
        if wandb.is_wandb(logger):
            wandb.begin(logger, folder, ids.get(type(logger).__name__), name or folder.parent.name)
        loggers.append(logger)
    return loggers


def _by_name(kind: str, folder: Path) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    if kind == "wandb":
        return WandbLogger()
    if kind == "tensorboard":
        try:
            return TensorBoardLogger(save_dir=folder, name="", version="tensorboard")
        except ModuleNotFoundError as error:
            raise MisconfigurationException(
                'trainer.logger=tensorboard needs TensorBoard: pip install "fedlight[tensorboard]"'
            ) from error
    return kind


def tell(loggers: Iterable[Logger], message: Callable[[Any], object]) -> None:
    """Hand something to every logger: ``metrics.csv`` has to take it, and no other ends a run by failing."""
    for logger in loggers:
        if isinstance(logger, MetricsCSV):
            message(logger)
        else:
            with optional(logger, f"trainer.logger: {type(logger).__name__}"):
                message(logger)


def tell_wandb(loggers: Iterable[Logger], message: Callable[[Any], object]) -> None:
    """Hand something to those loggers that are W&B's."""
    tell(filter(wandb.is_wandb, loggers), message)


def close_loggers(loggers: list[Logger], status: Literal["success", "failed"]) -> None:
    """Finalise every logger, and end the W&B runs that :func:`make_loggers` began."""
    if loggers and isinstance(table := loggers[0], MetricsCSV):
        tell_wandb(loggers, lambda logger: wandb.log_best(logger, table._rows.values()))
    if status == "success":
        tell_wandb(loggers, wandb.upload)
    tell(loggers, lambda logger: logger.finalize(status))
    begun = [logger for logger in loggers if getattr(logger, "begun_here", False)]
    tell(begun, lambda logger: logger.experiment.finish(exit_code=int(status == "failed")))


def logger_ids(loggers: list[Logger]) -> dict[str, str]:
    """The run ids to continue with after a resume, by logger class."""
    of_wandb = (logger for logger in loggers if wandb.is_wandb(logger))
    return {type(logger).__name__: str(logger.version) for logger in of_wandb if logger.version is not None}


def log_picture(loggers: list[Logger], key: str, path: Path) -> None:
    """Send a picture to those loggers that take pictures."""
    if path.exists():
        takers = (logger for logger in loggers if hasattr(logger, "log_image"))
        tell(takers, lambda logger: logger.log_image(key=key, images=[str(path)]))
