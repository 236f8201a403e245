"""What the command line answers without loading torch."""

import difflib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlight import __version__
from fedlight.cli import configs

TRAINERS = ("fit", "validate", "test", "predict", "export", "analyze")
"""The commands that take a configuration."""
COMMANDS = {"study": "fedlight.studies.command", "report": "fedlight.report.command"}
COMMANDS |= {"check-fidelity": "fedlight.cli.fidelity", "deploy": "fedlight.flower.deploy"}
"""Commands of their own, which read their arguments themselves."""


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
        print(f"fedlight {name} needs a configuration. To begin with: fedlight {name} -c quickstart", file=sys.stderr)
        more = "`fedlight configs` lists those that are packaged; `fedlight new my_project` writes one of your own."
        print(more, file=sys.stderr)
        return 2
    known = (*TRAINERS, *COMMANDS, "configs", "new")
    if not name.startswith("-") and name not in known:
        near = "".join(f"; did you mean {n!r}?" for n in difflib.get_close_matches(name, known, 1)) or "."
        print(f"fedlight: error: there is no command {name!r}{near} `fedlight --help` lists them.", file=sys.stderr)
        return 2
    return {"configs": configs.main, "new": new}[name](rest) if name in ("configs", "new") else None


def command_first(args: Sequence[str]) -> list[str]:
    """A command line with the command in front: ``-c FILE fit`` is ``fit -c FILE``."""
    for i, word in enumerate(args):
        before = args[i - 1] if i else ""
        if word in TRAINERS and not (before.startswith("-") and "=" not in before):
            return [word, *args[:i], *args[i + 1 :]]
    return list(args)


def new(args: Sequence[str]) -> int:
    """``fedlight new``: a project that trains at once, from the templates; 2 where the folder cannot be made."""
    if len(args) != 1 or args[0].startswith("-"):
        print("usage: fedlight new FOLDER\n\nWrites module.py, config.yaml, sweep.yaml, a test and a README to FOLDER.")
        return 0 if args and args[0] in ("-h", "--help") else 2
    folder = Path(args[0]).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if found := sorted(p.name for p in folder.iterdir()):
            raise FileExistsError(f"it holds {', '.join(found[:3])}; name a folder that is new or empty")
        name = re.sub(r"[^\w-]+", "-", folder.resolve().name).strip("-") or "my_project"
        for file in sorted(p for p in configs.shipped("templates").iterdir() if p.is_file()):
            (folder / file.name).write_text(file.read_text().replace("my_project", name))
    except OSError as error:
        print(f"fedlight: error: new {folder}: {error.strerror or error}.", file=sys.stderr)
        return 2
    go = f"  cd {shlex.quote(str(folder))}\n  fedlight fit -c config.yaml"
    print(f"{folder}/ trains at once:\n\n{go}\n\nREADME.md says what is what.")
    return 0
