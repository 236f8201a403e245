"""Reads what runs have left behind, whole or not."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.run.folder import HISTORY, is_locked, read_json, read_summary, versions
from fedlight.run.loggers import read_metrics
from fedlight.run.names import dotted, is_share

Status = Literal["finished", "running", "interrupted", "failed", "torn", "missing", "foreign", "changed"]
_VERSION = re.compile(r"version_\d+")


@dataclass
class Run:
    """One run, or what is there of it.

    Attributes:
        path: its folder.
        status: ``finished`` runs make up the tables; the others are listed.
        detail: what is wrong with a run that is not finished, or worth knowing of one that is.
        config: the configuration by dotted keys; empty where it cannot be read.
        rows: the metrics of each round.
        summary: ``summary.json``; empty where there is none.
    """

    path: Path
    status: Status
    detail: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        """The seed of the experiment."""
        seed = self.config.get("seed_everything")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None

    @property
    def rounds(self) -> int:
        """Rounds that are complete."""
        return 1 + int(self.rows[-1]["round"]) if self.rows else 0

    def last(self, metric: str) -> float | None:
        """The latest value of a metric."""
        return next((row[metric] for row in reversed(self.rows) if metric in row), None)

    def series(self, metric: str) -> dict[int, float]:
        """A metric by the number of rounds after which it was measured."""
        return {1 + int(row["round"]): row[metric] for row in self.rows if metric in row}

    def total(self, *metrics: str) -> float | None:
        """The sum of metrics over all rounds; None if none was logged."""
        return next(reversed(self.spent(*metrics).values()), None)

    def spent(self, *metrics: str) -> dict[int, float]:
        """The sum of metrics over the first rounds, by their number; empty if none was logged."""
        if not any(m in row for row in self.rows for m in metrics):
            return {}
        sums = itertools.accumulate(sum(row.get(m, 0.0) for m in metrics) for row in self.rows)
        return {1 + int(row["round"]): total for row, total in zip(self.rows, sums, strict=True)}


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """All runs in and below some folders, each once.

    A folder is one of a run, of an experiment, of a study, or one above these. Of a study's run with several versions,
    the newest counts; the runs that ``study.json`` names and that are not there are ``missing``, and others beside them
    are runs, too.
    """
    runs, seen = dict[Path, Run](), set[Path]()
    for folder in folders:
        if not folder.is_dir():
            raise MisconfigurationException(f"There is no folder {folder}.")
        for run in _below(folder, seen):
            runs.setdefault(run.path.resolve(), run)
    if not runs:
        named = ", ".join(str(folder) for folder in folders)
        raise MisconfigurationException(f"There is no run in or below {named}: no version_<n> folder, no config.yaml.")
    return list(runs.values())


def _below(folder: Path, seen: set[Path]) -> Iterator[Run]:
    """The runs of a folder, unless it was seen: a link may lead to a folder above it."""
    if (place := folder.resolve()) in seen:
        return
    seen.add(place)
    try:
        children = sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), natural(path)))
    except OSError as error:  # of another user
        yield Run(folder, "torn", f"the folder cannot be read: {error.strerror}")
        return
    if (folder / "study.json").is_file():
        yield from _study_runs(folder, seen)
    elif _is_run(folder):
        yield read_run(folder)
        return
    for child in children:
        if child.is_dir() and not child.name.startswith("."):
            yield from _below(child, seen)


def _is_run(folder: Path) -> bool:
    names = {"config.yaml", "metrics.csv", "summary.json"} | ({".lock"} if _VERSION.fullmatch(folder.name) else set())
    return any((folder / name).is_file() for name in names)


def _study_runs(folder: Path, seen: set[Path]) -> Iterator[Run]:
    planned = read_json(folder / "study.json").get("runs", [])
    for entry in planned if isinstance(planned, list) else []:
        path = folder / str(entry.get("folder") if isinstance(entry, dict) else entry)
        seen.add(path.resolve())
        present = versions(path)
        result = read_json(path / "run.json")
        run = read_run(path / f"version_{present[-1]}") if present else Run(path, "missing", "it has not been begun")
        if run.status in ("interrupted", "missing") and result.get("status") == "failed":
            said = filter(None, map(str.strip, str(result.get("error", "")).splitlines()))
            run.status, run.detail = "failed", " — ".join(itertools.islice(said, 2))  # what it was, and of what
        yield run


def read_run(path: Path) -> Run:
    """Read a run's folder; what cannot be read makes a run ``torn`` and raises nothing."""
    run = Run(path, "interrupted")
    run.status, run.detail = _filled_in(run)
    return run


