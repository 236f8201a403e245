"""The table of what each client did in each round."""

import csv
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from fedlight.callbacks._rounds import RoundCallback
from fedlight.run.folder import atomic_write, writing
from fedlight.run.loggers import csv_line, csv_number, tell

_FIRST = ("round", "client", "samples", "steps", "used", "up_bytes")


class ClientMetrics(RoundCallback):
    """Writes ``clients.csv``: a row for each client that trained or was evaluated in a round.

    Its columns are ``round``, ``client``, ``samples`` (n_i), ``steps`` (local steps), ``used`` (1 where the server used
    its message), ``up_bytes`` (size of the message), and then whatever the module logs of it, in training and in
    validation on its own data; no value where it was not asked. A client that was evaluated only has 0 steps and bytes.

    W&B gets the table ``clients`` when the fit ends.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._columns: list[str] = []
        self._rows = self._sum = 0
        self._known: dict[str, int] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue the file with the rows of the rounds that the checkpoint has."""
        self._path = None if trainer.run_dir is None else Path(trainer.run_dir) / "clients.csv"
        self._columns, self._rows, self._sum = list(_FIRST), 0, 0
        if self._path is None or not trainer.is_global_zero:
            return
        kept = [row for row in _read(self._path) if int(row["round"]) < trainer.current_round]
        if self._path.exists():
            self._add(kept, anew=True)
        if self._known not in (None, self.state_dict()):
            rank_zero_warn(f"{self._path}: rows of the first {trainer.current_round} rounds are missing or damaged.")
        self._known = None

    def on_round_metrics(self, trainer: Any, pl_module: Any) -> None:
        """Write the rows of a round; before any callback may write a checkpoint of it."""
        if self._path is None or not trainer.is_global_zero:
            return
        reports, evaluated = {report.client: report for report in trainer.client_reports}, trainer.client_val_metrics
        rows = []
        for client in sorted({*reports, *evaluated}):
            report, samples = reports.get(client), trainer.datamodule.client_size(client)
            counts = (0, 0, 0) if report is None else (report.num_steps, report.used, report.up_bytes)
            first = dict(zip(_FIRST, (trainer.current_round - 1, client, samples, *counts), strict=True))
            logged = {**({} if report is None else report.values), **evaluated.get(client, {})}
            rows.append({k: csv_number(v) for k, v in (first | logged | first).items()})
        self._add(rows)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The rows are on the disk before a checkpoint that has their rounds."""
        if self._path is not None and self._path.exists():
            with writing(self._path), self._path.open("rb") as file:
                os.fsync(file.fileno())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Hand the table to the loggers that take tables."""
        takers = [logger for logger in trainer.loggers if hasattr(logger, "log_table")]
        if takers and self._path is not None:
            data = [[float(row[c]) if c in row else None for c in self._columns] for row in _read(self._path)]
            tell(takers, lambda logger: logger.log_table("clients", columns=self._columns, data=data))

    def state_dict(self) -> dict[str, Any]:
        """How many rows there are, and the checksum of them."""
        return {"rows": self._rows, "sum": self._sum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the file is compared with when the fit goes on."""
        self._known = dict(state_dict)

    def _add(self, rows: list[dict[str, str]], anew: bool = False) -> None:
        """Append rows; with new columns, or ``anew``, write the whole file."""
        assert self._path is not None
        known, self._columns = len(self._columns), list(dict.fromkeys([*self._columns, *(k for r in rows for k in r)]))
        self._rows += len(rows)
        for row in rows:
            self._sum = zlib.crc32(str(sorted(row.items())).encode(), self._sum)
        with writing(self._path):
            if anew or known < len(self._columns) or not self._path.exists():
                before = [] if anew else list(_read(self._path))
                lines = csv_line(self._columns) + self._lines([*before, *rows])
                atomic_write(self._path, lines.encode())
            else:
                with self._path.open("a", newline="") as file:
                    file.write(self._lines(rows))

    def _lines(self, rows: Iterable[dict[str, str]]) -> str:
        return "".join(csv_line([row.get(column, "") for column in self._columns]) for row in rows)


def _read(path: Path) -> Iterable[dict[str, str]]:
    """The rows that can be read, each with the columns that it has a value for; a torn last line is none."""
    lines = path.read_bytes().decode(errors="replace").split("\n")[:-1] if path.exists() else []
    header = next(csv.reader(lines[:1]), [])
    for cells in csv.reader(line for line in lines[1:] if "\0" not in line):
        row = {name: cell for name, cell in zip(header, cells, strict=False) if cell != ""}
        if len(cells) == len(header) and all(row.get(name, "").isdigit() for name in _FIRST):
            yield row
