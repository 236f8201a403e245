"""The pictures of a report: readable in black and white, drawn without a window system."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlight.analysis.pictures import drawn, line_style
from fedlight.report.groups import Group, Study
from fedlight.report.tables import TRAFFIC
from fedlight.run.names import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS: dict[str, tuple[str, ...]] = {"rounds": (), "megabytes": TRAFFIC, "gradients": ("clients/gradients",)}
"""What curves are drawn against, and the metrics that add up to it."""
_POINTS = 1500  # of a curve at most; a picture has about a thousand columns
_AXES = {"rounds": "rounds", "megabytes": "megabytes, sent both ways", "gradients": "gradients that clients computed"}


def draw_curves(study: Study, setting: str, metric: str, path: Path, against: str = "rounds") -> Path | None:
    """A metric against what it cost: the mean over seeds, and a band of one standard deviation; None without any.

    Methods have dashes and markers of their own; with MAN they are black, without it grey. Central training is a thin
    line at its final value. ``against`` is one of :data:`COSTS`.
    """
    groups = [g for g in study.within(setting) if g.curve(metric)[0]]
    federated = [g for g in groups if not g.method.is_central]
    if not groups or (COSTS[against] and not any(g.spent(*COSTS[against]) for g in federated)):
        return None
    scale = 100 if is_share(metric) else 1

    def plot(figure: "Figure") -> None:
        axes = figure.subplots()
        for group in groups:
            if not group.method.is_central:
                _curve(axes, study, group, metric, scale, COSTS[against])
                continue
            style, final = _style(study, group), scale * group.curve(metric)[1][-1]
            axes.axhline(final, color=style["color"], linewidth=1, linestyle=style["linestyle"], zorder=1)
            axes.annotate(
                f"{group.label}: {final:.4g}", (0, final), xycoords=("axes fraction", "data"),
                xytext=(4, 3), textcoords="offset points", fontsize=8,
            )  # fmt: skip
        _count_rounds(axes, against)
        axes.set_ylabel(f"{metric} (%)" if is_share(metric) else metric)
        if setting and len(study.settings) > 1:
            axes.set_title(setting)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="best", handlelength=3.5, ncols=2 if len(groups) > 5 else 1)

    return _drawn(path, plot, (7, 4.2))


def draw_spectra(study: Study, setting: str, path: Path) -> Path | None:
    """λ_max and trace against rounds where there are several, else as bars; None without any."""
    groups = [g for g in study.within(setting) if g.curve("hessian/lambda_max")[0]]
    if not groups:
        return None
    metrics = [m for m in ("hessian/lambda_max", "hessian/trace") if any(g.curve(m)[0] for g in groups)]
    several = any(len(g.curve("hessian/lambda_max")[0]) > 1 for g in groups)

    def plot(figure: "Figure") -> None:
        for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False).flat, metrics, strict=True):
            _spectrum_panel(axes, study, groups, metric, several)
        if several:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)

    return _drawn(path, plot, (4.2 * len(metrics) + 0.6, 3.8))


def _spectrum_panel(axes: "Axes", study: Study, groups: Sequence[Group], metric: str, several: bool) -> None:
    there = [g for g in groups if g.curve(metric)[0]]
    name = "λ_max of the Hessian" if metric.endswith("lambda_max") else "trace of the Hessian"
    if several:
        for group in there:
            _curve(axes, study, group, metric)
        _count_rounds(axes)
        axes.set_ylabel(name)
        return
    finals = [(group, stat) for group in there if (stat := group.stat(metric)) is not None]
    shades = ["0.25" if group.method.has_man else "0.75" for group, _ in finals]
    bars: dict[str, Any] = {"xerr": [s.std or 0.0 for _, s in finals], "color": shades, "edgecolor": "black"}
    axes.barh(range(len(finals)), [s.mean for _, s in finals], capsize=3, height=0.6, **bars)
    axes.set_yticks(range(len(finals)), [group.label for group, _ in finals], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(name)


def draw_layers(study: Study, setting: str, path: Path) -> Path | None:
    """λ_max of each layer's block of the Hessian after the last round, by method; None without any."""
    prefix, suffix = "hessian/layer/", "/lambda_max"
    groups = study.within(setting)
    metrics = [m for g in groups for run in g.runs for row in run.rows for m in row if m.startswith(prefix)]
    layers = list(dict.fromkeys(m for m in metrics if m.endswith(suffix)))
    if not layers:
        return None

    def plot(figure: "Figure") -> None:
        axes = figure.subplots()
        for k, group in enumerate(groups):
            stats = [(i + 0.6 * (k + 0.5) / len(groups) - 0.3, group.stat(layer)) for i, layer in enumerate(layers)]
            there = [(x, s.mean, s.std or 0.0) for x, s in stats if s is not None]
            if there:  # side by side, and not joined: layers are no sequence that something runs along
                x, y, e = zip(*there, strict=True)
                axes.errorbar(x, y, e, label=group.label, capsize=3, **_style(study, group) | {"linestyle": "none"})
        names = [layer.removeprefix(prefix).removesuffix(suffix) for layer in layers]
        axes.set_xticks(range(len(layers)), names, rotation=30, ha="right", fontsize=8)
        axes.set_ylabel("λ_max of the layer's block")
        axes.legend(fontsize=8, handlelength=3.5)

    return _drawn(path, plot, (7, 4))


