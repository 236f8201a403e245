"""A partition as a picture and as a table."""

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_CLIENTS = 1000  # as many columns as a picture of this size can show
_INK = "0.25"


def save_partition_picture(counts: Tensor, path: str | Path, class_names: list[str] | None = None) -> None:
    """Draw which client holds how many samples of which class: bubbles for few clients, shades of grey for many.

    Above it are the sizes of the clients. It is drawn in black and white. Of more than 1,000 clients, 1,000 evenly
    spaced ones are shown.

    Args:
        counts: ``[num_clients, num_classes]``; with one column, the sizes alone are drawn.
        path: where the picture goes; its suffix gives the format (``.png``, ``.pdf``, ``.svg``).
        class_names: names of the classes; numbers by default.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    counts = shown = counts.cpu()
    label = "client"
    if len(counts) > _MOST_CLIENTS:
        shown = counts[torch.linspace(0, len(counts) - 1, _MOST_CLIENTS).long()]
        label = f"client ({_MOST_CLIENTS:,} of {len(counts):,}, evenly spaced)"
    clients, classes = shown.shape
    if classes == 1:
        figure = Figure(figsize=(8, 3), layout="constrained")
        top = main = figure.subplots()
    else:
        # Bubbles need a square cell each, shades do not.
        bubbles = clients <= 40 and classes <= 20
        height = 0.34 * classes + 2.4 if bubbles else 6.0
        width = 0.34 * clients + 2.4 if bubbles else 9.0
        figure = Figure(figsize=(min(max(width, 6.5), 14.0), min(max(height, 4.5), 9.0)), layout="constrained")
        top, main = figure.subplots(2, sharex=True, height_ratios=(1, 4))
        (_bubbles if bubbles else _shades)(main, shown)
        main.set_ylabel("class")
        _class_ticks(main, classes, class_names)
    main.set_xlabel(label)
    _sizes(top, shown.sum(1))
    figure.suptitle(_summary(counts), fontsize=10)
    figure.savefig(path, dpi=150)


def _sizes(axes: "Axes", sizes: Tensor) -> None:
    """Samples of each client as bars; their outline alone where bars would touch."""
    positions = torch.arange(len(sizes))
    if len(sizes) <= 60:
        axes.bar(positions.numpy(), sizes.numpy(), width=0.7, color=_INK)
    else:
        axes.fill_between(positions.numpy(), sizes.numpy(), step="mid", color="0.6", linewidth=0)
        axes.step(positions.numpy(), sizes.numpy(), where="mid", color="black", linewidth=0.6)
    axes.set(xlim=(-0.7, len(sizes) - 0.3), ylim=(0, None), ylabel="samples")
    axes.locator_params(axis="x", integer=True)
    axes.locator_params(axis="y", nbins=4, integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _bubbles(axes: "Axes", counts: Tensor) -> None:
    """One disc per client and class, its area in proportion to the number of samples."""
    client, label = torch.nonzero(counts).T
    largest = int(counts.max())
    scale = 190.0 / largest  # points² of a sample: the largest disc is just inside its cell
    axes.scatter(client.numpy(), label.numpy(), s=(counts[client, label] * scale).numpy(), color=_INK)
    axes.set_ylim(-0.8, counts.shape[1] - 0.2)
    axes.set_axisbelow(True)
    axes.grid(color="0.9", linewidth=0.6)
    examples = sorted({max(1, round(largest * share)) for share in (0.1, 0.5, 1.0)})
    handles = [axes.scatter([], [], s=n * scale, color=_INK, label=f"{n:,}") for n in examples]
    axes.legend(
        handles=handles, title="samples", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelspacing=1
    )


def _shades(axes: "Axes", counts: Tensor) -> None:
    """One cell per client and class, the darker the more samples; white is none."""
    from matplotlib.colors import PowerNorm

    shade = PowerNorm(gamma=0.5, vmin=0)  # a few large counts must not blanch the many small ones
    look: dict[str, Any] = {"aspect": "auto", "origin": "lower", "cmap": "Greys", "interpolation": "nearest"}
    image = axes.imshow(counts.T.numpy(), norm=shade, **look)
    axes.figure.colorbar(image, ax=axes, label="samples of the class", pad=0.02, shrink=0.9, format="{x:,.0f}")


def _class_ticks(axes: "Axes", classes: int, names: list[str] | None) -> None:
    if names is not None and len(names) == classes and classes <= 30:
        axes.set_yticks(range(classes), names, fontsize=8)
    elif classes <= 20:
        axes.set_yticks(range(classes))
    else:
        axes.locator_params(axis="y", integer=True)


def _summary(counts: Tensor) -> str:
    """One line on the sizes and on how many classes a client has."""
    sizes = counts.sum(1)
    line = f"{len(counts):,} clients, {int(sizes.sum()):,} samples: {_spread(sizes)} per client"
    if counts.shape[1] > 1:
        line += f"; {_spread((counts > 0).sum(1))} of {counts.shape[1]} classes"
    return line


def _spread(values: Tensor) -> str:
    low, middle, high = int(values.min()), values.double().median().item(), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {middle:,.0f})"


def partition_csv(counts: Tensor, class_names: list[str] | None = None) -> str:
    """The partition of all clients as CSV: ``client,samples,classes`` and a column per class, then the total."""
    names = class_names if class_names and len(class_names) == counts.shape[1] else range(counts.shape[1])
    rows: list[list[Any]] = [["client", "samples", "classes", *names]]
    for client, row in [*enumerate(counts.tolist()), ("total", counts.sum(0).tolist())]:
        rows.append([client, sum(row), sum(n > 0 for n in row), *row])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
