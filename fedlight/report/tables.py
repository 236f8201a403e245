"""The tables of a report."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from fedlight.report.groups import Group, Stat, Study, gain, left_out
from fedlight.report.naming import differing, show
from fedlight.report.writers import Cell, Table, cells
from fedlight.run.names import is_share, smaller_is_better

_DASH = "–"
TRAFFIC = ("comm/down_mb", "comm/up_mb")
_COLUMNS = {"val/accuracy": "server", "val/accuracy_selected": "selected", "val/accuracy_all": "all"}
_COLUMNS |= {"val/accuracy_swa": "swa", "val/loss": "loss"}
_HESSIAN = {"λ_max": "lambda_max", "trace": "trace", "λ_max (all)": "lambda_max_all", "trace (all)": "trace_all"}
_FOLDERS = ("trainer.default_root_dir", "trainer.name", "ckpt_path", "seed_everything")


def show_stat(stat: Stat | None, metric: str = "", digits: int = 2) -> str:
    """``mean ± std``; accuracies in percent, and what these digits would not show with significant ones."""
    if stat is None:
        return _DASH
    if is_share(metric):
        return f"{stat.mean * 100:z.{digits}f}" + ("" if stat.std is None else f" ± {stat.std * 100:.{digits}f}")
    mean = f"{stat.mean:z.{digits}f}" if stat.mean == 0 or 0.0995 <= abs(stat.mean) < 1e5 else f"{stat.mean:.3g}"
    if stat.std is None:
        return mean
    rough = 0 < stat.std < (0.1 if abs(stat.mean) < 0.1 else 0.5 / 10**digits) or stat.std >= 1e5
    return f"{mean} ± {stat.std:.2g}" if rough else f"{mean} ± {stat.std:.{digits}f}"


def show_number(value: float | None) -> str:
    """Four significant digits."""
    return _DASH if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def show_wide(stat: Stat | None) -> str:
    """Mean and deviation of what spans orders of magnitude."""
    if stat is None:
        return _DASH
    return f"{show_number(stat.mean)} ± {stat.std:.2g}" if stat.std else show_number(stat.mean)


def best_of(groups: Sequence[Group], metric: str) -> set[str]:
    """Labels of the methods whose mean is best, as it is shown; central training does not compete."""
    means = {}
    for group in groups:
        stat = group.stat(metric)
        # The mean of those that did not diverge competes with nobody.
        whole = stat is not None and stat.count == sum(run.last(metric) is not None for run in group.runs)
        if stat is not None and whole and not group.method.is_central:
            means[group.label] = float(show_stat(replace(stat, std=None), metric))
    if len(means) < 2:
        return set()
    best = (min if smaller_is_better(metric) else max)(means.values())
    return {label for label, mean in means.items() if mean == best}


def overview(study: Study, metric: str) -> Table:
    """Methods × settings: mean ± std over seeds, the best of each setting in bold."""
    best = {setting: best_of(study.within(setting), metric) for setting in study.settings}
    rows = []
    for method in study.methods:
        row = [Cell(method)]
        for setting in study.settings:
            group = study.find(method, setting)
            text = _DASH if group is None else _shown(metric)(group)
            row.append(Cell(text, method in best[setting]))
        rows.append(row)
    unit, seeds = " in percent" if is_share(metric) else "", {len(group.runs) for group in study.groups}
    end = "smallest" if smaller_is_better(metric) else "largest"
    few = "-".join(str(n) for n in sorted({min(seeds), max(seeds)}))
    note = (
        f"{metric}{unit} after the last round, mean ± standard deviation over seeds ({few} of each); bold: the"
        f" best of the setting, that is the {end}." + left_out(study.groups, [metric])
    )
    return Table(["method", *study.settings], rows, note)


def gains(study: Study, metric: str) -> Table | None:
    """What MAN adds to each method in each setting; None where no method was run with and without."""
    return _compared(study, metric, study.counterpart, "gain of MAN", "above the same method without MAN")


def distances(study: Study, metric: str, baseline: str) -> Table | None:
    """How far each method lies above a baseline, a method's label, in each setting."""
    others = {setting: study.find(baseline, setting) for setting in study.settings}

    def other(group: Group) -> Group | None:
        return None if group.label == baseline else others[group.setting_label]

    return _compared(study, metric, other, f"difference to {baseline}", f"above {baseline}")


def _compared(study: Study, metric: str, other: Callable[[Group], Group | None], title: str, what: str) -> Table | None:
    rows = []
    for method in study.methods:
        groups = [study.find(method, setting) for setting in study.settings]
        pairs = [(group, None if group is None else other(group)) for group in groups]
        row = [Cell(_DASH) if a is None or b is None else show_gain(gain(a, b, metric), metric) for a, b in pairs]
        if any(cell.text != _DASH for cell in row):
            rows.append([Cell(method), *row])
    if not rows:
        return None
    unit = "percentage points of " if is_share(metric) else ""
    note = (
        f"{unit}{metric} {what}: the mean of the differences seed by seed ± half of its 95 % interval by Student's t;"
        " bold: the interval excludes 0. From one common seed there is no interval."
    ) + left_out(study.groups, [metric])
    return Table([title, *study.settings], rows, note)


