"""Which runs a study consists of, the command of each, and what is kept on disk: ``<root>/<study>/study.json``."""

import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.run.folder import atomic_write, read_summary, versions, writing
from fedlight.seeding import derive_seed
from fedlight.studies.study import Study

_FOLDER = ("trainer.default_root_dir", "trainer.name")
_ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study: what it is given, in order; the name of its folder; and what tells it from other runs."""

    parameters: Mapping[str, Any]
    name: str
    label: str


def plan(study: Study, count: int | None = None, folder: Path | None = None) -> list[PlannedRun]:
    """All runs of a study, at most ``count`` and ``run_cap``. The same study gives the same runs.

    Those that have begun in its ``folder`` keep their names, whose labels tell of what varied then.
    """
    limit = min((n for n in (count, study.run_cap) if n is not None), default=None)
    if study.method == "random" and limit is None:
        why = "a random study needs a number of runs: set run_cap in its YAML, or pass --count."
        raise MisconfigurationException(f"{study.name}: {why}")
    chosen = list(itertools.islice(_grid(study) if study.method == "grid" else _draws(study), limit))
    varying = sorted({names[0] for names, distribution in study.parameters.items() if distribution.varies})
    once = {run.name: run for run in (_planned(study, parameters, varying) for parameters in chosen)}
    if again := len(chosen) - len(once):
        rank_zero_info(f"{study.name}: {again} of {len(chosen)} runs have the parameters of another: each is run once.")
    begun = {p.name[-8:]: p.name for p in folder.glob("*-????????") if versions(p)} if folder else {}
    begun |= {name[-8:]: name for name in once if folder and versions(folder / name)}
    return [replace(run, name=begun.get(name[-8:], name)) for name, run in once.items()]


def _grid(study: Study) -> Iterator[dict[str, Any]]:
    """Every combination; the last parameter changes fastest."""
    for values in itertools.product(*(d.values() for d in study.parameters.values())):
        yield _nested(dict(zip(study.parameters, values, strict=True)))


def _draws(study: Study) -> Iterator[dict[str, Any]]:
    """Draws. A parameter's i-th value depends on its name and i only, so that another parameter changes nothing."""
    for index in itertools.count():
        rngs = {names: random.Random(derive_seed(0, "study/" + "/".join(names), index)) for names in study.parameters}
        yield _nested({names: d.draw(rngs[names]) for names, d in study.parameters.items()})


