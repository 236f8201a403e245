"""The runs of one method in one setting, and their statistics over seeds."""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.report.naming import SEEDS, Items, Method, method_labels, pooled, setting_labels, setting_of
from fedlight.report.runs import Run, natural
from fedlight.run.names import smaller_is_better


@dataclass(frozen=True)
class Stat:
    """A mean over the ``count`` seeds that have a value, and the standard deviation (of a sample), None for one."""

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Stat | None":
        """The statistics of what there is; None if there is nothing."""
        there = [float(v) for v in values if v is not None and not math.isnan(v)]
        if not there:
            return None
        if not all(map(math.isfinite, there)):
            return cls(sum(there) / len(there), math.nan if len(there) > 1 else None, len(there))
        return cls(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None, len(there))

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % confidence interval of the mean by Student's t; None for one seed."""
        if self.std is None:
            return None
        from scipy.stats import t

        return float(t.ppf(0.975, self.count - 1)) * self.std / math.sqrt(self.count)


@dataclass
class Group:
    """One method in one setting, which is everything else; their labels in tables, and a finished run for each seed."""

    method: Method
    setting: Items
    label: str
    setting_label: str
    runs: list[Run] = field(default_factory=list)

    def stat(self, metric: str) -> Stat | None:
        """The metric after the last round."""
        return Stat.of(run.last(metric) for run in self.runs)

    def few(self, stat: Stat | None) -> str:
        """`` (1 of 2)`` where a mean is not over all runs."""
        return "" if stat is None or stat.count == len(self.runs) else f" ({stat.count} of {len(self.runs)})"

    def total(self, *metrics: str) -> Stat | None:
        """The sum of metrics over all rounds."""
        return Stat.of(run.total(*metrics) for run in self.runs)

    def curve(self, metric: str) -> tuple[list[int], list[float], list[float]]:
        """Rounds, and at each the mean and the standard deviation (0 for one seed) of the seeds that measured it."""
        series = [run.series(metric) for run in self.runs]
        rounds = sorted({r for s in series for r in s})
        stats = [(r, Stat.of(s.get(r) for s in series)) for r in rounds]
        there = [(r, stat) for r, stat in stats if stat is not None]
        return [r for r, _ in there], [s.mean for _, s in there], [s.std or 0.0 for _, s in there]

    def spent(self, *metrics: str) -> dict[int, float]:
        """What the sum of metrics came to until the end of each round, a mean over seeds; empty if never logged."""
        sums = [run.spent(*metrics) for run in self.runs]
        return {r: statistics.fmean(s[r] for s in sums if r in s) for r in sorted({r for s in sums for r in s})}

    def cost_to(self, metric: str, target: float, *spent: str) -> tuple[Stat | None, int]:
        """What it took until a metric first reached a target, over the seeds that did, and how many these are.

        An accuracy must become as large, a loss as small. The metrics ``spent`` are added up; without any, rounds are.
        """
        sign, costs = -1 if smaller_is_better(metric) else 1, []
        for run in self.runs:
            if rounds := [r for r, value in run.series(metric).items() if sign * value >= sign * target]:
                costs.append(run.spent(*spent).get(min(rounds)) if spent else min(rounds))
        return Stat.of(costs), len(costs)


@dataclass
class Study:
    """All runs of a report.

    Attributes:
        groups: methods in settings that have at least one finished run, ordered by setting and method.
        runs: all runs.
        labels: of method and setting of every run whose configuration could be read, by its path.
        repeated: finished runs that were left out, as a newer one has the same configuration and seed.
    """

    groups: list[Group]
    runs: list[Run]
    labels: dict[str, tuple[str, str]]
    repeated: list[Run]

    @property
    def used(self) -> list[Run]:
        """The runs that make up the groups, each once."""
        return list({str(run.path): run for group in self.groups for run in group.runs}.values())

    @property
    def settings(self) -> list[str]:
        """Labels of the settings, in order."""
        return list(dict.fromkeys(group.setting_label for group in self.groups))

    @property
    def methods(self) -> list[str]:
        """Labels of the methods, in order."""
        return list(dict.fromkeys(group.label for group in _ordered(self.groups, by_setting=False)))

    def client_metrics(self, setting: str) -> list[str]:
        """What was measured on the clients' own data, an accuracy first."""
        found = [name[8:-5] for name in self.logged(setting, "clients/.*_mean")]
        return sorted(found, key=lambda name: (name != "accuracy", name))

    def logged(self, setting: str, *patterns: str) -> list[str]:
        """The metrics after the last round of any run of a setting that are called so."""
        keys = {key for group in self.within(setting) for run in group.runs for row in run.rows[-1:] for key in row}
        return sorted(key for key in keys if any(re.fullmatch(pattern, key) for pattern in patterns))

    def within(self, setting: str) -> list[Group]:
        """The groups of a setting."""
        return [group for group in self.groups if group.setting_label == setting]

    def find(self, method: str, setting: str) -> Group | None:
        """The group of a method in a setting."""
        return next((g for g in self.groups if (g.label, g.setting_label) == (method, setting)), None)

    def baseline(self, name: str) -> str:
        """The label of the method that is called so, or has this name alone; an error if no method or several are."""
        alike = {g.label for g in self.groups if name == g.label}
        alike = alike or {g.label for g in self.groups if name == g.method.name}
        if len(alike) != 1:
            found = "is not among the runs" if not alike else "may be several of the methods"
            raise MisconfigurationException(f"--baseline {name!r} {found}; they are {', '.join(self.methods)}.")
        return alike.pop()

    def counterpart(self, group: Group) -> Group | None:
        """The same method without MAN, in the same setting."""
        if not group.method.has_man:
            return None
        others = [g for g in self.groups if g.setting == group.setting and not g.method.has_man]
        return next((g for g in others if g.method.base == group.method.base), None)


