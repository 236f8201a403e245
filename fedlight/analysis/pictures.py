"""Pictures of curvature. Lines differ in dash and shade, so that they can be told apart in black and white."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedlight.analysis.landscape import LossLine, LossSurface
from fedlight.analysis.result import HessianResult
from fedlight.run.folder import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHES: list[Any] = ["-", "--", ":", "-.", (0, (1, 3)), (0, (6, 2, 1, 2, 1, 2))]
SHADES = ["black", "0.35", "0.5", "0.2", "0.6", "0.45"]
_MARKERS = ["o", "s", "^", "D", "v", "x"]
LAMBDA_MAX, LAMBDA_MIN = r"$\lambda_{\max}$", r"$\lambda_{\min}$"
_STYLE: Any = {"axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True, "legend.frameon": False}
_STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "savefig.dpi": 150}


def line_style(index: int, marker: bool = True) -> dict[str, Any]:
    """How the line of an index is drawn."""
    style = {"linestyle": _DASHES[index % 6], "color": SHADES[index % 6], "linewidth": 1.6}
    return style | ({"marker": _MARKERS[index % 6], "markersize": 4} if marker else {})


def drawn(path: str | Path, plot: Any, size: tuple[float, float], style: dict[Any, Any] | None = None) -> Path:
    """Draw with ``plot(figure)`` and save, without pyplot: no window system, and no figure that lives on."""
    import matplotlib
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE | (style or {})):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        with atomic_file(path) as file:
            figure.savefig(file, format=path.suffix[1:] or None)
    return path


def draw_density(results: HessianResult | Mapping[str, HessianResult], path: str | Path) -> Path:
    """The spectral density of one model, or of several by name, with their extreme eigenvalues as marks below."""
    named = results if isinstance(results, Mapping) else {"": results}

    def plot(figure: "Figure") -> None:
        axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[4, 0.25 + 0.25 * len(named)])
        tops, floors = [], []
        for index, (name, result) in enumerate(named.items()):
            spectrum = result.density
            if spectrum is None:
                raise ValueError(f"There is no density of {name or 'the model'} to draw: measure it with density=True.")
            axes.plot(spectrum.grid, spectrum.values, label=name or None, **line_style(index, marker=False))
            tops.append(float(spectrum.values.max()))
            # A single eigenvalue has a peak of 1/(P·width·√2π): what is much lower is only the tail of a Gaussian.
            floors.append(0.1 / (max(result.parameters, 1) * spectrum.width))
            ends = [*result.eigenvalues, result.smallest]
            strip.plot(ends, [index] * len(ends), "|", color=SHADES[index % 6], markersize=11, markeredgewidth=1.5)
        axes.set(yscale="log", ylim=(max(min(floors), max(tops) * 1e-7), max(tops) * 3))
        axes.set(ylabel="share of eigenvalues\nper unit of λ", title="Spectral density of the Hessian")
        if len(named) > 1:
            axes.legend(loc="upper right")
        strip.set_yticks(range(len(named)), [name or "computed" for name in named])
        marks = "eigenvalue λ of the Hessian (marks: the computed largest and smallest)"
        strip.set(ylim=(len(named) - 0.4, -0.6), xlabel=marks)

    return drawn(path, plot, (7, 4 + 0.3 * len(named)))


def draw_eigenvalues(rounds: Sequence[int], results: Sequence[HessianResult], path: str | Path) -> Path:
    """The eigenvalues over the rounds; for a single measurement, by rank with their residuals as error bars."""

    def history(figure: "Figure") -> None:
        axes = figure.subplots()
        for k in range(min(len(r.eigenvalues) for r in results)):
            label = LAMBDA_MAX if k == 0 else rf"$\lambda_{{{k + 1}}}$"
            axes.plot(rounds, [r.eigenvalues[k] for r in results], label=label, **line_style(k))
        axes.plot(rounds, [r.smallest for r in results], color="0.6", marker="_", linewidth=1, label=LAMBDA_MIN)
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set(xlabel="round", ylabel="eigenvalue of the Hessian", title="Largest and smallest eigenvalues")
        axes.legend(ncols=2)

    def ranks(figure: "Figure") -> None:
        axes, result = figure.subplots(), results[0]
        look: dict[str, Any] = {"width": 0.6, "edgecolor": "black", "capsize": 4}
        k = len(result.eigenvalues)
        axes.bar(range(1, k + 1), result.eigenvalues, yerr=result.residuals, color="0.75", **look)
        axes.bar(k + 1, result.smallest, yerr=result.smallest_residual, color="white", hatch="//", **look)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(1, k + 2), [*(rf"$\lambda_{{{i}}}$" for i in range(1, k + 1)), LAMBDA_MIN])
        axes.set_xlabel("eigenvalue, by rank (whiskers: ± residual ‖Hv − λv‖)")
        axes.set(ylabel="value", title="Eigenvalues of the Hessian")

    return drawn(path, history if len(results) > 1 else ranks, (6, 4))


def draw_contour(surface: LossSurface, path: str | Path) -> Path:
    """The loss on a plane as labelled contour lines; the model is the cross."""

    def plot(figure: "Figure") -> None:
        axes = figure.subplots()
        loss, levels = _levels(surface)
        shades = axes.contourf(surface.a, surface.b, loss.T, levels=levels, cmap="Greys", alpha=0.6)
        lines = axes.contour(surface.a, surface.b, loss.T, levels=levels, colors="black", linewidths=0.7)
        axes.clabel(lines, fontsize=8, fmt="%.3g")
        axes.plot(0, 0, "x", color="black", markersize=9, markeredgewidth=2)
        axes.grid(False)
        axes.set(aspect="equal", xlabel="a, along direction 1", ylabel="b, along direction 2")
        axes.set_title(f"Loss around the model (×)\n{surface.directions}")
        figure.colorbar(shades, ax=axes, label="loss", format="%.3g")

    return drawn(path, plot, (6.4, 5.4))


def draw_surface(surface: LossSurface, path: str | Path) -> Path:
    """The loss on a plane as a surface in three dimensions."""

    def plot(figure: "Figure") -> None:
        axes: Any = figure.add_subplot(projection="3d")
        loss, levels = _levels(surface)
        a, b = torch.meshgrid(surface.a, surface.b, indexing="ij")
        axes.plot_surface(
            a.numpy(), b.numpy(), loss.clamp(max=levels[-1]).numpy(), rstride=1, cstride=1,
            cmap="Greys", edgecolor="black", linewidth=0.3, alpha=0.9,
        )  # fmt: skip
        axes.view_init(elev=32, azim=-58)
        axes.set_xlabel("a, along direction 1", labelpad=8)
        axes.set_ylabel("b, along direction 2", labelpad=8)
        axes.set_zlabel("loss", labelpad=6)
        axes.locator_params(nbins=5)
        axes.set_box_aspect(None, zoom=0.83)
        axes.set_title(f"Loss around the model\n{surface.directions}", y=0.98)

    return drawn(path, plot, (6.5, 5.5))


def draw_line(
    lines: LossLine | Mapping[str, LossLine], path: str | Path, ends: tuple[str, str] = ("w_0", "w_1")
) -> Path:
    """The loss on the line between two models that ``ends`` names, for one or several losses (as training and test)."""
    named = lines if isinstance(lines, Mapping) else {"": lines}

    def plot(figure: "Figure") -> None:
        axes = figure.subplots()
        for index, (name, line) in enumerate(named.items()):
            axes.plot(line.t, line.loss, label=name or None, **line_style(index))
        for position, name in enumerate(ends):
            axes.axvline(position, color="0.5", linewidth=1, linestyle=":")
            axes.annotate(
                name, (position, 1), xycoords=("data", "axes fraction"), xytext=(4, -4), textcoords="offset points",
                va="top",
            )  # fmt: skip
        axes.set(xlabel="t: weights (1 − t)·w₀ + t·w₁", ylabel="loss")
        axes.set_title(f"Loss between {ends[0]} and {ends[1]}", pad=12)
        if len(named) > 1:
            axes.legend()

    return drawn(path, plot, (6, 4))


def _levels(surface: LossSurface) -> tuple[torch.Tensor, list[float]]:
    """The loss with what is not finite cut off, and levels that are denser near the bottom."""
    finite = surface.loss[surface.loss.isfinite()]
    if not len(finite):
        raise ValueError("The loss is nowhere finite on this surface: choose a smaller radius.")
    low, high = float(finite.min()), float(finite.max())
    loss = surface.loss.nan_to_num(nan=high, posinf=high)
    span = max(high - low, 1e-12)
    return loss, [low + span * (i / 14) ** 1.7 for i in range(15)]


@dataclass(frozen=True)
class LayerHistory:
    """One layer over the rounds, from 1: λ_max of its block of the Hessian, by the round after which it was measured.

    ``norms`` are mean(a²) of its output after its non-linearity; empty where there is none, as for the logits.
    """

    name: str
    lambda_max: Mapping[int, float]
    norms: Mapping[int, float] = field(default_factory=dict)


def draw_layers(layers: Sequence[LayerHistory], path: str | Path) -> Path:
    """For every layer, its activation norm and its λ_max over the rounds: the theorem beside the measurement.

    Where λ_max was measured once only, both are bars, the norms those of the latest round.
    """
    if not layers:
        raise ValueError("There are no layers to draw.")
    if all(len(layer.lambda_max) == 1 for layer in layers):
        return _draw_once(layers, path)
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)

    def plot(figure: "Figure") -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axes, layer in zip(grid.flat, layers, strict=False):
            _layer_panel(axes, layer)
        for axes in list(grid.flat)[len(layers) :]:
            axes.set_visible(False)
        for column in range(columns):  # of every column, the lowest panel that is there
            lowest = max(i for i in range(len(layers)) if i % columns == column)
            grid.flat[lowest].set_xlabel("round")
            grid.flat[lowest].tick_params(labelbottom=True)
        names = f"{LAMBDA_MAX} of the layer's block of the Hessian (left axis)", "activation norm mean(a²) (right axis)"
        for i, name in enumerate(names):
            figure.axes[0].plot([], [], label=name, **line_style(i, marker=i == 0))
        figure.legend(loc="outside upper center", ncols=2)

    return drawn(path, plot, (3.6 * columns + 0.6, 2.5 * rows + 0.7))


def _layer_panel(axes: "Axes", layer: LayerHistory) -> None:
    axes.plot([*layer.lambda_max], [*layer.lambda_max.values()], **line_style(0))
    axes.set_title(layer.name, fontsize=10)
    axes.set_ylabel(LAMBDA_MAX)
    axes.margins(y=0.12)  # a marker at the top is seen whole
    axes.set_ylim(bottom=min(0.0, *layer.lambda_max.values()))
    if layer.norms:
        twin = axes.twinx()
        twin.grid(False)
        twin.spines["right"].set_visible(True)
        twin.plot([*layer.norms], [*layer.norms.values()], **line_style(1, marker=False))
        twin.set_ylabel("mean(a²)", color=SHADES[1])
        twin.set_ylim(bottom=0)


def _draw_once(layers: Sequence[LayerHistory], path: str | Path) -> Path:
    having = [layer for layer in layers if layer.norms]

    def plot(figure: "Figure") -> None:
        panels = figure.subplots(1, 2 if having else 1, sharey=True, squeeze=False)[0]
        names, (round, *_) = [layer.name for layer in layers], layers[0].lambda_max
        values = {layer.name: next(iter(layer.lambda_max.values())) for layer in layers}
        norms = {layer.name: [*layer.norms.values()][-1] for layer in having}
        titles = f"{LAMBDA_MAX} of the layer's block of the Hessian", f"mean(a²) in round {round}"
        for axes, found, title, color in zip(panels, (values, norms), titles, ("0.75", "white"), strict=False):
            places = [names.index(name) for name in found]
            bars = axes.barh(places, list(found.values()), height=0.6, color=color, edgecolor="black")
            axes.bar_label(bars, fmt="%.3g", padding=3)
            axes.margins(x=0.15)
            axes.set_xlabel(title)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)  # the first layer at the top
        figure.suptitle(f"Layers after round {round}")

    return drawn(path, plot, (8 if having else 5.5, 1.4 + 0.4 * len(layers)))
