"""What callbacks and modules find on ``trainer``: the names of Lightning's Trainer, and the checked settings."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerState

from fedlight.algorithms.base import Algorithm
from fedlight.algorithms.fedavg import FedAvg
from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.callbacks.config_file import ConfigFile
from fedlight.callbacks.pictures import Curves, PartitionPicture
from fedlight.callbacks.progress import RoundProgress
from fedlight.checks import VARIABLE, check_objects
from fedlight.penalties.base import Penalty
from fedlight.penalties.numbers import largest, scheduled
from fedlight.personal.base import Personalization
from fedlight.personal.local_only import LocalOnly
from fedlight.personal.parts import PersonalParts
from fedlight.perturbations.base import Perturbation
from fedlight.run.callbacks import in_federated_terms
from fedlight.run.checkpoint import CheckpointWriter
from fedlight.run.lightning_names import LightningNames
from fedlight.run.names import method_name
from fedlight.server.aggregators import check_aggregator
from fedlight.server.clients import Where
from fedlight.server.federation import BufferPolicy, Federation, View
from fedlight.server.incoming import Report
from fedlight.server.sampling import Sampler, Uniform
from fedlight.transforms.base import check_chain

_CHOICES = {
    "buffers": get_args(BufferPolicy),
    "client_state": get_args(Where),
    "gradient_clip_algorithm": ("norm", "value"),
}
_ONE = "local_epochs local_steps accumulate_grad_batches num_nodes check_val_every_n_rounds swa_every_n_rounds"
_AT_LEAST = dict.fromkeys(("max_rounds", "client_val_every_n_rounds", "seed", "fast_dev_run"), 0)
_AT_LEAST |= dict.fromkeys(_ONE.split(), 1)
_MAY_BE_NONE = ("local_epochs", "local_steps", "client_val_every_n_rounds")
_LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches")
_ADDED = ("perturbation", "personal", "aggregator")
_OBJECTS = ("algorithm", "perturbation", "personal", "sampler", "callbacks")
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
        should_stop: set it to stop after the current round.
        idle: settings that were given and play no part, as training is centralized.
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
    fast_dev_run: bool | int

    idle: Sequence[str] = ()
    barebones = False  # what Lightning's own callbacks and LightningModule.log read

    def __init__(self, settings: dict[str, Any]) -> None:
        check_settings(settings)
        settings["local_epochs"] = settings["local_epochs"] or (None if settings["local_steps"] else 1)
        if settings["fast_dev_run"]:
            settings |= dict.fromkeys(_LIMITS, int(settings["fast_dev_run"]))
            settings |= {"max_rounds": 1, "local_epochs": 1, "local_steps": None, "enable_checkpointing": False}
        if settings["centralized"]:
            usual = {"algorithm": FedAvg, "aggregator": None, "sampler": Uniform, "clients_per_round": 0.1}
            self.idle = [key for key, value in usual.items() if value not in (settings[key], type(settings[key]))]
            settings |= {"algorithm": FedAvg(), "aggregator": None, "sampler": Uniform(), "clients_per_round": 1}
        callbacks = settings.pop("callbacks")
        given = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
        self.callbacks: list[Callback] = in_federated_terms(c for c in given if c is not None)
        kinds = Checkpoint, RoundProgress, PartitionPicture, Curves, ConfigFile
        enabled = [settings[f"enable_{what}"] for what in ("checkpointing", "progress_bar", "plots", "plots")]
        for default, is_wanted in zip(kinds, [*enabled, True], strict=True):
            if is_wanted and not any(isinstance(c, default) for c in self.callbacks):
                self.callbacks.append(default())
        settings["default_root_dir"] = Path(settings["default_root_dir"]).expanduser()
        settings["precision"] = _PRECISIONS.get(str(settings["precision"]), settings["precision"])
        self.perturbation: Perturbation | None = one_perturbation(settings)
        self._personal = one_personalization(settings)  # what was given stays in `settings`
        self.settings = settings
        names = "algorithm", "sampler", "max_rounds", "local_epochs", "local_steps", "accumulate_grad_batches"
        for key in (*names, "default_root_dir", "name", "seed", "fast_dev_run", "precision", "num_nodes"):
            setattr(self, key, settings[key])
        self._session: Call
        self.state = TrainerState()
        self.should_stop = False
        self._metrics: dict[str, torch.Tensor] = {}
        self.run_dir: Path | None = None
        self.facts: dict[str, str] = {}

    @property
    def _results(self) -> Any:  # what LightningModule.log asks for
        raise MisconfigurationException(
            "self.log: this hook belongs to no client and no evaluation, so there is nothing to reduce over. Log in"
            " on_train_start, in a step, or in a hook of an epoch or batch; a callback may return figures of a round"
            " from on_round_metrics."
        )

    @property
    def method_name(self) -> str:
        """What trains, as loggers and reports call it: ``FedDyn+SAM+MAN``."""
        penalties = [type(penalty).__name__ for penalty in self.penalties]
        parts = [None if self.settings[k] is None else type(self.settings[k]).__name__ for k in _ADDED]
        return method_name(type(self.algorithm).__name__, parts, penalties, self.settings["centralized"])

    @property
    def personal(self) -> Personalization:
        """What clients have for themselves."""
        return self._personal

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
        return self._session.federation.incoming.reports if self.current_round else ()

    @property
    def client_val_metrics(self) -> dict[int, dict[str, float]]:
        """What validation logged on each client's own data, by client; empty in a round without such an evaluation."""
        found: dict[int, dict[str, float]] = self.views.clients if self.current_round else {}
        return found

    def snapshot(self) -> dict[str, Any]:
        """What a checkpoint would hold now. It copies next to nothing: tensors of a round are never overwritten."""
        return self._session.snapshot()

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


