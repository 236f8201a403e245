"""Engines: how the local trainings of a round are executed."""

import importlib

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.engines.base import ClientTask, Engine, LocalTraining
from fedlight.engines.eager import Eager
from fedlight.engines.recordable import Unrecordable
from fedlight.engines.side_by_side import why_not_faster, why_not_same

__all__ = ["ClientTask", "Eager", "Engine", "LocalTraining", "engine_names", "make_engine", "start_engine"]

_ENGINES = {"cuda_graph": "CudaGraph", "eager": "Eager", "vmap": "Vmap"}


def engine_names() -> list[str]:
    """The names that ``trainer.engine`` takes, besides ``auto``."""
    return sorted(_ENGINES)


def make_engine(wanted: str | Engine) -> Engine:
    """The engine of that name; an engine is returned as it is.

    Raises:
        MisconfigurationException: if there is none of that name.
    """
    if isinstance(wanted, Engine):
        return wanted
    if wanted not in _ENGINES:
        raise MisconfigurationException(f"trainer.engine={wanted!r} must be one of {['auto', *engine_names()]}.")
    engine: Engine = getattr(importlib.import_module(f"{__name__}.{wanted}"), _ENGINES[wanted])()
    return engine


def start_engine(wanted: str | Engine, training: LocalTraining) -> Engine:
    """The engine of ``trainer.engine``, set up.

    ``auto`` is ``cuda_graph`` on a GPU and ``vmap`` on a CPU, where that works and is faster, else ``eager``.

    Raises:
        MisconfigurationException: if the wanted engine cannot do the work, saying why.
    """
    if wanted == "auto":
        return _fastest(training)
    engine = make_engine(wanted)
    try:
        engine.setup(training)
    except BaseException:
        engine.teardown()
        raise
    return engine


def runs_python(wanted: str | Engine, training: LocalTraining) -> bool:
    """Whether every local step will be run as it is written, and not be recorded once."""
    auto = wanted == "auto" and not _accelerated(training.fabric.device) and why_not_faster(training) is not None
    return (auto or wanted == "eager" or isinstance(wanted, Eager)) and not training.compile


def runs_functions(wanted: str | Engine, training: LocalTraining) -> bool:
    """Whether what is recorded of a local step will be a function of tensors."""
    auto = wanted == "auto" and not _accelerated(training.fabric.device)
    return auto or wanted == "vmap" or getattr(wanted, "together", False) or training.compile


def _fastest(training: LocalTraining) -> Engine:
    if _accelerated(training.fabric.device):
        try:
            engine = start_engine("cuda_graph", training)
            engine.reason = "auto; the fastest on a GPU"
            return engine
        except MisconfigurationException as error:
            reason = "cuda_graph cannot train this, as the warning says"
            rank_zero_warn(f"trainer.engine=auto is eager, which is slower, because of {error}")
    else:
        reason = why_not_faster(training) or ""
        if not reason:
            try:
                return _side_by_side(training)
            except MisconfigurationException as error:
                reason = getattr(error, "reason", str(error))
    engine = start_engine("eager", training)
    engine.reason = f"auto; {reason}"
    return engine


def _side_by_side(training: LocalTraining) -> Engine:
    from fedlight.engines.vmap import Vmap  # loads slowly

    engine = Vmap()
    engine.setup(training)
    if reason := why_not_same(engine.try_step, training):
        raise Unrecordable("vmap", reason)
    engine.reason = "auto; small steps of many clients are faster as one program"
    return engine


def _accelerated(device: torch.device) -> bool:
    return device.type == "cuda"
