"""What a trainer does with trained weights: evaluate, predict, analyze, export."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule

from fedlight.analysis.result import HessianResult
from fedlight.analysis.run import analyze
from fedlight.checks import path_of
from fedlight.data.datamodule import FederatedDataModule
from fedlight.run.evaluation import Stage
from fedlight.run.interface import TrainerInterface
from fedlight.run.lightning_names import answering
from fedlight.run.results import destination, export, keep, predict
from fedlight.run.session import Session
from fedlight.run.summary import RunSummary
from fedlight.server.federation import View


class Commands(TrainerInterface):
    """The commands of a trainer but ``fit``."""

    _session: Session

    @answering
    def validate(
        self,
        model: LightningModule | None = None,
        datamodule: FederatedDataModule | None = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
    ) -> list[dict[str, float]]:
        """Evaluate the views of a checkpoint, or a module as it is, on the validation data.

        Args:
            model: the module; it holds the server's model of the checkpoint afterwards. Without one, as in Lightning,
                that of the last call is meant, with its data and, if none is named, the best checkpoint of its run.
            datamodule: the data.
            ckpt_path: a file, or ``last`` or ``best`` of the newest run of this name; the module as it is by default.
            verbose: print the metrics.
        """
        return self._evaluate(Session(self, model, datamodule, "validate", ckpt_path), "validation", verbose)

    @answering
    def test(
        self,
        model: LightningModule | None = None,
        datamodule: FederatedDataModule | None = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
    ) -> list[dict[str, float]]:
        """Evaluate the views of a checkpoint, or a module as it is, on the test data.

        Args:
            model: the module, or None, as for :meth:`validate`; it holds the server's model afterwards.
            datamodule: the data.
            ckpt_path: a file, or ``last`` or ``best`` of the newest run of this name; the module as it is by default.
            verbose: print the metrics.
        """
        return self._evaluate(Session(self, model, datamodule, "test", ckpt_path), "test", verbose)

    def analyze(
        self,
        model: LightningModule | None = None,
        datamodule: FederatedDataModule | None = None,
        ckpt_path: str | Path | None = None,
        **options: Any,
    ) -> dict[str, HessianResult]:
        """Measure the curvature of a checkpoint's views, or of a module as it is: Hessian, density, landscape.

        Args:
            model: the module, or None, as for :meth:`validate`; it holds the server's model afterwards.
            datamodule: the data.
            ckpt_path: a file, or ``last`` or ``best`` of the newest run of this name; the module as it is by default.
            options: what to measure; see :func:`fedlight.analysis.run.analyze`.

        Returns:
            The figures by view.
        """
        return analyze(self, model, datamodule, ckpt_path, **options)

    @answering
    def predict(
        self,
        model: LightningModule | None = None,
        datamodule: FederatedDataModule | None = None,
        ckpt_path: str | Path | None = None,
        return_predictions: bool = True,
        view: View = "server",
        output: str | Path | None = None,
    ) -> list[Any] | None:
        """Predict from the data's ``predict_dataloader``, which by default is the test data, and write it to a file.

        Args:
            model: the module, or None, as for :meth:`validate`; it holds the server's model afterwards.
            datamodule: the data.
            ckpt_path: a file, or ``last`` or ``best`` of the newest run of this name; the module as it is by default.
            return_predictions: whether to return them.
            view: which weights: the ``server``'s, the ``selected`` clients' mean, that of ``all`` clients, or ``swa``.
            output: folder to write to; by default ``predictions/`` of the run.

        Returns:
            What ``predict_step`` returned for each batch, on the CPU.
        """
        with Session(self, model, datamodule, "predict", ckpt_path) as session:
            session.views.choose(view)
            outputs = predict(session, view, output)
            session.views.load("server")
            return outputs if return_predictions else None

    def export(
        self,
        model: LightningModule | None = None,
        datamodule: FederatedDataModule | None = None,
        ckpt_path: str | Path | None = None,
        *,
        to: str | Path,
        view: View = "server",
    ) -> None:
        """Write a trained model to a file that needs no fedlight.

        Args:
            model: the module; it holds the view's model afterwards.
            datamodule: the data.
            ckpt_path: a file, or ``last`` or ``best`` of the newest run of this name; the module as it is by default.
            to: ``.pt``: the module's ``state_dict``; ``.pt2``: its ``forward`` as ``torch.export`` has it; ``.onnx``.
            view: which weights: the ``server``'s, the ``selected`` clients' mean, that of ``all`` clients, or ``swa``.
        """
        with Session(self, model, datamodule, "predict", ckpt_path) as session:
            session.views.choose(view)
            if self.is_global_zero:
                export(session, path_of("to", to))
                print(f"{view} model: {to}", flush=True)

    def summary(self) -> RunSummary:
        """What was trained last and what came of it: text, and in a notebook a table with the curves.

        Raises:
            MisconfigurationException: if nothing has been trained.
        """
        if not self.facts:
            raise MisconfigurationException("There is no summary before fit: this trainer has trained nothing yet.")
        return RunSummary(self)

    def _evaluate(self, session: Session, stage: Stage, verbose: bool) -> list[dict[str, float]]:
        with session:
            metrics = session.views.evaluate(stage)
            session.views.load("server")
            if verbose and self.is_global_zero:
                width = max(map(len, metrics), default=0)
                print("\n".join(f"{name:<{width}}  {value:.4f}" for name, value in metrics.items()), flush=True)
            if self.is_global_zero and not self.fast_dev_run:
                limit = f"limit_{stage[:4].removesuffix('i')}_batches"
                keep(session, session.command, metrics, destination(session)[0], **{limit: self.settings[limit]})
            return [metrics]
