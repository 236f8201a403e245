"""The loss around the final model, as pictures."""

from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities import rank_zero_warn

from fedlight.analysis.measurement import Survey, ViewName, checkpoint_weights, run_name
from fedlight.analysis.records import draw_lines, draw_survey
from fedlight.analysis.subject import Weights, is_federated, output_folder, subject_of
from fedlight.penalties.base import CallbackBase
from fedlight.run.loggers import log_picture
from fedlight.written import Remembers


@dataclass(eq=False, repr=False)
class LossLandscape(Remembers, Survey, CallbackBase):
    """Draws the task loss on a plane through the final model when a fit ends, federated or in a stock Trainer.

    ``plots/landscape_contour.png`` and ``plots/landscape_surface.png`` are written to the run's folder, and with
    ``line_to`` also ``plots/line.png``: the loss on the straight line to the model of another checkpoint. The grids are
    under ``hessian/``. It takes ``points``² evaluations over the data.

    Args:
        directions: ``random``: two random directions whose filters are as long as the model's (Li et al., 2018);
            ``eigenvectors``: those of the Hessian's two largest eigenvalues, of length 1.
        radius: how far to go in both directions; by default 1 for random ones, 0.5 for eigenvectors.
        points: grid points in each direction.
        line_to: checkpoint of the same model in another run.
        data: ``train`` or ``val``. The line shows both.
        max_samples: samples to draw of the data; None for all.
        view: which weights.
        float64: compute in float64 instead of float32.
        seed: of the samples and the directions: the same for every run that is to be compared.
    """

    optional_hooks = ("on_train_end",)

    who = "LossLandscape"
    line_to: str | None = None
    view: ViewName = "server"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what could not be drawn."""
        if is_federated(trainer):
            self._other(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """In a stock trainer the data are known only now."""
        if not is_federated(trainer):
            self._other(trainer, pl_module)
            if output_folder(trainer) is None and not trainer.fast_dev_run:
                rank_zero_warn("LossLandscape has no folder for its pictures: give the Trainer a logger with one.")

    def _other(self, trainer: Any, module: Any) -> Weights | None:
        """The end of the line, after a check of all settings."""
        subject = subject_of(trainer, module)
        self.check(subject, self.view)
        return None if self.line_to is None else checkpoint_weights(self.line_to, subject, self.view, "LossLandscape")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate and draw."""
        folder = output_folder(trainer)
        if folder is None:
            return
        subject, other = subject_of(trainer, pl_module), self._other(trainer, pl_module)
        surface = self.surface(subject, self.view)
        lines = {} if other is None else self.line(subject, other, self.view)
        if not trainer.is_global_zero:
            return
        pictures = draw_survey(surface, folder, "")
        if lines:
            pictures.append(draw_lines(lines, folder, "", ("this run", run_name(str(self.line_to)))))
        for picture in pictures:
            log_picture(trainer.loggers, f"plots/{picture.stem}", picture)
