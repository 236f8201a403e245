"""``fedlight ... --help`` at once: what it printed before, for as long as nothing changes that it is made of.

To print the help all of torch and Lightning has to be loaded, which takes seconds. This module loads neither.
"""

import contextlib
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_MADE_OF = ("torch", "lightning", "jsonargparse", "torchmetrics", "torchvision")
_KEPT = 20


def print_help(args: Sequence[str], make: Callable[[], object]) -> bool:
    """Print what ``make``, which exits, prints for a command line, from the cache if it is there; False for no help."""
    if not 1 <= len(args) <= 2 or args[-1] not in ("--help", "-h") or args[0].startswith("-") != (len(args) == 1):
        return False
    path = _folder() / f"{_key(args)}.txt"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        sys.stdout.write(path.read_text(encoding="utf-8"))
        return True
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            make()
    except SystemExit as stop:
        sys.stdout.write(text.getvalue())
        if stop.code not in (None, 0):
            raise
    with contextlib.suppress(OSError):
        _keep(path, text.getvalue())
    return True


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedlight" / "help"


def _key(args: Sequence[str]) -> str:
    """Changes with the arguments, the terminal, the versions of what the help is made of, and fedlight's files."""
    parts = [*args, sys.version, shutil.get_terminal_size().columns, sys.stdout.isatty(), os.environ.get("NO_COLOR")]
    for name in _MADE_OF:
        with contextlib.suppress(PackageNotFoundError):
            found = distribution(name)
            parts += [name, found.version, str(found.locate_file(""))]
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        status = file.stat()
        parts += [str(file), status.st_mtime_ns, status.st_size]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    for old in sorted(path.parent.glob("*.txt"), key=lambda p: p.stat().st_mtime, reverse=True)[_KEPT:]:
        old.unlink()
