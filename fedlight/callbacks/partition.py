"""The picture and the table of a run's partition."""

from pathlib import Path
from typing import Any

from fedlight.callbacks._rounds import RoundCallback
from fedlight.data.picture import partition_csv, save_partition_picture
from fedlight.run.folder import atomic_write
from fedlight.run.loggers import log_picture


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
        picture = Path(trainer.run_dir) / "plots" / "partition.png"
        counts = None if picture.exists() else trainer.datamodule.partition_counts()
        if counts is None:
            return
        names = getattr(trainer.datamodule, "classes", None) or None
        picture.parent.mkdir(exist_ok=True)
        save_partition_picture(counts, picture, names)
        atomic_write(Path(trainer.run_dir) / "partition.csv", partition_csv(counts, names).encode())
        log_picture(trainer.loggers, "partition", picture)
