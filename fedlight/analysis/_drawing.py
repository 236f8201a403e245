"""How pictures are drawn. Lines differ in dash and shade, so that they can be told apart in black and white."""

from pathlib import Path
from typing import Any

_DASHES: list[Any] = ["-", "--", ":", "-.", (0, (1, 3)), (0, (6, 2, 1, 2, 1, 2))]
SHADES = ["black", "0.35", "0.5", "0.2", "0.6", "0.45"]
_MARKERS = ["o", "s", "^", "D", "v", "x"]
LAMBDA_MAX, LAMBDA_MIN = r"$\lambda_{\max}$", r"$\lambda_{\min}$"
_STYLE: Any = {
    "font.size": 10,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


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
        figure.savefig(path)
    return path
