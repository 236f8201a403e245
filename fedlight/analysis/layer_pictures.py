"""Pictures of the layers: λ_max of each one's block of the Hessian beside its activation norm."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fedlight.analysis._drawing import LAMBDA_MAX, SHADES, drawn, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerHistory:
    """One layer over the rounds.

    Attributes:
        name: of the layer.
        rounds: after which λ_max was measured, from 1.
        lambda_max: of the layer's block of the Hessian.
        norm_rounds: at which the activation norm is known.
        norms: mean(a²) of the layer's output after its non-linearity; empty where there is none, as for the logits.
    """

    name: str
    rounds: Sequence[int]
    lambda_max: Sequence[float]
    norm_rounds: Sequence[int] = field(default_factory=list)
    norms: Sequence[float] = field(default_factory=list)


def draw_layers(layers: Sequence[LayerHistory], path: str | Path) -> Path:
    """For every layer, its activation norm and its λ_max over the rounds: the theorem beside the measurement.

    Where λ_max was measured once only, both are bars, the norms those of the latest round.
    """
    if not layers:
        raise ValueError("There are no layers to draw.")
    if all(len(layer.rounds) == 1 for layer in layers):
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
        handles = [
            figure.axes[0].plot([], [], **line_style(0))[0],
            figure.axes[0].plot([], [], **line_style(1, marker=False))[0],
        ]
        names = [
            f"{LAMBDA_MAX} of the layer's block of the Hessian (left axis)",
            "activation norm mean(a²) (right axis)",
        ]
        figure.legend(handles, names, loc="outside upper center", ncols=2)

    return drawn(path, plot, (3.6 * columns + 0.6, 2.5 * rows + 0.7))


def _layer_panel(axes: "Axes", layer: LayerHistory) -> None:
    axes.plot(layer.rounds, layer.lambda_max, **line_style(0))
    axes.set_title(layer.name, fontsize=10)
    axes.set_ylabel(LAMBDA_MAX)
    axes.margins(y=0.12)  # a marker at the top is seen whole
    axes.set_ylim(bottom=min(0.0, *layer.lambda_max))
    if layer.norms:
        twin = axes.twinx()
        twin.grid(False)
        twin.spines["right"].set_visible(True)
        twin.plot(layer.norm_rounds, layer.norms, **line_style(1, marker=False))
        twin.set_ylabel("mean(a²)", color=SHADES[1])
        twin.set_ylim(bottom=0)


def _draw_once(layers: Sequence[LayerHistory], path: str | Path) -> Path:
    having = [layer for layer in layers if layer.norms]

    def plot(figure: "Figure") -> None:
        panels = figure.subplots(1, 2 if having else 1, sharey=True, squeeze=False)[0]
        names = [layer.name for layer in layers]
        values = {layer.name: layer.lambda_max[0] for layer in layers}
        norms = {layer.name: layer.norms[-1] for layer in having}
        titles = f"{LAMBDA_MAX} of the layer's block of the Hessian", f"mean(a²) in round {layers[0].rounds[0]}"
        for axes, found, title, color in zip(panels, (values, norms), titles, ("0.75", "white"), strict=False):
            places = [names.index(name) for name in found]
            bars = axes.barh(places, list(found.values()), height=0.6, color=color, edgecolor="black")
            axes.bar_label(bars, fmt="%.3g", padding=3)
            axes.margins(x=0.15)
            axes.set_xlabel(title)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)  # the first layer at the top
        figure.suptitle(f"Layers after round {layers[0].rounds[0]}")

    return drawn(path, plot, (8 if having else 5.5, 1.4 + 0.4 * len(layers)))
