"""fedlight beside other frameworks on one machine: the same model, data, clients, epochs and batches.

usage: python benchmarks/peers.py [--workload digits|small|cnn] [--only NAME ...] [--repeat 3]

Each framework is installed from PyPI into a virtual environment of its own (below ``--folder``), which sees the
packages of the present one, so that all of them run the same torch. What cannot be installed is left out, and said so.
They take turns, ``--repeat`` times over, so that whatever else the machine does meets all of them alike; the table has
the best of the repeats. A round is training, aggregation and an evaluation of the server's model on the test set; the
first round is left out. ``first`` is the time from setting up to the end of the first round, ``start`` that from the
start of the program, imports included, and ``MB`` the most that the program and its children had in memory, shared
libraries counted once for each process.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

RUNNERS = Path(__file__).parent / "runners"


@dataclass
class Entry:
    """A line of the table.

    Attributes:
        runner: the script.
        rounds: for the digits; a quarter of it for the small CNN, a tenth for the large one.
        packages: what is installed for it; none where the present environment will do.
        distribution: whose version is shown.
        arguments: of the script.
        python: the oldest Python that it takes.
    """

    runner: str
    rounds: int = 20
    packages: tuple[str, ...] = ()
    distribution: str = "torch"
    arguments: tuple[str, ...] = ()
    python: tuple[int, int] = (3, 11)
    results: list[dict] = field(default_factory=list)


ENTRIES = {
    "plain PyTorch loop": Entry("plain", 40),
    "fedlight, by default": Entry("fedlight", 200, (), "fedlight", ("--engine", "auto")),
    "fedlight eager": Entry("fedlight", 40, (), "fedlight"),
    "fedlight eager, channels last": Entry("fedlight", 40, (), "fedlight", ("--channels-last",)),
    "fedlight eager, 2 processes": Entry("fedlight", 40, (), "fedlight", ("--processes", "2")),
    "fedlight eager, channels last, 2 processes": Entry(
        "fedlight", 40, (), "fedlight", ("--channels-last", "--processes", "2")
    ),
    "fedlight vmap, 2 processes": Entry("fedlight", 200, (), "fedlight", ("--engine", "vmap", "--processes", "2")),
    "fedlight vmap": Entry("fedlight", 200, (), "fedlight", ("--engine", "vmap")),
    "fedlight vmap, channels last": Entry("fedlight", 200, (), "fedlight", ("--engine", "vmap", "--channels-last")),
    "fedlight vmap, channels last, 2 processes": Entry(
        "fedlight", 200, (), "fedlight", ("--engine", "vmap", "--channels-last", "--processes", "2")
    ),
    "fedlight vmap, compiled": Entry("fedlight", 200, (), "fedlight", ("--engine", "vmap", "--compile")),
    "Flower simulation": Entry("flower", 20, ("flwr[simulation]",), "flwr"),
    "NVFlare simulator": Entry("nvflare", 20, ("nvflare", "pytorch-lightning"), "nvflare"),
    "pfl-research": Entry("pfl", 40, ("pfl[pytorch]",), "pfl"),
    "fluke": Entry("fluke", 40, ("fluke-fl",), "fluke-fl"),
    "BlazeFL": Entry("blazefl", 20, ("blazefl[contrib,reproducibility]",), "blazefl", (), (3, 12)),
}
"""In the order of the table."""


def newest_python(oldest: tuple[int, int]) -> str | None:
    """A Python of at least that version: the present one, or one on the path."""
    if sys.version_info >= oldest:
        return sys.executable
    names = [f"python3.{minor}" for minor in range(oldest[1], 16)]
    for candidate in filter(None, map(shutil.which, names)):
        if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def install(entry: Entry, folder: Path) -> str:
    """The Python that an entry runs with.

    Raises:
        RuntimeError: if it cannot be installed, saying why.
    """
    if not entry.packages:
        return sys.executable
    python = newest_python(entry.python)
    if python is None:
        raise RuntimeError(f"it needs Python {entry.python[0]}.{entry.python[1]} or newer")
    place = folder / entry.runner
    inside = place / "bin" / "python"
    if not (place / "installed").exists():
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([python, "-m", "venv", str(place)], check=True)
        packages = [*entry.packages]
        if python == sys.executable:
            library = subprocess.run(
                [inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            Path(library, "present_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
        else:
            packages.append("scikit-learn")
        print(f"installing {', '.join(packages)} ...", file=sys.stderr, flush=True)
        command = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError("pip: " + (done.stderr.strip().splitlines() or ["failed"])[-1])
        (place / "installed").touch()
    return str(inside)


def run(entry: Entry, python: str, workload: str, threads: int) -> dict:
    """Run an entry once.

    Raises:
        RuntimeError: if it fails.
    """
    if "--processes" in entry.arguments:  # the cores are divided among them
        threads = max(1, threads // int(entry.arguments[entry.arguments.index("--processes") + 1]))
    rounds = {"digits": entry.rounds, "small": max(6, entry.rounds // 8), "cnn": max(4, entry.rounds // 20)}[workload]
    command = [python, str(RUNNERS / f"run_{entry.runner}.py"), "--workload", workload, "--rounds", str(rounds)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(RUNNERS.parents[1]),
        "PYTHONWARNINGS": "ignore",
        "PROCESS_STARTED": str(time.time()),
    }
    command += ["--threads", str(threads), *entry.arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors, text=True)
        most = 0.0
        while process.poll() is None:
            most = max(most, memory(process.pid))
            time.sleep(0.5)
        out.seek(0), errors.seek(0)
        lines = [line for line in out if line.startswith("RESULT ")]
        if not lines:
            raise RuntimeError((errors.read().strip().splitlines() or ["no result"])[-1])
    return {**json.loads(lines[-1].removeprefix("RESULT ")), "mb": most}


def memory(pid: int) -> float:
    """Megabytes that a process and its children have in memory now."""
    try:
        process = psutil.Process(pid)
        return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) / 1e6
    except psutil.Error:  # one of them has just ended
        return 0.0


def installed_version(entry: Entry, python: str) -> str:
    """The version that an entry runs."""
    if python == sys.executable:
        try:
            return version(entry.distribution)
        except PackageNotFoundError:
            return "-"
    code = f"from importlib.metadata import version; print(version({entry.distribution!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def table(names: list[str], pythons: dict[str, str]) -> None:
    """Print the table."""
    best = {name: min(ENTRIES[name].results, key=lambda r: r["round_s"]) for name in names if ENTRIES[name].results}
    fastest = min(r["round_s"] for r in best.values())
    base = best.get("plain PyTorch loop", {}).get("round_s")
    print("| | version | ms a round | x the fastest | x the plain loop | first, s | start, s | MB | accuracy |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, result in sorted(best.items(), key=lambda item: item[1]["round_s"]):
        entry, seconds = ENTRIES[name], result["round_s"]
        accuracy = sum(r["accuracy"] for r in entry.results) / len(entry.results)
        cells = [name, installed_version(entry, pythons[name]), f"{1e3 * seconds:.1f}", f"{seconds / fastest:.1f}"]
        cells += ["" if base is None else f"{seconds / base:.2f}", f"{result['first_s']:.1f}"]
        cells += [f"{result['start_s']:.1f}", f"{result['mb']:,.0f}"]
        print("| " + " | ".join([*cells, f"{accuracy:.3f} ({result['rounds']} rounds)"]) + " |")


def main() -> None:
    """Install, run in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=["digits", "small", "cnn"], default="digits")
    parser.add_argument("--only", nargs="*", choices=[*ENTRIES], default=[*ENTRIES], metavar="NAME")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of all processes of fedlight together")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / ".venvs")
    arguments = parser.parse_args()
    pythons: dict[str, str] = {}
    for name in arguments.only:
        try:
            pythons[name] = install(ENTRIES[name], arguments.folder)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            print(f"{name} is left out: {error}", flush=True)
    for _ in range(arguments.repeat):
        for name, python in list(pythons.items()):
            try:
                ENTRIES[name].results.append(run(ENTRIES[name], python, arguments.workload, arguments.threads))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{name} is left out: {error}", flush=True)
                del pythons[name]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} thread(s)"
    versions = f"torch {version('torch')}, Python {platform.python_version()}"
    print(f"\n{arguments.workload}; {machine}; {versions}\n")
    table(arguments.only, pythons)


if __name__ == "__main__":
    main()