def show_gain(stat: Stat | None, metric: str) -> Cell:
    """A difference with its sign and interval; one that the interval tells from 0 is bold."""
    if stat is None:
        return Cell(_DASH)
    half, sign = stat.half_width, "+" if stat.mean >= 0 else ""
    text = sign + show_stat(replace(stat, std=half), metric)
    few = {0: " (no common seed)", 1: " (1 seed)"}.get(stat.count, "")
    return Cell(text + few, half is not None and abs(stat.mean) > half)


_FEWEST = 5  # settings, for Friedman's test: its χ² is too far from the truth with fewer


def ranks(study: Study, metric: str) -> Table | None:
    """The mean rank of each method over the settings that all of them have, and whether ranks differ by chance.

    Friedman's test, and Nemenyi's critical difference q·sqrt(k(k+1)/6n) of k methods in n settings (Demšar, 2006,
    "Statistical Comparisons of Classifiers over Multiple Data Sets", section 3.2.2).
    """
    from scipy.stats import friedmanchisquare, rankdata, studentized_range

    methods = [m for m in study.methods if not any(g.method.is_central for g in study.groups if g.label == m)]
    sign = 1 if smaller_is_better(metric) else -1
    groups = [[study.find(method, setting) for method in methods] for setting in study.settings]
    stats = [[None if group is None else group.stat(metric) for group in row] for row in groups]
    values = [[sign * stat.mean for stat in row if stat is not None] for row in stats if None not in row]
    k, n = len(methods), len(values)
    if k < 2 or not n:
        return None
    means = [sum(column) / n for column in zip(*(rankdata(row) for row in values), strict=True)]
    note = f"Mean rank by {metric} over {n} of {len(stats)} settings, those that all methods have; 1 is the best. "
    if k < 3 or n < _FEWEST:
        note += f"Friedman's test needs 3 methods and {_FEWEST} settings: there are {k} and {n}."
    else:
        p = float(friedmanchisquare(*zip(*values, strict=True)).pvalue)
        critical = float(studentized_range.ppf(0.95, k, math.inf)) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
        note += f"Friedman's test: p = {p:.2g}. Nemenyi: ranks differ at 95 % if they are {critical:.2f} apart."
    order = sorted(range(k), key=means.__getitem__)
    note += left_out(study.groups, [metric])
    return Table(["method", "mean rank"], [cells(methods[i], f"{means[i]:.2f}") for i in order], note)


def default_target(groups: Sequence[Group], metric: str) -> float | None:
    """What every method reaches: the lowest final mean, rounded down to a whole percent."""
    stats = [g.stat(metric) for g in groups if not g.method.is_central]
    means = [s.mean for s in stats if s is not None]
    return math.floor(min(means) * 100 + 1e-9) / 100 if means and is_share(metric) else None


Column = tuple[str, Callable[[Group], str]]


def _shown(metric: str, digits: int = 2) -> Callable[[Group], str]:
    return lambda group: show_stat(stat := group.stat(metric), metric, digits) + group.few(stat)


def _wide(metric: str) -> Callable[[Group], str]:
    return lambda group: show_wide(stat := group.stat(metric)) + group.few(stat)


def results(study: Study, setting: str, metric: str, target: float | None) -> Table:
    """What the methods of a setting reach, and how soon."""
    columns: list[Column] = [
        *((text, _shown(m, 3 if text == "loss" else 2)) for m, text in _COLUMNS.items()),
        ("gain of MAN", lambda g: _gain(study, g, metric)),
    ]
    if metric not in _COLUMNS:
        columns.insert(0, (metric, _shown(metric)))
    if target is not None:
        goal = f"{target * 100:g} %" if is_share(metric) else f"{target:g}"
        columns.append((f"rounds to {goal}", lambda g: show_cost(g, metric, target)))
        columns.append((f"MB to {goal}", lambda g: show_cost(g, metric, target, *TRAFFIC)))
    columns.append(("seeds", lambda g: str(len(g.runs))))
    note = (
        "server, selected, all: accuracy in percent of the server's model, of the mean of the selected clients and of"
        " the mean of all clients' latest models, after the last round; swa: of the mean of the server's last models."
    ) + left_out(study.within(setting), [metric, *_COLUMNS])
    return _of_setting(study, setting, metric, columns, note)