def draw_clients(study: Study, setting: str, path: Path) -> Path | None:
    """The accuracy on the clients' own data after the last round: mean and 10th percentile; None without any."""
    groups = [g for g in study.within(setting) if g.stat("clients/accuracy_mean") is not None]
    if not groups:
        return None

    def plot(figure: "Figure") -> None:
        axes = figure.subplots()
        for i, group in enumerate(reversed(groups)):
            mean, worst = group.stat("clients/accuracy_mean"), group.stat("clients/accuracy_p10")
            style = _style(study, group)
            ends = [100 * stat.mean for stat in (worst, mean) if stat is not None]
            axes.plot(ends, [i] * len(ends), color=style["color"], linewidth=1.2)
            labels = ("mean over clients", "10th percentile of clients") if i == 0 else (None, None)
            axes.plot(ends[-1:], [i], "o", color=style["color"], label=labels[0])
            axes.plot(ends[:-1], [i] * (len(ends) - 1), "|", color=style["color"], markersize=14, label=labels[1])
        axes.set_yticks(range(len(groups)), [g.label for g in reversed(groups)])
        axes.set(ylim=(-0.6, len(groups) - 0.4), xlabel="accuracy on the clients' own data (%)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)

    return _drawn(path, plot, (7, 1.4 + 0.34 * len(groups)))


def _curve(axes: "Axes", study: Study, group: Group, metric: str, scale: int = 1, cost: Sequence[str] = ()) -> None:
    style, (rounds, means, stds) = _style(study, group), group.curve(metric)
    keep = slice((len(rounds) - 1) % (step := 1 + len(rounds) // _POINTS), None, step)  # the last one among them
    rounds, means, stds = rounds[keep], means[keep], stds[keep]
    spent = group.spent(*cost)
    x = [spent.get(r, math.nan) for r in rounds] if cost else rounds
    mean, std = ([scale * value for value in values] for values in (means, stds))
    low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
    axes.plot(x, mean, label=group.label, markevery=max(1, len(rounds) // 8), **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _count_rounds(axes: "Axes", against: str = "rounds") -> None:
    axes.set_xlabel(_AXES[against])
    if against == "rounds":
        axes.locator_params(axis="x", integer=True)


def _style(study: Study, group: Group) -> dict[str, Any]:
    """Dash and marker by the method without MAN, black with MAN and grey without: pairs are seen as pairs.

    Where a method comes in several variants, each has a dash and a marker of its own.
    """
    alone = len({g.label for g in study.groups}) == len({g.method.name for g in study.groups})
    keys = {g.label: g.method.base if alone else (g.label,) for g in study.groups}
    index = list(dict.fromkeys(keys.values())).index(keys[group.label])
    shade, face = ("black", "black") if group.method.has_man else ("0.5", "white")
    return line_style(index) | {"color": shade, "markerfacecolor": face}


def _drawn(path: Path, plot: Any, size: tuple[float, float]) -> Path:
    return drawn(path, plot, size, {"text.parse_math": False})  # a dollar in a name is a dollar
