"""What measurements leave behind: rows of metrics, files, and pictures over the rounds."""

import csv
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch.loggers import Logger
from torch import nn

from fedlight.analysis import pictures
from fedlight.analysis.landscape import LossLine, LossSurface
from fedlight.analysis.layers import layer_blocks
from fedlight.analysis.result import HessianResult
from fedlight.run.loggers import tell
from fedlight.run.wandb import is_wandb, log_curve

Rows = Sequence[Mapping[str, float]]


def metrics(results: Mapping[str, HessianResult]) -> dict[str, float]:
    """The scalars of all views in one row; those of other views than the server's end in ``_<view>``."""
    row = {f"{name}{_suffix(view)}": v for view, result in results.items() for name, v in result.metrics().items()}
    seconds = {id(result): sum(result.seconds.values()) for result in results.values()}  # views may share one
    return {k: v for k, v in row.items() if not k.startswith("time/")} | {"time/hessian_s": sum(seconds.values())}


def save(results: Mapping[str, HessianResult], folder: Path, stem: str) -> None:
    """Write ``<stem>.npz`` with everything, and the density as ``<stem>_density.csv``, for each view."""
    for view, result in results.items():
        result.save(folder / f"{stem}{_suffix(view)}.npz")
        if result.density is not None:
            with (folder / f"{stem}{_suffix(view)}_density.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(("eigenvalue", "density"))
                writer.writerows(result.density_table())


def draw_densities(results: Mapping[str, HessianResult], path: Path) -> Path | None:
    """The spectral densities of the views that have one; None where none has."""
    having = {view: result for view, result in results.items() if result.density is not None}
    if not having:
        return None
    return pictures.draw_density(having if len(having) > 1 else next(iter(having.values())), path)


def draw_rounds(module: nn.Module, rows: Rows, folder: Path) -> list[Path]:
    """``layers.png`` and, after two measurements, ``eigenvalues.png``, from the rows of ``metrics.csv``.

    The ``module`` tells in which order layers and activations come.
    """
    drawn = draw_layers(module, rows, folder / "layers.png")
    measured = [row for row in rows if math.isfinite(row.get("hessian/lambda_max", math.nan))]
    if len(measured) > 1:
        rounds = [1 + int(row["round"]) for row in measured]
        drawn.append(pictures.draw_eigenvalues(rounds, [*map(_from_row, measured)], folder / "eigenvalues.png"))
    return drawn


def draw_layers(module: nn.Module, rows: Rows, path: Path) -> list[Path]:
    """The layers' λ_max and activation norms over the rounds; nothing where none was measured."""
    layers = layer_histories(module, rows)
    return [pictures.draw_layers(layers, path)] if layers else []


def draw_survey(surface: LossSurface, folder: Path, stem: str) -> list[Path]:
    """Draw a surface as ``plots/landscape<stem>_contour.png`` and ``_surface.png``, and save its grid.

    Where the loss is nowhere finite, a warning says so and nothing is drawn.
    """
    surface.save(folder / "hessian" / f"landscape{stem}.npz")
    if not bool(surface.loss.isfinite().any()):
        rank_zero_warn("The loss is nowhere finite around this model, so its landscape is not drawn.")
        return []
    kinds = {"contour": pictures.draw_contour, "surface": pictures.draw_surface}
    return [draw(surface, folder / "plots" / f"landscape{stem}_{kind}.png") for kind, draw in kinds.items()]


def draw_lines(lines: dict[str, LossLine], folder: Path, stem: str, ends: tuple[str, str]) -> Path:
    """Draw the losses between two models as ``plots/line<stem>.png``, and save them."""
    for name, line in lines.items():
        line.save(folder / "hessian" / f"line{stem}_{name}.npz")
    return pictures.draw_line(lines, folder / "plots" / f"line{stem}.png", ends)


def layer_histories(module: nn.Module, rows: Rows) -> list[pictures.LayerHistory]:
    """λ_max of each layer that was measured, and the activation norm that MAN logged.

    An activation belongs to the layers that come before it in the module and after the previous activation.
    """
    owners: dict[str, str] = {}
    waiting: list[str] = []
    blocks = layer_blocks(module)
    logged = {name for row in rows for name in row}
    for name, _ in module.named_modules():
        if name in blocks:
            waiting.append(name)
        if f"man/{name}" in logged:
            owners |= dict.fromkeys(waiting, f"man/{name}")
            waiting = []
    out = []
    for name in blocks:
        if values := _series(rows, f"hessian/layer/{name}/lambda_max"):
            out.append(pictures.LayerHistory(name, values, _series(rows, owners.get(name, ""))))
    return out


def log_density(loggers: Sequence[Logger], results: Mapping[str, HessianResult]) -> None:
    """Send the densities to those loggers that take tables of (eigenvalue, density); W&B draws a curve of them."""
    having = {view: result for view, result in results.items() if result.density is not None}

    def log(logger: Any) -> None:
        for view, result in having.items():
            rows = [list(row) for row in result.density_table()]
            log_table = partial(log_curve, logger) if is_wandb(logger) else logger.log_table
            log_table(key=f"hessian/density{_suffix(view)}", columns=["eigenvalue", "density"], data=rows)

    tell((logger for logger in loggers if hasattr(logger, "log_table")), log)


def _suffix(view: str) -> str:
    return "" if view == "server" else f"_{view}"


def _series(rows: Rows, key: str) -> dict[int, float]:
    return {1 + int(row["round"]): row[key] for row in rows if key in row}


def _from_row(row: Mapping[str, float]) -> HessianResult:
    """The eigenvalues of a row, for the picture."""
    values = [row["hessian/lambda_max"]]
    while f"hessian/lambda_{len(values) + 1}" in row:
        values.append(row[f"hessian/lambda_{len(values) + 1}"])
    return HessianResult(math.nan, math.nan, math.nan, 1.0, values, [], row["hessian/lambda_min"], math.nan)
