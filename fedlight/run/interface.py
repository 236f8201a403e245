"""What callbacks and modules find on ``trainer``: the names of Lightning's Trainer, and the checked settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerState

from fedlight.algorithms.base import Algorithm
from fedlight.algorithms.fedavg import FedAvg
from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.callbacks.config_file import ConfigFile
from fedlight.callbacks.pictures import Curves, PartitionPicture
from fedlight.callbacks.progress import RoundProgress
from fedlight.module.hooks import in_federated_terms
from fedlight.penalties.base import Penalty
from fedlight.penalties.numbers import largest, scheduled
from fedlight.perturbations.base import Perturbation
from fedlight.run.checkpoint import CheckpointWriter
from fedlight.run.lightning_names import LightningNames
from fedlight.run.names import method_name
from fedlight.run.settings import check_settings, one_personalization, one_perturbation
from fedlight.server.federation import Federation
from fedlight.server.incoming import Report
from fedlight.server.sampling import Sampler, Uniform

_ADDED = ("perturbation", "personal", "aggregator")
_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}  # as in Lightning


class Call(Protocol):
    """What a trainer asks of its running call of fit, validate, test or analyze."""

    federation: Federation
    writer: CheckpointWriter

    def snapshot(self) -> dict[str, Any]:
        """All that is needed to continue, now."""

    def save_checkpoint(self, path: Path, content: dict[str, Any], wait: bool = True) -> None:
        """Write a snapshot."""


class TrainerInterface(LightningNames):
    """Settings and state of a trainer, under the names that Lightning's Trainer has where it has one.

    Attributes:
        current_round: rounds that are complete; inside a round, its 0-based number.
        global_step: local steps of all clients so far; inside a round, those before it and the present client's.
        personal: what clients have for themselves.
        should_stop: set it to stop after the current round.
        callback_metrics: the latest value of every metric.
        federation: the server's and the clients' state.
        resumed: whether that comes from a checkpoint.
        views: which weights are evaluated, what they log, and whether this round is due.
        evaluator: evaluates a set of weights.
    """

    algorithm: Algorithm
    sampler: Sampler
    max_rounds: int
    local_epochs: int | None
    local_steps: int | None
    accumulate_grad_batches: int
    default_root_dir: Path
    name: str
    seed: int
    fast_dev_run: bool

    # Read by Lightning's own callbacks and by LightningModule.log, which says where it may be called.
    _results = None
    barebones = False

    def __init__(self, settings: dict[str, Any]) -> None:
        check_settings(settings)
        if settings["local_epochs"] is None and settings["local_steps"] is None:
            settings["local_epochs"] = 1
        if settings["fast_dev_run"]:
            one = {f"limit_{stage}_batches": 1 for stage in ("train", "val", "test")}
            settings |= one | {"max_rounds": 1, "local_epochs": 1, "local_steps": None, "enable_checkpointing": False}
        if settings["centralized"]:
            settings |= {"algorithm": FedAvg(), "aggregator": None, "sampler": Uniform(), "clients_per_round": 1}
        callbacks = settings.pop("callbacks")
        given = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
        self.callbacks: list[Callback] = in_federated_terms(c for c in given if c is not None)
        kinds = Checkpoint, RoundProgress, PartitionPicture, Curves, ConfigFile
        enabled = [settings[f"enable_{what}"] for what in ("checkpointing", "progress_bar", "plots", "plots")]
        for default, is_wanted in zip(kinds, [*enabled, True], strict=True):
            if is_wanted and not any(isinstance(c, default) for c in self.callbacks):
                self.callbacks.append(default())
        settings["default_root_dir"] = Path(settings["default_root_dir"])
        settings["precision"] = _PRECISIONS.get(str(settings["precision"]), settings["precision"])
        self.perturbation: Perturbation | None = one_perturbation(settings)
        self.personal = one_personalization(settings)
        self.settings = settings
        for key in ("algorithm", "sampler", "max_rounds", "local_epochs", "local_steps", "accumulate_grad_batches"):
            setattr(self, key, settings[key])
        for key in ("default_root_dir", "name", "seed", "fast_dev_run", "precision", "num_nodes"):
            setattr(self, key, settings[key])
        self._session: Call
        self.state = TrainerState()
        self.should_stop = False
        self._metrics: dict[str, torch.Tensor] = {}
        self.run_dir: Path | None = None
        self.facts: dict[str, str] = {}

    @property
    def method_name(self) -> str:
        """What trains, as loggers and reports call it: ``FedDyn+SAM+MAN``."""
        penalties = [type(penalty).__name__ for penalty in self.penalties]
        parts = [None if self.settings[k] is None else type(self.settings[k]).__name__ for k in _ADDED]
        return method_name(type(self.algorithm).__name__, parts, penalties, self.settings["centralized"])

    @property
    def scheduled(self) -> list[Any]:
        """The hyperparameters that follow a schedule: tensors, with its ``key`` and its ``schedule``."""
        own = self.algorithm, self.algorithm.penalty
        parts = *own, self.personal, self.perturbation, *self.settings["transforms"], *self.penalties
        return scheduled(*(vars(part) for part in parts if part is not None))

    @property
    def penalties(self) -> list[Penalty]:
        """The penalties that act: all but those whose weight is 0."""
        return [c for c in self.callbacks if isinstance(c, Penalty) and largest(getattr(c, "zeta", 1)) != 0]

    @property
    def current_round(self) -> int:
        """Rounds that are complete; inside a round, its 0-based number."""
        return self._session.federation.state.round if hasattr(vars(self).get("_session"), "federation") else 0

    @property
    def global_step(self) -> int:
        """Local steps of all clients before this round, and those that the present client has taken."""
        done = 0 if self.now[1] is None else int(self.now[1].done)
        return done + (self._session.federation.state.global_step if self.current_round or done else 0)

    @property
    def callback_metrics(self) -> dict[str, torch.Tensor]:
        """The latest value of every metric; inside a client's round, of what the client has logged so far."""
        if self.now[1] is not None:
            self._metrics |= self.now[1].log.compute(keep=True)
        return self._metrics

    @property
    def client_reports(self) -> Sequence[Report]:
        """What each client of the round has reported, in the order of the clients, also those that were left out.

        Complete, and the same in every process, from ``on_round_metrics`` on until the next round begins.
        """
        return self._session.federation.reports if self.current_round else ()

    @property
    def client_val_metrics(self) -> dict[int, dict[str, float]]:
        """What validation logged on each client's own data, by client; empty in a round without such an evaluation."""
        found: dict[int, dict[str, float]] = self.views.clients if self.current_round else {}
        return found

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint would hold now. It copies next to nothing: tensors of a round are never overwritten."""
        return self._session.snapshot()

    @property
    def checkpoint_writer(self) -> CheckpointWriter:
        """What writes checkpoints; in the first process."""
        return self._session.writer

    def save_checkpoint(self, filepath: str | Path, content: dict[str, Any] | None = None, wait: bool = True) -> None:
        """Write a checkpoint; a bare name (``last``) goes to the run's folder. Every process must call it.

        Args:
            filepath: the file, or a bare name.
            content: what an earlier :meth:`snapshot` gave; by default the present state.
            wait: return when it is written; otherwise it is written while training goes on, as far as that is safe.
        """
        path = Path(filepath)
        if self.run_dir is not None and path.name == str(filepath) and not path.suffix:
            path = self.run_dir / "checkpoints" / f"{filepath}.ckpt"
        self._session.save_checkpoint(path, self.snapshot() if content is None else content, wait)
