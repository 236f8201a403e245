"""What a session leaves on disk: the checkpoint's content, and the summary of a run."""

import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight.run.checkpoint import FORMAT
from fedlight.run.loggers import logger_ids, read_metrics
from fedlight.run.names import smaller_is_better
from fedlight.server.clients import DiskClientStore

if TYPE_CHECKING:
    from fedlight.run.session import Session


@lru_cache
def package_version() -> str:
    """The version of fedlight that is installed."""
    try:
        return version("fedlight")
    except PackageNotFoundError:
        return "0+unknown"


def make_checkpoint(session: "Session") -> dict[str, Any]:
    """All that is needed to continue, in plain tensors and Python values.

    ``state_dict`` and ``hyper_parameters`` are where Lightning puts them, so ``Module.load_from_checkpoint`` reads the
    server's model. The rest is under ``fedlight``. Randomness needs no state: every generator is seeded by its round.
    Tensors that training leaves as they are stay where they are, and are not copied.
    """
    trainer, module, state = session.trainer, session.module, session.federation.state
    callbacks = {c.state_key: _copied(plain(c.state_dict())) for c in trainer.callbacks}
    checkpoint = {
        "state_dict": server_state_dict(session),
        "hyper_parameters": _copied(plain(dict(module.hparams))),
        "pytorch-lightning_version": lightning.__version__,
        "epoch": state.round,
        "global_step": state.global_step,
        "callbacks": {k: v for k, v in callbacks.items() if v},
        "fedlight": {
            "format": FORMAT,
            "version": package_version(),
            "experiment": session.experiment,
            "schedule": session.schedule.state_dict(),
            "loggers": logger_ids(session.loggers),
            "metrics": session.metrics_csv.text if session.metrics_csv else "",
            **session.federation.state_dict(),
        },
    }
    known = set(checkpoint)
    session.hooks("on_save_checkpoint", checkpoint)
    added = {k: _copied(plain(v)) for k, v in checkpoint.items() if k not in known and _is_plain(v)}
    return {**plain(checkpoint), **added, "fedlight": checkpoint["fedlight"]}


def write_checkpoint(session: "Session", path: Path, content: dict[str, Any], wait: bool) -> None:
    """Write a snapshot; the first process writes, every process calls.

    Without ``wait`` it is written while training goes on, and what goes wrong is found in ``session.writer``. Rows on
    disk are part of a checkpoint and must not change until it is written, so it is always waited for then.

    Raises:
        MisconfigurationException: in every process, if it, or one before it, cannot be written.
    """
    store, zero = session.federation.store, session.fabric.global_rank == 0
    if zero:
        session.writer.submit(path, content, session.metrics_csv.sync if session.metrics_csv else bool)
    if not wait and not isinstance(store, DiskClientStore):
        return
    # The others wait, too: no one leaves before it is on disk.
    failure = session.fabric.broadcast(session.writer.failure(wait=True) if zero else None)
    if failure is not None:
        raise MisconfigurationException(failure)
    if path.stem == "last":
        store.committed()


def server_state_dict(session: "Session") -> dict[str, Tensor]:
    """The module's ``state_dict`` with the server's parameters and buffers; the module itself may hold others."""
    module, known = session.module, session.layout.views(session.federation.params) | session.federation.state.buffers
    by_tensor: dict[int, str] = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):  # tied ones have several names, and one value
            first = by_tensor.setdefault(id(tensor), name)
            if first in known:
                known[name] = known[first]
    own = module.state_dict()
    return {k: known[k] if k in known else v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}


def restore_callbacks(session: "Session", checkpoint: Mapping[str, Any]) -> None:
    """Give every callback its state back, and let callbacks and module read what they added."""
    session.hooks("on_load_checkpoint", checkpoint)
    for callback in session.trainer.callbacks:
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(dict(checkpoint["callbacks"][callback.state_key]))


def plain(value: Any) -> Any:
    """The part of a value that ``torch.load(weights_only=True)`` reads: tensors, numbers, strings and containers."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items() if _is_plain(v)}
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value if _is_plain(v)) if type(value) in (list, tuple) else None
    if isinstance(value, Tensor):
        return value.detach()
    return value


def _copied(value: Any) -> Any:
    """A plain value with tensors of its own, which those who gave it may go on changing."""
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(v) for v in value)
    return value.clone() if isinstance(value, Tensor) else value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, Tensor | Mapping) or type(value) in (bool, int, float, str, list, tuple)


def as_floats(row: Mapping[str, Tensor | float]) -> dict[str, float]:
    """A row as Python numbers; tensors are brought from the device together."""
    tensors = {k: v for k, v in row.items() if isinstance(v, Tensor)}
    values: list[float] = []
    if tensors:
        devices = {v.device for v in tensors.values()}
        same = {k: (v if len(devices) == 1 else v.cpu()).detach().double().reshape(()) for k, v in tensors.items()}
        values = torch.stack(list(same.values())).tolist()
    numbers = dict(zip(tensors, values, strict=True))
    return {k: numbers[k] if k in numbers else float(v) for k, v in row.items()}


def write_summary(session: "Session", seconds: float) -> None:
    """Write ``summary.json``: final and best metrics, rounds, seconds, seed, versions."""
    assert session.folder is not None
    if session.trainer.current_round == session.first_round and (session.folder.path / "summary.json").exists():
        return  # it was finished before
    rows = read_metrics(session.folder.path / "metrics.csv")
    trainer, final = session.trainer, {}
    for row in rows:
        final.update(row)
    judged = session.views.logged or [n for n in final if n.startswith("val") and not n.endswith(("_selected", "_all"))]
    best = {
        name: {"value": row[name], "round": int(row["round"])}
        for name in (of for name in judged for of in (name, f"{name}_all"))
        if (having := [r for r in rows if r.get(name) == r.get(name, float("nan"))])
        for row in [(min if smaller_is_better(name) else max)(having, key=lambda r, n=name: r[n])]  # type: ignore[misc]
    }
    federation = session.federation
    perturbation = trainer.perturbation
    session.folder.write_json(
        "summary.json",
        {
            "final": final,
            "best": best,
            "rounds": trainer.current_round,
            "seconds": round(seconds, 3),
            "seed": trainer.seed,
            "algorithm": type(trainer.algorithm).__name__,
            "perturbation": None if perturbation is None else type(perturbation).__name__,
            "num_clients": federation.num_clients,
            "buffers": federation.buffer_policy,
            "parameters": session.layout.numel,
            "device": str(session.fabric.device),
            "precision": trainer.settings["precision"],
            "engine": type(session.engine).__name__,
            "versions": {
                "fedlight": package_version(),
                "torch": torch.__version__,
                "lightning": lightning.__version__,
                "python": platform.python_version(),
            },
        },
    )
