"""The folder that a run leaves behind: ``<default_root_dir>/<name>/version_<n>/``."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException


class RunFolder:
    """One run's folder, locked while the run is alive, so that no two runs write to it.

    Args:
        path: the folder; it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, root: Path, name: str) -> "RunFolder":
        """Make the next ``version_<n>`` below ``root/name``.

        Raises:
            MisconfigurationException: if the folder cannot be written to.
        """
        parent = root / name
        try:
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                path = parent / f"version_{max(versions(parent), default=-1) + 1}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:  # another run took it in between
                    continue
            (path / "checkpoints").mkdir()
            (path / "plots").mkdir()
        except OSError as error:
            raise unwritable(parent, error) from error
        return cls(path)

    @classmethod
    def latest(cls, root: Path, name: str, checkpoint: str) -> "RunFolder":
        """The newest version below ``root/name`` that holds ``checkpoints/<checkpoint>.ckpt``.

        Raises:
            MisconfigurationException: if there is none.
        """
        for version in sorted(versions(root / name), reverse=True):
            path = root / name / f"version_{version}"
            if (path / "checkpoints" / f"{checkpoint}.ckpt").exists():
                return cls(path)
        raise MisconfigurationException(
            f"ckpt_path={checkpoint!r}: no run below {root / name} has a checkpoint of that name."
            " Check trainer.default_root_dir and trainer.name, or give the path of a file."
        )

    def lock(self) -> None:
        """Hold the folder for this process.

        Raises:
            MisconfigurationException: if another process holds it, or it cannot be written to.
        """
        try:
            self._lock = (self.path / ".lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n")  # found out now if nothing can be written
            self._lock.flush()
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

    def discard_if_unused(self) -> bool:
        """Remove the folder of a run that ended before its first round; whether it was removed."""
        if (self.path / "metrics.csv").exists():
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        return True

    def unlock(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def checkpoint(self, name: str) -> Path:
        """Path of a checkpoint."""
        return self.path / "checkpoints" / f"{name}.ckpt"

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file at once or not at all."""
        atomic_write(self.path / name, json.dumps(content, indent=2, allow_nan=True).encode())


def versions(parent: Path) -> list[int]:
    """The version numbers that exist below a folder."""
    if not parent.is_dir():
        return []
    found = (re.fullmatch(r"version_(\d+)", p.name) for p in parent.iterdir() if p.is_dir())
    return sorted(int(m[1]) for m in found if m)


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Write to a temporary file, sync it and rename it: a torn file never replaces a good one.

    Raises:
        OSError: if the disk is full or read-only; the old file is then untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> MisconfigurationException:
    """The error for a folder that cannot be written to."""
    reason = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota is used up",
        errno.ENOENT: "a folder or file is gone",
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
