"""``fedlight new``: the folder of a new project, which trains at once."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlight.cli.configs import shipped


def main(args: Sequence[str]) -> int:
    """Copy the templates; the exit code is 2 where the folder cannot be made."""
    if len(args) != 1 or args[0].startswith("-"):
        print("usage: fedlight new FOLDER\n\nWrites module.py, config.yaml, sweep.yaml, a test and a README to FOLDER.")
        return 0 if args and args[0] in ("-h", "--help") else 2
    folder = Path(args[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if found := sorted(p.name for p in folder.iterdir()):
            raise FileExistsError(f"it holds {', '.join(found[:3])}; name a folder that is new or empty")
        name = re.sub(r"[^\w-]+", "-", folder.resolve().name).strip("-") or "my_project"
        for file in sorted(p for p in shipped("templates").iterdir() if p.is_file()):
            (folder / file.name).write_text(file.read_text().replace("my_project", name))
    except OSError as error:
        print(f"fedlight: error: new {folder}: {error.strerror or error}.", file=sys.stderr)
        return 2
    go = f"  cd {shlex.quote(str(folder))}\n  fedlight fit -c config.yaml"
    print(f"{folder}/ trains at once:\n\n{go}\n\nREADME.md says what is what.")
    return 0
