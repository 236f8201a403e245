"""Continuing a run: which file is read, and by whom that is decided."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from fedlight.checkpoint import load_checkpoint
from fedlight.run_folder import RunFolder

if TYPE_CHECKING:
    from fedlight._session import Session


def decided(fabric: Fabric, decide: Callable[[], Path]) -> Path:
    """What the first process decides; where it fails, it fails in every process."""
    path, failure = Path(), None
    if fabric.global_rank == 0:
        try:
            path = decide()
        except MisconfigurationException as error:
            failure = str(error)
    path, failure = fabric.broadcast((path, failure))
    if failure is not None:
        raise MisconfigurationException(failure)
    return path


def read_checkpoint(session: "Session", wanted: str | Path) -> tuple[dict[str, Any], Path, RunFolder | None]:
    """Read ``ckpt_path``, and say in a line which file that is.

    Returns:
        The checkpoint, its path, and the folder of its run, if it lies in one.
    """
    trainer, path = session.trainer, Path(wanted)
    if wanted in ("last", "best"):
        where = trainer.default_root_dir, trainer.name, str(wanted), trainer.run_dir
        path = decided(session.fabric, lambda: RunFolder.newest(*where).checkpoint(str(wanted)))
    checkpoint = load_checkpoint(path)
    run = path.parent.parent if path.parent.name == "checkpoints" else path.resolve().parent.parent
    folder = RunFolder(run) if path.resolve().parent.name == "checkpoints" else None
    round = checkpoint["fedlight"]["server"]["round"]
    if session.command != "fit":
        rank_zero_info(f"Reading {path}, written after {round} rounds.")
        return checkpoint, path, folder
    later = 0 if folder is None else folder.rounds() - round
    again = f"; {later} later rounds in its folder are trained again" if later > 0 else ""
    ended = f"; trainer.max_rounds={trainer.max_rounds} leaves none to train" if round >= trainer.max_rounds else again
    rank_zero_info(f"Continuing {path} from round {round}{ended}.")
    return checkpoint, path, folder
