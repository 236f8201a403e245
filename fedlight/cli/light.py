"""What the command line answers without loading torch."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlight import __version__
from fedlight.cli import configs, new

TRAINERS = ("fit", "validate", "test", "predict", "export", "analyze")
"""The commands that take a configuration."""


def light(args: Sequence[str]) -> int | None:
    """Answer a command line and return the exit code, or None where more has to be loaded for it."""
    name, rest = (args[0], args[1:]) if args else ("--help", [])
    if name in ("-h", "--help"):
        print(Path(__file__).with_name("commands.txt").read_text(), end="")
        return 0 if args else 2
    if name == "--version":
        print(f"fedlight {__version__}")
        return 0
    if name in TRAINERS and not rest:
        print(
            f"fedlight {name} needs a configuration. To begin with: fedlight {name} -c quickstart\n"
            "`fedlight configs` lists those that are packaged; `fedlight new my_project` writes one of your own.",
            file=sys.stderr,
        )
        return 2
    return {"configs": configs.main, "new": new.main}[name](rest) if name in ("configs", "new") else None


def command_first(args: Sequence[str]) -> list[str]:
    """A command line with the command in front: ``-c FILE fit`` is ``fit -c FILE``."""
    for i, word in enumerate(args):
        before = args[i - 1] if i else ""
        if word in TRAINERS and not (before.startswith("-") and "=" not in before):
            return [word, *args[:i], *args[i + 1 :]]
    return list(args)
