"""The folder that a run leaves behind: ``<default_root_dir>/<name>/version_<n>/``."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

HISTORY = "config_history"
"""Where a run keeps the configurations that it had before, and what was changed."""


def place(text: str) -> Path:
    """A path of a command line: ``~`` is the home, also behind ``--output=``, where shells leave it."""
    return Path(os.path.expanduser(text))


class RunFolder:
    """One run's folder, locked while the run is alive, so that no two runs write to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None
        self._above: list[Path] = []

    @classmethod
    def create(cls, root: Path, name: str) -> "RunFolder":
        """Make the next ``version_<n>`` below ``root/name``.

        Raises:
            MisconfigurationException: if the folder cannot be written to.
        """
        parent = root / name
        above = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        with writing(parent):
            while True:
                parent.mkdir(parents=True, exist_ok=True)
                path = parent / f"version_{max(versions(parent), default=-1) + 1}"
                # Another run may have taken it in between, or failed and removed the folder above.
                with suppress(FileExistsError, FileNotFoundError):
                    path.mkdir()
                    break
        for version in versions(parent):
            cls(parent / f"version_{version}").remove_unfinished()
        folder = cls(path)
        folder._above = above
        return folder

    @classmethod
    def newest(cls, root: Path, name: str, checkpoint: str, own: Path | None = None) -> "RunFolder":
        """The newest version below ``root/name``, or a trainer's ``own`` run; it has ``checkpoints/<checkpoint>.ckpt``.

        Raises:
            MisconfigurationException: if it has not. An older run is never taken in its place.
        """
        runs = [cls(root / name / f"version_{version}") for version in reversed(versions(root / name))]
        run = cls(own) if own is not None else next(iter(runs), None)
        if run is None:
            raise MisconfigurationException(
                f"ckpt_path={checkpoint!r}: no run below {root / name} has a checkpoint of that name."
                " Check trainer.default_root_dir and trainer.name, or give the path of a file."
            )
        if run.checkpoint(checkpoint).exists():
            return run
        held = sorted(run.checkpoint(checkpoint).parent.glob("*.ckpt"))
        others = (file for other in runs if (file := other.checkpoint(checkpoint)).exists())
        older = next((f" The newest run that has one is another: ckpt_path={file}." for file in others), "")
        raise MisconfigurationException(
            f"ckpt_path={checkpoint!r}: {'the newest run' if own is None else 'the run of this trainer'}, {run.path},"
            f" has no checkpoint of that name{' yet; it is still training' if is_locked(run.path) else ''}."
            f" {f'It has ckpt_path={held[-1]}' if held else 'To begin it anew, fit without ckpt_path'}."
            f"{run.why_no_best() if checkpoint == 'best' else ''}{older}"
        )

    def lock(self) -> None:
        """Hold the folder for this process.

        Raises:
            MisconfigurationException: if another process holds it, or it cannot be written to.
        """
        try:
            self._lock = (self.path / ".lock").open("ab", buffering=0)  # what cannot be written does not wait for close
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n".encode())  # found out now if nothing can be written
            self.remove_unfinished(held=True)
        except BlockingIOError as error:
            self.unlock()
            raise MisconfigurationException(
                f"{self.path} is in use by another run. Wait for it, or start a new version without ckpt_path."
            ) from error
        except OSError as error:
            self.unlock()
            raise unwritable(self.path, error) from error

    def check_room(self, num_bytes: int) -> None:
        """Refuse a disk without room for what a run is sure to write.

        Raises:
            MisconfigurationException: if less than ``num_bytes`` are free.
        """
        free = shutil.disk_usage(self.path).free
        if free < num_bytes:
            raise MisconfigurationException(
                f"trainer.default_root_dir: {self.path} has {free / 1e6:.1f} MB left, and a checkpoint needs"
                f" {num_bytes / 1e6:.1f} MB. Make room, or set trainer.default_root_dir to another disk."
            )

    def discard_if_unused(self, begun: int = 0) -> bool:
        """Remove the folder of a run that ended before a round, having ``begun`` with some; whether it was removed."""
        if self.rounds() > begun or any(self.path.glob("checkpoints/*.ckpt")):
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # something else may be in them by now
            for folder in self._above:
                folder.rmdir()
        return True

    def rounds(self) -> int:
        """Rounds that ``metrics.csv`` has; at least 1 where it cannot be read."""
        try:
            return max(0, (self.path / "metrics.csv").read_bytes().count(b"\n") - 1)
        except FileNotFoundError:
            return 0
        except OSError:
            return 1

    def why_no_best(self) -> str:
        """What best.ckpt waits for, and what the module logged by the columns of ``metrics.csv``."""
        try:
            header = (self.path / "metrics.csv").read_text(errors="replace").partition("\n")[0].strip()
        except OSError:
            return ""
        own = ("", "round", "lr", "time", "comm", "clients", "hessian")
        logged = ", ".join(name for name in header.split(",") if name.split("/")[0] not in own) or "nothing"
        return f" best.ckpt is written when what Checkpoint monitors is logged in validation; logged was: {logged}."

    def remove_unfinished(self, held: bool = False) -> None:
        """Remove files that a killed run was writing, unless another run has the folder."""
        files = [file for pattern in (".*.tmp", "*/.*.tmp") for file in self.path.glob(pattern)]
        if files and (held or not is_locked(self.path)):
            with suppress(OSError):
                for file in files:
                    file.unlink(missing_ok=True)

    def unlock(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def checkpoint(self, name: str) -> Path:
        """Path of a checkpoint."""
        return self.path / "checkpoints" / f"{name}.ckpt"

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file at once or not at all."""
        atomic_write(self.path / name, json.dumps(content, indent=2, allow_nan=True).encode())


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds by its keys; nothing where it cannot be read or holds no keys."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_summary(run: Path) -> dict[str, Any]:
    """The ``summary.json`` of a run, which is finished if it is whole; else nothing."""
    found = read_json(run / "summary.json")
    return found if isinstance(found.get("final"), dict) else {}


def keep_config(run: Path, round: int, same: bool) -> None:
    """Keep ``config.yaml`` as ``config_history/rounds_<first>-<last>.yaml``, unless it goes on as the ``same``."""
    history, begin = run / HISTORY, 0
    for path in history.glob("rounds_*-*.yaml"):
        first, last = map(int, path.stem.removeprefix("rounds_").split("-"))
        if first >= round:
            path.unlink()
        elif last >= round:
            path.rename(history / f"rounds_{first}-{round - 1}.yaml")
        begin = max(begin, last + 1)
    if begin < round and not same:
        history.mkdir(exist_ok=True)
        shutil.copyfile(run / "config.yaml", history / f"rounds_{begin}-{round - 1}.yaml")


def is_locked(run: Path) -> bool:
    """Whether a process holds the folder of a run."""
    try:
        with (run / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def versions(parent: Path) -> list[int]:
    """The version numbers that exist below a folder."""
    if not parent.is_dir():
        return []
    found = (re.fullmatch(r"version_(\d+)", p.name) for p in parent.iterdir() if p.is_dir())
    return sorted(int(m[1]) for m in found if m)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write to a temporary file, sync it and rename it: a torn file never replaces a good one.

    Raises:
        OSError: if the disk is full or read-only; the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file as :func:`atomic_file` does."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        raise unwritable(path, OSError(errno.ENOSPC, "torch's writer has no room")) from error


@contextmanager
def optional(owner: Any, what: str) -> Iterator[None]:
    """What a run can do without: a picture, a table, a logger. Its owner's first failure is said, and no other."""
    try:
        yield
    except Exception as error:
        if not getattr(owner, "failure_was_said", False):
            owner.failure_was_said = True
            rank_zero_warn(f"{what} failed, and the run goes on without it: {type(error).__name__}: {error}")


def unwritable(path: Path, error: OSError) -> MisconfigurationException:
    """The error for a folder that cannot be written to."""
    reason = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota is used up",
        errno.ENOENT: f"{error.filename} is gone",
        errno.EMFILE: "too many files are open; `ulimit -n` allows more",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission is denied",
        errno.EPERM: "permission is denied",
        errno.ENOTDIR: "a part of the path is a file",
        errno.EEXIST: "a part of the path is a file",
    }.get(error.errno or 0, str(error))
    return MisconfigurationException(
        f"trainer.default_root_dir: cannot write to {path}: {reason}. Choose another folder."
    )