def _nested(values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested parameters reach a run as one dictionary."""
    out: dict[str, Any] = {}
    for names, value in values.items():
        inner = out
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = value
    return out


def _planned(study: Study, parameters: dict[str, Any], varying: list[str]) -> PlannedRun:
    label = "_".join(filter(None, (_short(key, parameters[key]) for key in varying)))[:80].strip("_") or "run"
    identity = json.dumps([study.command, study.program, parameters], sort_keys=True, default=str)
    return PlannedRun(parameters, f"{label}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}", label)


def _short(key: str, value: Any) -> str:
    """``seed1`` for ``seed_everything: 1``, ``feddyn`` for ``algorithm: configs/algorithm/feddyn.yaml``."""
    name = {"seed_everything": "seed"}.get(key, key.rsplit(".", 1)[-1])
    if isinstance(value, list) and value and all(isinstance(v, dict) and "class_path" in v for v in value):
        value = "+".join(_class(v) for v in value)
    elif isinstance(value, dict) and "class_path" in value:
        value = _class(value)
    elif isinstance(value, str):
        value = Path(value).stem if value.endswith((".yaml", ".yml")) else value
    elif isinstance(value, float):
        value = f"{name}{value:.4g}"
    elif value is None or isinstance(value, bool):
        value = f"{name}-{str(value).lower()}"
    else:
        value = f"{name}{value}"
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", str(value)).strip("-")


def _class(value: Mapping[str, Any]) -> str:
    settings = value.get("init_args") or {}
    numbers = [f"{k}{v}" for k, v in settings.items() if isinstance(v, int | float) and not isinstance(v, bool)]
    return "-".join([str(value["class_path"]).rsplit(".", 1)[-1], *numbers[:1]])


def command(study: Study, run: PlannedRun, root: Path, resume: bool) -> list[str]:
    """The command of a run: as an agent would build it, with a folder of its own below ``root``, and without W&B."""
    parameters = {key: value for key, value in run.parameters.items() if key not in _FOLDER}
    words = _without_wandb([part for word in study.command for part in _expanded(word, study, parameters)])
    if words[0] == "fedlight":
        words[:1] = [sys.executable, "-m", "fedlight"]
    words += [f"--trainer.default_root_dir={study_folder(root, study)}", f"--trainer.name={run.name}"]
    return [*words, "--ckpt_path=last"] if resume else words


def study_folder(root: Path, study: Study) -> Path:
    """Where a study is kept, by its name."""
    return root / (re.sub(r"[^A-Za-z0-9._+-]+", "-", study.name).strip("-.") or "study")


def _expanded(word: str, study: Study, parameters: Mapping[str, Any]) -> list[str]:
    pairs = list(parameters.items())
    macros = {
        "${env}": [],
        "${interpreter}": [sys.executable],
        "${program}": (study.program or "").split(),
        "${args}": [f"--{key}={value}" for key, value in pairs],
        "${args_no_equals}": [part for key, value in pairs for part in (f"--{key}", str(value))],
        "${args_no_boolean_flags}": [f"--{k}" if v is True else f"--{k}={v}" for k, v in pairs if v is not False],
    }
    if word == "${program}" and study.program is None:
        raise MisconfigurationException(f"{study.name}: `command` has ${{program}}, but there is no `program`.")
    if word in macros:
        return macros[word]
    word = _ENVIRONMENT.sub(lambda match: os.environ.get(match[1], match[1]), word)
    if word.startswith("${"):
        why = f"{word}, which fedlight does not read. Use ${{args}}."
        raise MisconfigurationException(f"{study.name}: `command` has {why}")
    return [word]


def _without_wandb(words: list[str]) -> list[str]:
    out: list[str] = []
    for word in words:
        if out and out[-1] == "--trainer.logger" and word == "wandb":
            out.pop()
        elif word != "--trainer.logger=wandb":
            out.append(word)
    return out


OUTPUT = "output.log"
_ERROR = re.compile(r"(fedlight: )?error:|[^ :]*(Error|Exception):")


class RunSlot:
    """The folder of one planned run in that of its ``study``, which one process at a time may work on.

    It holds ``output.log``, ``run.json`` (parameters, command and how the run ended) and the run's own
    ``version_<n>`` folders.
    """

    def __init__(self, run: PlannedRun, study: Path) -> None:
        self.run, self.path = run, study / run.name
        self._lock: IO[str] | None = None

    def take(self) -> int | None:
        """Lock the folder: the file descriptor that holds the lock, or None while another process has it.

        A child that inherits the descriptor holds the lock, too: a run outlives a study that was killed, and until it
        ends no other study begins it again.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return None
        return self._lock.fileno()

    def release(self) -> None:
        """Let go of the folder; a child that inherited the lock keeps it."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def summary(self) -> dict[str, Any] | None:
        """The summary of the newest version, which counts, as in reports; None if it is not finished."""
        return next((read_summary(self.path / f"version_{v}") or None for v in versions(self.path)[-1:]), None)

    def resumable(self) -> bool:
        """Whether the newest version has a checkpoint to continue from."""
        return any((self.path / f"version_{v}/checkpoints/last.ckpt").exists() for v in versions(self.path)[-1:])

    def newer(self, command: Sequence[str]) -> set[str]:
        """Configurations of its command that were written after the newest version began, which may not know them."""
        found = set[str]()
        for name in (word.rpartition("=")[2] for word in command if word.endswith((".yaml", ".yml"))):
            with suppress(OSError):
                began = (self.path / f"version_{versions(self.path)[-1]}/config.yaml").stat().st_mtime
                found |= {name} if Path(name).stat().st_mtime > began else set()
        return found

    def record(self, command: Sequence[str], **result: Any) -> None:
        """Write ``run.json``."""
        content = {"parameters": dict(self.run.parameters), "command": list(command), **result}
        _write_json(self.path / "run.json", content)


def write_plan(folder: Path, study: Study, runs: Sequence[PlannedRun]) -> None:
    """Write ``study.json``: all runs that the study has, so that a report can name those that are missing.

    Runs that it had before and that have begun stay: those that ``--only`` leaves out, or whose values were taken out.
    """
    file, before = folder / "study.json", list[dict[str, Any]]()
    with suppress(OSError, ValueError, TypeError, KeyError):
        before = [run for run in json.loads(file.read_text())["runs"] if versions(folder / run["folder"])]
    planned = [{"folder": run.name, "label": run.label, "parameters": dict(run.parameters)} for run in runs]
    planned += [run for run in before if run["folder"] not in {run.name for run in runs}]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(file, {"name": study.name, "method": study.method, "metric": study.metric, "runs": planned})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def log_tail(path: Path, lines: int = 8) -> str:
    """What a run said last: from its last line that speaks of an error, or else its last line."""
    try:
        text = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    begin = next((i for i in reversed(range(len(text))) if _ERROR.match(text[i])), max(0, len(text) - 1))
    return "\n".join(text[begin : begin + lines])


def now() -> str:
    """The present time, for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S")