def figures(study: Study, setting: str, metric: str) -> Table | None:
    """What else there is to know of the methods of a setting; None without any of it."""
    columns: list[Column] = [
        *((text, _wide(f"hessian/{figure}")) for text, figure in _HESSIAN.items()),
        *(column for name in study.client_metrics(setting) for column in _spread(name)),
        ("MB", lambda g: _DASH if g.method.is_central else show_wide(g.total(*TRAFFIC))),
        ("s", lambda g: show_wide(g.total("time/round_s"))),
    ]
    note = (
        "λ_max, trace: of the Hessian of the training loss, at the server's model or at the view named. clients:"
        " accuracy in percent of the server's model on the clients' own held-out data; the worst has the least, or of"
        " a loss the most. MB: sent both ways in all rounds. s: time of all rounds."
    ) + left_out(study.within(setting), study.logged(setting, "hessian/[^/]*", "clients/.*_.*"))
    return table if len((table := _of_setting(study, setting, metric, columns, note)).header) > 1 else None


def _spread(name: str) -> list[Column]:
    """Mean and deviation over clients of a metric on their own data, and the end at which they are worst."""
    percent, worst = (90, "max") if smaller_is_better(name) else (10, "min")
    figures = {"mean": "mean", "std": "std", f"{percent}th percentile": f"p{percent}", "worst": worst}
    whose = "clients" if name == "accuracy" else f"clients, {name}"
    return [(f"{whose}: {t}", _shown(f"clients/{name}_{figure}")) for t, figure in figures.items()]


def _of_setting(study: Study, setting: str, metric: str, columns: Sequence[Column], note: str) -> Table:
    """A row for each method of a setting; columns without a value are left out."""
    groups = study.within(setting)
    best, bold = best_of(groups, metric), _COLUMNS.get(metric, metric)
    texts = [(name, [text(group) for group in groups]) for name, text in columns]
    kept = [(name, column) for name, column in texts if any(t != _DASH for t in column)]
    rows = []
    for i, label in enumerate(group.label for group in groups):
        rows.append([Cell(label), *(Cell(column[i], name == bold and label in best) for name, column in kept)])
    return Table(["method", *(name for name, _ in kept)], rows, note)


def _gain(study: Study, group: Group, metric: str) -> str:
    other = study.counterpart(group)
    return _DASH if other is None else show_gain(gain(group, other, metric), metric).text


def show_cost(group: Group, metric: str, target: float, *spent: str) -> str:
    """Rounds, or what was spent, to a target: ``206 ± 4``; ``> 500`` if no seed got there, ``206 (2 of 3)`` if some."""
    if spent and (group.method.is_central or not group.spent(*spent)):
        return _DASH
    stat, reached = group.cost_to(metric, target, *spent)
    if stat is None:
        most = [run.total(*spent) if spent else run.rounds for run in group.runs]
        return f"> {show_number(max(filter(None, most), default=0))}"
    text = show_wide(stat) if spent else f"{stat.mean:.0f}" if stat.std is None else f"{stat.mean:.0f} ± {stat.std:.0f}"
    return text if reached == len(group.runs) else f"{text} ({reached} of {len(group.runs)})"


def differences(study: Study) -> Table | None:
    """What differs between the configurations of the groups; None if nothing does."""
    configs = [{k: _value(v) for k, v in g.runs[0].config.items() if k not in _FOLDERS} for g in study.groups]
    keys, rows = differing([tuple(config.items()) for config in configs]), []
    for group, config in zip(study.groups, configs, strict=True):
        rows.append(cells(group.label, group.setting_label, *(config.get(key, _DASH) for key in keys)))
    return Table(["method", "setting", *(key.replace(".init_args", "") for key in keys)], rows) if keys else None


def _value(value: object) -> str:
    if isinstance(value, list) and all(isinstance(v, dict) and "class_path" in v for v in value):
        return ", ".join(_callback(v) for v in value) or "none"
    return show(value)


def _callback(entry: dict[str, object]) -> str:
    settings = entry.get("init_args")
    shown = {k: v for k, v in settings.items() if v is not None} if isinstance(settings, dict) else {}
    return show(entry["class_path"]) + (f"({', '.join(f'{k}={show(v)}' for k, v in shown.items())})" if shown else "")


def versions(study: Study) -> Table:
    """With what the finished runs were made."""
    counts: dict[tuple[str, ...], int] = {}
    for run in study.used:
        made = run.summary.get("versions")
        known = made if isinstance(made, dict) else {}
        key = tuple(str(known.get(k, "?")) for k in ("fedlight", "torch", "lightning", "python"))
        key += tuple(str(run.summary.get(k, "?")) for k in ("device", "precision", "engine"))
        counts[key] = counts.get(key, 0) + 1
    header = ["fedlight", "torch", "lightning", "python", "device", "precision", "engine", "runs"]
    return Table(header, [cells(*key, str(n)) for key, n in counts.items()])


def run_list(study: Study) -> Table:
    """Every run and what became of it."""
    rows = []
    for run in study.runs:
        method, setting = study.labels.get(str(run.path), (_DASH, _DASH))
        status = "repeated" if run in study.repeated else run.status
        seed = _DASH if run.seed is None else str(run.seed)
        rows.append(cells(str(run.path), status, method, setting, seed, str(run.rounds), run.detail))
    return Table(["folder", "status", "method", "setting", "seed", "rounds", ""], rows)