def _filled_in(run: Run) -> tuple[Status, str]:
    """Read what there is of a run, and tell what became of it."""
    try:
        config = yaml.safe_load((run.path / "config.yaml").read_text())
    except FileNotFoundError:
        return "torn", "config.yaml is missing"
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return "torn", _damage(run.path / "config.yaml", yaml.safe_load)
    if not isinstance(config, dict) or not {"trainer", "algorithm", "data"} <= set(config):
        return "foreign", "its config.yaml was not written by fedlight"
    run.config = dotted(config)
    for key in ("algorithm", "perturbation", "model", "data", "trainer.aggregator"):
        if isinstance(name := run.config.get(key), str):  # a class alone, as it may be written
            run.config[f"{key}.class_path"] = name
    try:
        run.rows = read_metrics(run.path / "metrics.csv", strict=True)
    except OSError as error:
        return "torn", f"metrics.csv cannot be read: {error.strerror}"
    except ValueError as error:
        return "torn", str(error)
    run.summary = read_summary(run.path)
    if run.summary:
        if not run.rows:
            return "torn", "metrics.csv has no rows"
        whole = [row["round"] for row in run.rows] == list(range(run.rounds))
        if not whole or run.summary.get("rounds", run.rounds) != run.rounds:
            return "torn", "metrics.csv lacks rows"
        changes = _changes(run.path)
        notes = (_in_percent(run) * "accuracies were logged in percent", _other_version(run.summary))
        return ("finished", "; ".join(filter(None, notes))) if changes is None else ("changed", changes)
    if (run.path / "summary.json").exists():
        return "torn", _damage(run.path / "summary.json")
    rounds = f"{run.rounds} of {run.config.get('trainer.max_rounds', '?')} rounds"
    return "running" if is_locked(run.path) else "interrupted", rounds


def _in_percent(run: Run) -> bool:
    """Whether accuracies of a run go beyond 1, as those of a module that logs them in percent; they are divided."""
    found = {
        _kind(name) for row in run.rows for name, value in row.items() if is_share(name) and 1.001 < value < math.inf
    }
    if found:
        percent = {name for row in run.rows for name in row if is_share(name) and _kind(name) in found}
        run.rows = [{k: value / 100 if k in percent else value for k, value in row.items()} for row in run.rows]
    return bool(found)


def _kind(metric: str) -> str:
    """``val`` of ``val/accuracy`` and of what clients log as that: a module may log its other accuracies as shares."""
    return re.split(r"[/_.]", metric)[0].replace("clients", "val")


def _changes(path: Path) -> str | None:
    """What was changed within a run's rounds, so that no setting is the run's; None if nothing was."""
    path = path / HISTORY / "changes.json"
    if not path.exists():
        return None
    try:
        noted = [(r, key, *pair) for r, changes in read_json(path).items() for key, pair in changes.items()]
        changed = [f"{key} from round {int(r) + 1}: {old} -> {new}" for r, key, old, new in noted]
    except (AttributeError, TypeError, ValueError):
        changed = []
    return "; ".join(changed[:3] + ["..."] * (len(changed) > 3)) or f"{HISTORY}/{_damage(path)}"


def _other_version(summary: dict[str, Any]) -> str:
    from fedlight import __version__

    versions = summary.get("versions")
    if not isinstance(versions, dict) or (written := versions.get("fedlight")) is None:
        return "it does not say which version of fedlight wrote it"
    alike = str(written).split(".")[:2] == __version__.split(".")[:2] or "unknown" in str(written)
    return "" if alike else f"written by fedlight {written}; this is {__version__}"


def _damage(path: Path, load: Callable[[str], Any] = json.loads) -> str:
    """What is wrong with a file, and in which line and column."""
    try:
        return f"{path.name} cannot be read: it holds {str(load(path.read_text()))[:30]!r}"
    except (OSError, ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f": line {mark.line + 1} column {mark.column + 1}"
        return f"{path.name} cannot be read: {getattr(error, 'problem', error)}{where}"


def natural(path: Path) -> list[tuple[int, str]]:
    """``version_10`` after ``version_9``."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]
