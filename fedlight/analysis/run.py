"""``fedlight analyze``: the curvature of a trained model, as a table, pictures and files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import LightningModule

from fedlight.analysis import records
from fedlight.analysis.measurement import Directions, Measurement, Survey, ViewName, checkpoint_weights, run_name
from fedlight.analysis.pictures import draw_eigenvalues
from fedlight.analysis.result import HessianResult
from fedlight.analysis.subject import DataName, Subject, federated_subject
from fedlight.data.datamodule import FederatedDataModule
from fedlight.run.context import RunContext
from fedlight.run.folder import writing
from fedlight.run.interface import TrainerInterface
from fedlight.run.loggers import read_metrics
from fedlight.run.results import destination, keep
from fedlight.run.session import Session


def analyze(
    trainer: TrainerInterface,
    model: LightningModule | None,
    datamodule: FederatedDataModule | None,
    ckpt_path: str | Path | None,
    *,
    top_k: int = 5,
    density: bool = True,
    trace: bool = True,
    layerwise: bool | list[str] = True,
    on: DataName = "train",
    max_samples: int | None = 5000,
    views: Sequence[ViewName] = ("server",),
    float64: bool = False,
    sam_rho: float = 0.05,
    tolerance: float = 1e-3,
    landscape: Directions | None = None,
    line_to: str | None = None,
    landscape_points: int = 17,
    landscape_radius: float | None = None,
    landscape_samples: int | None = 1000,
    output: str | Path | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> dict[str, HessianResult]:
    """Measure the curvature of a checkpoint's views, or of a module as it is.

    Args:
        trainer: devices and processes.
        model: the module; it holds the server's model of the checkpoint afterwards.
        datamodule: the data.
        ckpt_path: a file, or ``last`` or ``best`` of the newest run of this name; the module as it is by default.
        top_k: how many of the largest eigenvalues; the smallest one always comes with them.
        density: whether to estimate the spectral density.
        trace: whether to estimate the trace.
        layerwise: whether to find λ_max of every layer's block, or names of the layers to take.
        on: ``train``: the training data of all clients, without augmentation; ``val``: the validation data;
            ``clients``: as ``train``, and λ_max of each client's own loss besides.
        max_samples: samples to draw of the data, and of each client's; None for all.
        views: which weights: the ``server``'s, the ``selected`` clients' mean, that of ``all`` clients, or ``swa``.
        float64: compute in float64 instead of float32.
        sam_rho: ρ of the sharpness L(w + ρ ∇L/‖∇L‖) − L(w).
        tolerance: relative error of eigenvalues at which the iteration ends.
        landscape: draw the loss around the first view along ``random`` directions or ``eigenvectors``.
        line_to: draw the loss on the straight line from the first view to that of this other checkpoint.
        landscape_points: grid points in each direction.
        landscape_radius: how far to go in both directions.
        landscape_samples: samples to draw for landscape and line; None for all.
        output: folder to write ``plots/`` and ``hessian/`` to; by default the run's.
        seed: of the samples, the random vectors and the directions.
        verbose: print the figures.

    Returns:
        The figures by view.
    """
    what = {"top_k": top_k, "density": density, "trace": trace, "layerwise": layerwise, "data": on, "views": views}
    how = {"max_samples": max_samples, "float64": float64, "seed": seed}
    measurement = Measurement(**what, **how, sam_rho=sam_rho, tolerance=tolerance)  # type: ignore[arg-type]
    looked_at: DataName = "val" if on == "val" else "train"
    where = landscape or "random", landscape_radius, landscape_points
    survey = Survey(*where, looked_at, landscape_samples, float64, seed)
    with Session(trainer, model, datamodule, "validate", ckpt_path) as session:
        session.datamodule.setup("fit")
        subject, first = federated_subject(trainer), measurement.views[0]
        measurement.check(subject)
        other = None if line_to is None else checkpoint_weights(line_to, subject, first, "analyze")
        folder, stem = destination(session, output)
        results: dict[str, HessianResult] = {}
        for view in measurement.views:
            if verbose and trainer.is_global_zero:
                print(f"measuring the Hessian at {stem} ({view}) ...", flush=True)
            results[view] = measurement.run(subject, view)
        pictures: list[Path] = []
        if trainer.is_global_zero:
            with writing(folder):
                pictures += _write(results, subject, session, folder, stem)
            keep(session, "analyze", records.metrics(results), folder, on=on, **how)
        if landscape is not None:
            surface = survey.surface(subject, first)
            if trainer.is_global_zero:
                pictures += records.draw_survey(surface, folder, f"_{stem}")
        if other is not None:
            lines = survey.line(subject, other, first)
            if trainer.is_global_zero:
                name = stem if session.folder is None else "/".join(session.folder.path.parts[-2:])
                pictures.append(records.draw_lines(lines, folder, f"_{stem}", (name, run_name(str(line_to)))))
        session.views.load("server")
        if verbose and trainer.is_global_zero:
            for which, result in results.items():
                print(f"\nHessian of the loss ({which}): {stem}, after {trainer.current_round} rounds")
                print(result.summary())
            print("\n".join(["figures: " + str(folder / "hessian"), *(f"picture: {path}" for path in pictures)]))
        return results


def _write(
    results: Mapping[str, HessianResult], subject: Subject, session: RunContext, folder: Path, stem: str
) -> list[Path]:
    """Files and pictures of the measurement."""
    records.save(results, folder / "hessian", stem)
    plots, round = folder / "plots", session.trainer.current_round - 1
    drawn = [records.draw_densities(results, plots / f"density_{stem}.png")]
    first = next(iter(results.values()))
    if math.isfinite(first.lambda_max):
        drawn.append(draw_eigenvalues([round], [first], plots / f"eigenvalues_{stem}.png"))
    # What the run logged until this round, beside what was measured now.
    rows = [row for row in read_metrics(folder / "metrics.csv") if row["round"] < round]
    now = next((row for row in read_metrics(folder / "metrics.csv") if row["round"] == round), {})
    rows.append({**now, "round": round, **records.metrics({"server": first})})
    drawn += records.draw_layers(subject.module, rows, plots / f"layers_{stem}.png")
    return [path for path in drawn if path is not None]
