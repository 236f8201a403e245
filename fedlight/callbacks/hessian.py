"""The Hessian of the loss while a model trains."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.analysis import records
from fedlight.analysis.measurement import Measurement
from fedlight.analysis.result import HessianResult
from fedlight.analysis.subject import Subject, is_federated, output_folder, subject_of
from fedlight.checks import check_whole
from fedlight.penalties.base import CallbackBase
from fedlight.run.folder import optional
from fedlight.run.loggers import log_picture, read_metrics
from fedlight.written import Remembers

_REDRAW = 30.0  # seconds between two drawings of the same history


@dataclass(eq=False, repr=False)
class HessianSpectrum(Remembers, Measurement, CallbackBase):
    """Measures the curvature of the task loss: eigenvalues, trace, spectral density, layers, sharpness.

    The loss is that of ``training_step`` without penalties, in eval mode and float32. Training is not touched: the
    weights are the same bits as without the callback. Several processes share the data. It works in a stock Trainer
    as well, where it measures the module after every ``every_n_rounds`` epochs, and their validation if there is one.

    The scalars ``hessian/...`` stand in the row of their round in ``metrics.csv``. In the run's folder are
    ``plots/density_round<t>.png`` (the latest and the last one), ``plots/layers.png`` (with MAN's activation norms,
    ``MAN(zeta=0)`` to measure them alone), ``plots/eigenvalues.png``, and under ``hessian/`` all figures of a round as
    ``round<t>.npz`` and its density as ``round<t>_density.csv``. W&B gets pictures, and the density as a table.

    Args:
        every_n_rounds: measure after every so many rounds, and after the last one.
        top_k: how many of the largest eigenvalues; the smallest one always comes with them.
        density: whether to estimate the spectral density.
        trace: whether to estimate the trace.
        layerwise: whether to find λ_max of every layer's block, or names of the layers to take.
        data: ``train``: the training data of all clients, without augmentation; ``val``: the validation data;
            ``clients``: as ``train``, and λ_max of each client's own loss besides.
        max_samples: samples to draw of the data, and of each client's; None for all. They are the same in every round.
        views: which weights: the ``server``'s, the ``selected`` clients' mean, that of ``all`` clients, or ``swa``.
        float64: compute in float64 instead of float32.
        sam_rho: ρ of the sharpness L(w + ρ ∇L/‖∇L‖) − L(w).
        tolerance: relative error of eigenvalues at which the iteration ends.
        seed: of the samples and the random vectors, whatever the seed of the run.

    Attributes:
        results: the latest measurement, by view.

    Example::

        trainer = FederatedTrainer(callbacks=[MAN(zeta=0.15), HessianSpectrum(every_n_rounds=20, top_k=3)])
    """

    optional_hooks = ("on_round_end", "on_train_end")

    who = "HessianSpectrum"
    every_n_rounds: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("HessianSpectrum: `every_n_rounds`", self.every_n_rounds)
        self.results: dict[str, HessianResult] = {}
        self._undrawn: int | None = None
        self._drawn_at, self._epoch = 0.0, -1

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what could not be measured."""
        if sum(isinstance(callback, HessianSpectrum) for callback in trainer.callbacks) > 1:
            raise MisconfigurationException("trainer.callbacks: two HessianSpectrum log the same names; keep one.")
        self.results, self._undrawn, self._drawn_at = {}, None, time.monotonic()
        if is_federated(trainer):
            self.check(subject_of(trainer, pl_module))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """In a stock trainer the data are known only now."""
        if is_federated(trainer):
            return
        self.check(subject_of(trainer, pl_module))
        # Not a method of the class: there it would be called after every local epoch of a client.
        vars(self).update(_epoch=-1, on_train_epoch_end=self._measure_epoch)

    def on_round_metrics(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """Measure, if this round is due; the figures join the row of the round."""
        subject = subject_of(trainer, pl_module)
        if not self._is_due(trainer, subject):
            return {}
        measured: dict[int, HessianResult] = {}
        self.results = {}
        for view in (v for v in self.views if v == "server" or v in trainer.federation.state.views):
            key = id(subject.weights[view][0])  # views may be the same vector
            if key not in measured:
                measured[key] = self.run(subject, view)
            self.results[view] = measured[key]
        self._undrawn = trainer.current_round
        if (folder := _folder(trainer)) is not None:
            with optional(self, "HessianSpectrum's files"):
                records.save(self.results, folder / "hessian", f"round{self._undrawn}")
        return records.metrics(self.results)

    def on_round_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw what was measured."""
        round, self._undrawn = self._undrawn, None
        folder = _folder(trainer)
        if round is None or folder is None:
            return
        if trainer.current_round < trainer.max_rounds:  # the last one and the one before it stay
            for old in (folder / "plots").glob("density_round*.png"):
                old.unlink()
        self._draw_density(trainer, folder, f"round{round}")
        if time.monotonic() - self._drawn_at > _REDRAW:
            self._draw_history(trainer, pl_module, folder)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the layers and the eigenvalues over the rounds."""
        vars(self).pop("on_train_epoch_end", None)
        if is_federated(trainer) and (folder := _folder(trainer)) is not None:
            self._draw_history(trainer, pl_module, folder)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """In a stock trainer: measure, log and draw after the validation at the end of an epoch."""
        if is_federated(trainer) or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # others come within an epoch
            self._measure_epoch(trainer, pl_module)

    def _measure_epoch(self, trainer: Any, pl_module: Any) -> None:
        epoch = trainer.current_epoch
        last = epoch + 1 == trainer.max_epochs or trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
        if epoch == self._epoch or ((epoch + 1) % self.every_n_rounds and not last):
            return
        self._epoch = epoch
        self.results = {"server": self.run(subject_of(trainer, pl_module))}
        pl_module.log_dict(records.metrics(self.results), sync_dist=trainer.world_size > 1)
        if (folder := _folder(trainer)) is not None:
            with optional(self, "HessianSpectrum's files and pictures"):
                records.save(self.results, folder / "hessian", f"epoch{epoch}")
                self._draw_density(trainer, folder, f"epoch{epoch}")

    def _is_due(self, trainer: Any, subject: Subject) -> bool:
        last = trainer.current_round >= trainer.max_rounds
        if trainer.should_stop and not last:  # of itself; a signal leaves no time for this
            interrupted = torch.tensor(float(trainer.received_sigterm), device=subject.device)
            last = float(subject.total(interrupted) if subject.world_size > 1 else interrupted) == 0
        return last or int(trainer.current_round) % self.every_n_rounds == 0

    def _draw_density(self, trainer: Any, folder: Path, when: str) -> None:
        picture = records.draw_densities(self.results, folder / "plots" / f"density_{when}.png")
        if picture is not None:
            log_picture(trainer.loggers, "plots/density", picture)
        records.log_density(trainer.loggers, self.results)

    def _draw_history(self, trainer: Any, module: Any, folder: Path) -> None:
        self._drawn_at = time.monotonic()
        for path in records.draw_rounds(module, read_metrics(folder / "metrics.csv"), folder / "plots"):
            log_picture(trainer.loggers, f"plots/{path.stem}", path)


def _folder(trainer: Any) -> Path | None:
    """Where this process writes; every one must ask."""
    folder = output_folder(trainer)
    return folder if trainer.is_global_zero else None