def gain(group: Group, other: Group, metric: str) -> Stat | None:
    """How much higher a metric is than in another group: over the seeds that both have, or of the means."""
    alike = [(a, b) for a in group.runs for b in other.runs if _is_same(a, b) and a.seed is not None]
    pairs = [(a.last(metric), b.last(metric)) for a, b in alike]
    if differences := Stat.of(a - b for a, b in pairs if a is not None and b is not None):
        return differences
    mine, base = group.stat(metric), other.stat(metric)
    return None if mine is None or base is None else Stat(mine.mean - base.mean, None, 0)


def left_out(groups: Sequence[Group], metrics: Iterable[str], ever: bool = False) -> str:
    """Which runs the means of some metrics leave out, and why: a sentence, or nothing where there is none.

    With ``ever`` every round counts, as in a curve, and not the last value alone.
    """
    said, several = list[str](), len({group.setting_label for group in groups}) > 1
    for group in groups:
        known = [m for m in dict.fromkeys(metrics) if any(run.series(m) for run in group.runs)]
        ends = {m: max(max(run.series(m), default=0) for run in group.runs) for m in known}
        for run in group.runs:
            why: dict[str, list[str]] = {}
            for metric in known:
                series = run.series(metric)
                lost = [r for r, value in series.items() if math.isnan(value)]
                if not series:
                    why.setdefault("not logged", []).append(metric)
                elif lost and (ever or lost[-1] == max(series)):
                    why.setdefault(f"NaN from round {lost[0]}", []).append(metric)
                elif ever and max(series) < ends[metric]:
                    why.setdefault(f"after its last round, {max(series)}", []).append(metric)
            who = f"{group.label}{f' in {group.setting_label}' if several else ''}, seed {run.seed}"
            for reason, names in why.items():
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                said.append(f"{who}: {', '.join(names[:3])}{more} {reason}")
    more = f"; and {len(said) - 5} more" if len(said) > 5 else ""
    return f" Left out of means: {'; '.join(said[:5])}{more}." if said else ""


def group_runs(runs: Sequence[Run]) -> Study:
    """Sort runs into methods and settings.

    Central training counts in every setting that differs from its own only in how the data are divided.
    """
    readable = [run for run in runs if run.config]
    methods = {id(run): Method(run.config) for run in readable}
    settings = {id(run): _settings(run, methods, readable) for run in readable}
    names = method_labels(methods.values())
    places = setting_labels(setting for run in readable for setting in settings[id(run)])
    labels: dict[str, tuple[str, str]] = {}
    groups: dict[tuple[str, str], Group] = {}
    repeated: dict[str, Run] = {}
    for run in readable:
        method = methods[id(run)]
        for setting in settings[id(run)]:
            key = names[method.name, method.items], places[setting]
            labels.setdefault(str(run.path), key)
            if run.status == "finished":
                group = groups.setdefault(key, Group(method, setting, *key))
                same = [*(other for other in group.runs if _is_same(other, run)), run]
                folders = {re.sub(r"version_\d+$", "", str(one.path)) for one in same}  # copies of files are of any age
                same.sort(key=_written if len(folders) > 1 else lambda one: natural(Path(one.path)))
                repeated |= {str(older.path): older for older in same[:-1]}
                group.runs = [other for other in group.runs if not _is_same(other, run)] + same[-1:]
    return Study(_ordered(list(groups.values())), list(runs), labels, list(repeated.values()))


def _settings(run: Run, methods: dict[int, Method], runs: Sequence[Run]) -> list[Items]:
    """The settings that a run counts in."""
    own = setting_of(run.config)
    if not methods[id(run)].is_central:
        return [own]
    federated = dict.fromkeys(setting_of(r.config) for r in runs if not methods[id(r)].is_central)
    return [setting for setting in federated if pooled(setting) == pooled(own)] or [own]


def _is_same(one: Run, other: Run) -> bool:
    """Whether two runs of one group have the same seeds; of those without one, whether they are copies."""
    if None in (one.seed, other.seed):
        return one.rows == other.rows
    return all(one.config.get(key) == other.config.get(key) for key in SEEDS)


def _written(run: Run) -> float:
    """When its last round was."""
    file = Path(run.path) / "metrics.csv"
    return file.stat().st_mtime if file.exists() else 0.0


def _ordered(groups: list[Group], by_setting: bool = True) -> list[Group]:
    """By setting and base method in the order in which they came; without MAN before with it; central ones last."""
    bases = list(dict.fromkeys(group.method.base for group in groups))
    settings = list(dict.fromkeys(group.setting_label for group in groups))

    def key(group: Group) -> tuple[int, bool, int, bool]:
        place = settings.index(group.setting_label) if by_setting else 0
        return place, group.method.is_central, bases.index(group.method.base), group.method.has_man

    return sorted(groups, key=key)
