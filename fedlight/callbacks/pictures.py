"""The pictures of a run: accuracy, loss and learning rate by rounds, and the partition."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlight.analysis.pictures import drawn, line_style
from fedlight.callbacks._rounds import RoundCallback
from fedlight.data.datamodule import class_counts
from fedlight.data.picture import partition_csv, save_partition_picture
from fedlight.data.reading import class_names
from fedlight.run.folder import atomic_write
from fedlight.run.loggers import log_picture, read_metrics
from fedlight.run.names import aggregate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ELSEWHERE = ("round", "clients", "time", "comm", "hessian", "man")
_PANELS: dict[str | None, str] = {"max,last": "accuracy", "min,last": "loss"}


class Curves(RoundCallback):
    """Draws ``plots/curves.png`` at the end of a run of two rounds or more, also of one that is interrupted.

    Every run has it, unless ``trainer.enable_plots`` is false; loggers that take pictures get it, too.
    """

    optional_hooks = ("on_train_end",)
    _news = False

    def on_round_end(self, trainer: Any, pl_module: Any) -> None:
        """There is something to draw."""
        self._news = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw it; a fit that trained nothing leaves the picture of its run as it is, if there is one."""
        if trainer.run_dir is None or not trainer.is_global_zero:
            return
        picture = Path(trainer.run_dir) / "plots" / "curves.png"
        if not self._news and picture.exists():
            return
        self._news = False
        rows = read_metrics(Path(trainer.run_dir) / "metrics.csv")
        if len(rows) > 1:
            draw_curves(rows, picture)
            log_picture(trainer.loggers, "curves", picture)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Draw what there is; where that fails, too, the exception says enough."""
        with suppress(Exception):
            self.on_train_end(trainer, pl_module)


class PartitionPicture(RoundCallback):
    """Writes ``plots/partition.png`` and ``partition.csv``: which client holds how many samples of which class.

    Every run whose datamodule knows its labels has one. It is drawn after the first round, so that training starts
    without waiting for it, and handed to the loggers that take pictures.
    """

    optional_hooks = ("on_round_end",)

    def on_round_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw it, once."""
        if trainer.run_dir is None or not trainer.is_global_zero:
            return
        picture, table = Path(trainer.run_dir) / "plots" / "partition.png", Path(trainer.run_dir) / "partition.csv"
        counts = None if table.exists() else class_counts(trainer.datamodule)
        if counts is None:
            return
        names = class_names(trainer.datamodule)
        picture.parent.mkdir(exist_ok=True)
        save_partition_picture(counts, picture, names)
        atomic_write(table, partition_csv(counts, names).encode())  # last: what a killed run was drawing is drawn anew
        log_picture(trainer.loggers, "partition", picture)


def draw_curves(rows: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """A panel each for the accuracies, the losses and the learning rate that ``metrics.csv`` has, or one; from round 1.

    Other metrics are drawn where there are none of these.
    """
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if not name.startswith(_ELSEWHERE)]
    kinds = {name: "learning rate" if name == "lr" else _PANELS.get(aggregate(name), "value") for name in names}
    titles = [title for title in (*_PANELS.values(), "learning rate") if title in kinds.values()] or ["value"]

    def plot(figure: "Figure") -> None:
        for axes, title in zip(figure.subplots(1, len(titles), squeeze=False).flat, titles, strict=True):
            shown = [name for name, kind in kinds.items() if kind == title]
            for i, name in enumerate(shown):
                points = [(row["round"] + 1, row[name]) for row in rows if name in row]
                axes.plot(*zip(*points, strict=True), label=name, **line_style(i, marker=len(points) < 15))
            axes.set(xlabel="round", ylabel=title)
            axes.locator_params(axis="x", integer=True)
            if len(shown) > 1:
                axes.legend(fontsize=8, handlelength=3)

    return drawn(path, plot, (4.2 * len(titles), 3.4))