def one_perturbation(settings: dict[str, Any]) -> Perturbation | None:
    """The algorithm's own perturbation, that of the personal models, or the one that was given.

    Raises:
        MisconfigurationException: if there is more than one.
    """
    algorithm, given = settings["algorithm"], settings["perturbation"]
    methods = algorithm, settings["personal"] or algorithm.personal
    owners = [part for part in methods if getattr(part, "perturbation", None)]
    found: list[Perturbation] = [*(part.perturbation for part in owners), *([given] if given else [])]
    if len(found) > 1:
        own = owners[0] is algorithm
        other = "take the algorithm without one (FedAvg for FedSAM, and so on)" if own else "`trainer.personal`"
        raise MisconfigurationException(
            f"perturbation: {type(owners[0]).__name__} brings its own {type(found[0]).__name__}, so"
            f" {type(found[1]).__name__} cannot be added. Remove `{'perturbation' if given else 'trainer.personal'}`,"
            f" or {other}."
        )
    return found[0] if found else None


def one_personalization(settings: dict[str, Any]) -> Personalization:
    """The algorithm's own, or the one that was given, or none; names and types alone are personal parts.

    Raises:
        MisconfigurationException: if there are both, or there are no clients.
    """
    given, algorithm = settings["personal"], settings["algorithm"]
    if given is None:
        return algorithm.personal or Personalization()
    if settings["centralized"]:
        raise MisconfigurationException("trainer.personal: with trainer.centralized there are no clients. Set one.")
    if algorithm.personal is not None:
        name = type(algorithm).__name__
        raise MisconfigurationException(f"trainer.personal: {name} brings its own. Remove it, or take FedAvg.")
    settings["personal"] = found = given if isinstance(given, Personalization) else PersonalParts(given)
    if isinstance(found, LocalOnly) and (type(algorithm) is not FedAvg or settings["transforms"]):
        raise MisconfigurationException(
            "trainer.personal: LocalOnly sends nothing, so algorithm and transforms have nothing to do. Use it with"
            " algorithm: FedAvg, and without trainer.transforms."
        )
    return found


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings that make no sense.

    Raises:
        MisconfigurationException: naming the YAML key, what was found and what is possible.
    """
    settings |= {key: value.item() for key, value in settings.items() if isinstance(value, np.generic)}
    check_objects({k: settings[k] for k in _OBJECTS if k != "personal" or not isinstance(settings[k], str | list)})
    if settings["local_epochs"] is not None and settings["local_steps"] is not None:
        raise MisconfigurationException("trainer.local_epochs and trainer.local_steps exclude each other; set one.")
    for key, least in _AT_LEAST.items():
        value = settings[key]
        wrong = (isinstance(value, bool) and key != "fast_dev_run") or not isinstance(value, int) or value < least
        if wrong and not (value is None and key in _MAY_BE_NONE):
            raise MisconfigurationException(f"trainer.{key}={value!r} must be a whole number of at least {least}.")
    for key, possible in _CHOICES.items():
        if settings[key] not in possible:
            raise MisconfigurationException(f"trainer.{key}={settings[key]!r} must be one of {list(possible)}.")
    given = settings["transforms"]
    settings["transforms"] = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    check_chain(settings["transforms"])
    check_aggregator(settings, one_perturbation(settings))
    _check_numbers(settings)
    views, known = list(settings["views"]), get_args(View)
    if "server" not in views or any(v not in known for v in views):
        raise MisconfigurationException(f"trainer.views={views} must hold 'server' and may hold {list(known[1:])}.")
    for key in ("name", "default_root_dir"):
        text = str(settings[key])
        is_name = key == "name"
        single = settings[key] is not None and not (is_name and (not text or "/" in text or text.startswith(".")))
        long = any(len(part.encode(errors="replace")) > 255 for part in text.split("/"))
        if not single or long or re.search(rf"\0|{VARIABLE}", text):
            shown = repr(text if len(text) < 80 else text[:40] + "...")
            what = "must name a folder, in 255 bytes at most; $VARIABLES are replaced by shells, not in files"
            raise MisconfigurationException(f"trainer.{key}={shown} {what}.")


def _check_numbers(settings: dict[str, Any]) -> None:
    for key in ("clients_per_round", "gradient_clip_val", "swa_start", *_LIMITS):
        value, none = settings[key], (None, 0) if key == "limit_val_batches" else (None,)
        if isinstance(value, bool | str):
            raise MisconfigurationException(f"trainer.{key}={value!r} must be a number.")
        if key in _LIMITS and value not in none and (not value > 0 or (isinstance(value, float) and value > 1)):
            what = "must be a whole number of batches, or a fraction of them in (0, 1]"
            raise MisconfigurationException(f"trainer.{key}={value!r} {what}.")
    if (clip := settings["gradient_clip_val"]) is not None and not 0 < clip < float("inf"):
        raise MisconfigurationException(f"trainer.gradient_clip_val={clip!r} must be positive; null does not clip.")
    if not 0 <= settings["swa_start"] < 1:
        raise MisconfigurationException(f"trainer.swa_start={settings['swa_start']!r} must be at least 0 and below 1.")
