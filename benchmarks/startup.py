"""What it takes until fedlight has started, beside what torch and Lightning take of it.

usage: python benchmarks/startup.py [--repeat 5] [--checkout PATH ...] [--without PACKAGE ...]

Each line of the table is a process, start to end. They take turns, and the table has the least of the repeats: CPU
seconds (user and system), which other work on the machine changes less than it changes what the clock says, seconds of
the clock, and the modules that are loaded at the end. fedlight's commands load without collecting garbage, and so does
the third line: what fedlight adds is the difference to it. Other checkouts of fedlight, older ones perhaps, are
measured in the same run. With ``--without`` the processes see all installed packages but those: `transformers`, which
fedlight does not ask for and torchmetrics loads where it finds it, or all that a site does not need.
"""

import argparse
import os
import platform
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path

COUNT = "import atexit, sys; atexit.register(lambda: print('MODULES', len(sys.modules), file=sys.stderr)); "
LIGHTNING = "import torch, lightning.pytorch.cli; torch.optim.SGD([torch.zeros(1)], lr=0.1)"
FLOOR = {
    "`import torch`": "import torch",
    "Lightning's command line, an optimizer": LIGHTNING,
    "the same, garbage left alone": f"import gc; gc.disable(); {LIGHTNING}; gc.freeze()",
}
COMMAND = "from fedlight.__main__ import main; sys.argv = ['fedlight', *{!r}]; main()"
ROUND = ["--trainer.max_rounds=1", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]


def lines(checkout: Path, folder: str) -> dict[str, str]:
    """The programs that need fedlight, by what they are called in the table."""
    fit = ["fit", "-c", str(checkout / "configs" / "quickstart.yaml"), f"--trainer.default_root_dir={folder}", *ROUND]
    return {
        "`from fedlight import FederatedTrainer`": "from fedlight import FederatedTrainer",
        "`fedlight fit --help`": COMMAND.format(["fit", "--help"]),
        "`fedlight fit -c quickstart`, one round": COMMAND.format(fit),
        "the same without pictures": COMMAND.format([*fit, "--trainer.enable_plots=false"]),
    }


def few_packages(folder: Path, without: Collection[str]) -> Path:
    """Fill a folder with links to what is installed, and leave some packages out."""
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if re.split(r"[-.]", entry.name.lower())[0] not in without and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def run(code: str, path: list[str], folder: str) -> tuple[float, float, int]:
    """CPU seconds, seconds of the clock, and modules of a Python process.

    Raises:
        RuntimeError: if it fails.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "XDG_CACHE_HOME": tempfile.mkdtemp(dir=folder)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # to compile files is not what is measured
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-S", "-c", COUNT + code], cwd=folder, env=environment, capture_output=True, text=True
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    count = re.search(r"MODULES (\d+)", done.stderr)
    if done.returncode or count is None:
        raise RuntimeError(next(line for line in reversed(done.stderr.splitlines()) if "MODULES" not in line))
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, seconds, int(count[1])


def main() -> None:
    """Run all lines in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--checkout", nargs="*", default=[], type=Path, metavar="PATH")
    parser.add_argument("--without", nargs="*", default=[], metavar="PACKAGE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packages = Path(folder) / "packages"
        packages.mkdir()
        few_packages(packages, arguments.without)
        programs = {name: (code, [str(packages)]) for name, code in FLOOR.items()}
        for i, checkout in enumerate([*arguments.checkout, Path(__file__).parents[1]]):
            of = f" ({checkout.name})" if i < len(arguments.checkout) else ""
            found = lines(checkout.resolve(), folder).items()
            programs |= {name + of: (code, [str(checkout.resolve()), str(packages)]) for name, code in found}
        results: dict[str, list[tuple[float, float, int]]] = {name: [] for name in programs}
        for turn in range(arguments.repeat + 1):
            for name, (code, path) in programs.items():
                try:
                    measured = run(code, path, folder)
                except RuntimeError as error:
                    print(f"{name} is left out: {error}", flush=True)
                    continue
                if turn:  # the first compiles what is not compiled yet
                    results[name].append(measured)
    absent = f"; without {', '.join(arguments.without)}" * bool(arguments.without)
    print(f"\n{platform.machine()}, {os.cpu_count()} cores; torch {version('torch')}{absent}\n")
    print("| | CPU s | s | modules |")
    print("|---|---|---|---|")
    for name, found in results.items():
        if found:
            cpu, clock, modules = map(min, zip(*found, strict=True))
            print(f"| {name} | {cpu:.2f} | {clock:.2f} | {modules:,} |")


if __name__ == "__main__":
    main()
