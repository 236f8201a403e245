"""Checks of the trainer's settings that need nothing else."""

from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.algorithms.fedavg import FedAvg
from fedlight.personal.base import Personalization
from fedlight.personal.local_only import LocalOnly
from fedlight.personal.parts import PersonalParts
from fedlight.perturbations.base import Perturbation
from fedlight.server.aggregators import check_aggregator
from fedlight.server.clients import Where
from fedlight.server.federation import BufferPolicy, View
from fedlight.transforms.base import check_chain

_CHOICES = {
    "buffers": get_args(BufferPolicy),
    "client_state": get_args(Where),
    "gradient_clip_algorithm": ("norm", "value"),
}
_AT_LEAST = {
    **{"max_rounds": 0, "local_epochs": 1, "local_steps": 1, "accumulate_grad_batches": 1, "num_nodes": 1},
    **{"check_val_every_n_rounds": 1, "client_val_every_n_rounds": 0, "seed": 0, "swa_every_n_rounds": 1},
}


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
        raise MisconfigurationException(
            f"perturbation: {type(owners[0]).__name__} brings its own {type(found[0]).__name__}, so"
            f" {type(found[1]).__name__} cannot be added. Remove `{'perturbation' if given else 'trainer.personal'}`,"
            " or take the algorithm without one (FedAvg for FedSAM, and so on)."
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
        raise MisconfigurationException(
            f"trainer.personal: {type(algorithm).__name__} brings its own. Remove it, or take FedAvg."
        )
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
    if settings["local_epochs"] is not None and settings["local_steps"] is not None:
        raise MisconfigurationException("trainer.local_epochs and trainer.local_steps exclude each other; set one.")
    for key, least in _AT_LEAST.items():
        value = settings[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise MisconfigurationException(f"trainer.{key}={value!r} must be a whole number of at least {least}.")
    for key, possible in _CHOICES.items():
        if settings[key] not in possible:
            raise MisconfigurationException(f"trainer.{key}={settings[key]!r} must be one of {list(possible)}.")
    given = settings["transforms"]
    settings["transforms"] = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    check_chain(settings["transforms"])
    parts = settings["algorithm"], one_perturbation(settings), settings["transforms"]
    check_aggregator(settings["aggregator"], *parts)
    for stage in ("train", "val", "test"):
        _check_limit(f"limit_{stage}_batches", settings[f"limit_{stage}_batches"], zero=stage == "val")
    clip = settings["gradient_clip_val"]
    if clip is not None and not 0 < clip < float("inf"):
        raise MisconfigurationException(f"trainer.gradient_clip_val={clip!r} must be positive; null does not clip.")
    views, known = list(settings["views"]), get_args(View)
    if "server" not in views or any(v not in known for v in views):
        raise MisconfigurationException(f"trainer.views={views} must hold 'server' and may hold {list(known[1:])}.")
    if not 0 <= settings["swa_start"] < 1:
        raise MisconfigurationException(f"trainer.swa_start={settings['swa_start']!r} must be at least 0 and below 1.")
    for key in ("name", "default_root_dir"):
        text = str(settings[key])
        single = key != "name" or (settings[key] and "/" not in text and not text.startswith("."))
        if not single or "\0" in text or any(len(part.encode(errors="replace")) > 255 for part in text.split("/")):
            shown = repr(text if len(text) < 80 else text[:40] + "...")
            raise MisconfigurationException(f"trainer.{key}={shown} must name a folder, in 255 bytes at most.")


def _check_limit(key: str, value: Any, zero: bool) -> None:
    if value is None or (zero and value == 0):
        return
    if isinstance(value, bool) or not value > 0 or (isinstance(value, float) and value > 1):
        raise MisconfigurationException(
            f"trainer.{key}={value!r} must be a whole number of batches, or a fraction of them in (0, 1]."
        )
