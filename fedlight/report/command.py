"""``fedlight report``."""

import argparse
import difflib
import re
import shutil
from collections import Counter
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.report import figures, tables
from fedlight.report.groups import Group, Study, group_runs, left_out
from fedlight.report.runs import find_runs
from fedlight.report.writers import Block, Heading, Picture, Text, write_html, write_latex, write_markdown
from fedlight.run.folder import place, writing
from fedlight.run.names import is_share, preferred_metric

_OTHERS = (
    ("spectra", figures.draw_spectra, "The Hessian of the training loss.", "hessian/(lambda_max|trace)"),
    ("layers", figures.draw_layers, "λ_max of every layer after the last round.", "hessian/layer/.*/lambda_max"),
    ("clients", figures.draw_clients, "Accuracy per client after the last round.", "clients/accuracy_(mean|p10)"),
)
_ROUND = re.compile(r"_(?:round|epoch)(\d+)$")


def main(args: list[str]) -> int:
    """Write a report; the exit code is 0, or 1 where no run is finished."""
    options = _parser().parse_args(args)
    out: Path = options.output
    study = group_runs(find_runs(options.folders))
    options.metric = _metric(study, options)
    with writing(out):
        document = _report(study, options)
        written = [out / "report.md", out / "report.html"]
        write_markdown(document, written[0])
        write_html(document, written[1])
        if options.latex and study.groups:
            write_latex(tables.overview(study, options.metric), out / "table.tex")
            written.append(out / "table.tex")
    states = ", ".join(f"{n} {status}" for status, n in Counter(run.status for run in study.runs).items())
    print(f"{len(study.runs)} runs ({states}): " + ", ".join(str(path) for path in written))
    return 0 if study.groups else 1


def _metric(study: Study, options: argparse.Namespace) -> str:
    """The metric that was asked for, else what validation logs; refused where no run has it, or the target is none."""
    logged = dict.fromkeys(name for run in study.used for row in run.rows for name in row)
    metric: str = options.metric or preferred_metric(n for n in logged if n.startswith("val")) or "val/accuracy"
    if options.metric and logged and metric not in logged:
        near = difflib.get_close_matches(metric, logged, 5, 0.3) or list(logged)[:5]
        raise MisconfigurationException(f"--metric {metric!r} is in no run; there are {', '.join(near)} and others.")
    if options.target is not None and is_share(metric) and not 0 <= options.target <= 1:
        raise MisconfigurationException(f"--target {options.target:g} must lie in 0 .. 1, as {metric} does.")
    return metric


def _report(study: Study, options: argparse.Namespace) -> list[Block]:
    """Everything there is to say about a study."""
    blocks: list[Block | None] = [Heading(options.title, 1), *_state(study)]
    if study.groups:
        metric, pictures = options.metric, options.output / "pictures"
        baseline = study.baseline(options.baseline) if options.baseline else None
        blocks += [Heading(f"Methods and settings: {metric}"), tables.overview(study, metric)]
        blocks.append(tables.gains(study, metric))
        blocks.append(None if baseline is None else tables.distances(study, metric, baseline))
        blocks.append(tables.ranks(study, metric) if options.rank else None)
        for index, setting in enumerate(study.settings):
            blocks += _setting(study, setting, pictures / f"setting{index + 1}", metric, options.target)
        if (differences := tables.differences(study)) is not None:
            blocks += [Heading("What differs between the configurations"), differences]
        blocks += [Heading("Versions"), tables.versions(study)]
    blocks += [Heading("Runs"), tables.run_list(study)]
    return [block for block in blocks if block is not None]


def _state(study: Study) -> list[Block]:
    blocks: list[Block] = [Text(f"{len(study.used)} of {len(study.runs)} runs make up the tables.")]
    counts: Counter[str] = Counter(run.status for run in study.runs if run.status != "finished")
    if study.repeated:
        counts["repeated"] = len(study.repeated)
    if counts:
        named = ", ".join(f"{n} {status}" for status, n in counts.items())
        blocks.append(Text(f"Not in the tables: {named}. See the list of runs at the end.", warning=True))
    return blocks


def _setting(study: Study, setting: str, folder: Path, metric: str, target: float | None) -> list[Block | None]:
    target = tables.default_target(study.within(setting), metric) if target is None else target
    groups = study.within(setting)
    results, others = tables.results(study, setting, metric, target), tables.figures(study, setting, metric)
    drawn = []
    curves = [(metric, cost) for cost in figures.COSTS]
    for curve, against in dict.fromkeys([*curves, ("val/loss", "rounds"), ("train/loss", "rounds")]):
        name = curve.replace("/", "_") + ("" if against == "rounds" else f"_{against}")
        path = figures.draw_curves(study, setting, curve, folder / f"{name}.png", against)
        lost = left_out(groups, [curve], ever=True)
        drawn.append((path, f"{curve} against {against}: mean over seeds, band of one standard deviation.{lost}"))
    for name, draw, caption, pattern in _OTHERS:
        lost = left_out(groups, study.logged(setting, pattern), ever=name == "spectra")
        drawn.append((draw(study, setting, folder / f"{name}.png"), caption + lost))
    pictures = [Picture(path, caption) for path, caption in drawn if path is not None]
    return [Heading(f"Setting: {setting}"), results, others, *pictures, *_run_pictures(groups, folder)]


def _run_pictures(groups: list[Group], folder: Path) -> list[Picture]:
    """The pictures that the runs of each method's first seed have drawn: spectra, landscapes, the partition once.

    Pictures of a kind stand together; of several rounds, the last one is taken.
    """
    kinds: dict[str, list[tuple[int, Group, Path]]] = {}
    for index, group in enumerate(groups):
        found = sorted((group.runs[0].path / "plots").glob("*.png"), key=_round)
        latest = {_ROUND.sub("", path.stem): path for path in found}
        for kind, path in latest.items():
            if kind != "partition" or not (kind in kinds or group.method.is_central):
                kinds.setdefault(kind, []).append((index, group, path))
    out = []
    for kind in sorted(kinds, key=lambda kind: (kind == "partition", kind)):
        for index, group, path in kinds[kind]:
            copy = folder / f"method{index + 1}" / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            whose = f"{group.label}, seed {group.runs[0].seed}: " if kind != "partition" else ""
            out.append(Picture(copy, f"{whose}{path.stem.replace('_', ' ')}."))
    return out


def _round(path: Path) -> tuple[int, str]:
    found = _ROUND.search(path.stem)
    return (int(found[1]) if found else -1), path.name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fedlight report",
        description="Write report.md and report.html (one file, no network needed) about runs: tables of methods and "
        "settings, curves with a band over seeds, spectra, accuracy per client, differences of the configurations.",
    )
    add = parser.add_argument
    add("folders", type=place, nargs="+", metavar="FOLDER", help="folders of runs or studies, or above them")
    add("-o", "--output", type=place, default=Path("report"), metavar="DIR", help="where to write (default: report/)")
    add("--metric", help="what methods are compared by (default: val/accuracy, or what else validation logs)")
    add("--target", type=float, help="count rounds to this value (default: what every method of a setting reaches)")
    add("--baseline", metavar="METHOD", help="show the differences to this method, with 95 %% intervals over seeds")
    add("--rank", action="store_true", help="rank the methods over the settings: Friedman's test, Nemenyi's distance")
    add("--latex", action="store_true", help="write table.tex, too")
    add("--title", default="fedlight report", help="title of the report")
    return parser
