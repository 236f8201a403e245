"""What a checkpoint holds of a run, and how it is written and read."""

from collections import deque
from collections.abc import Mapping, Set
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fedlight import __version__
from fedlight.data.federated import given_data
from fedlight.module.hooks import overrides
from fedlight.personal.parts import tensor_names
from fedlight.run.checkpoint import FORMAT, save_checkpoint
from fedlight.run.context import RunContext
from fedlight.run.loggers import logger_ids, tell_wandb
from fedlight.run.wandb import note_checkpoint
from fedlight.server.clients import DiskClientStore
from fedlight.written import Lost, written


def make_checkpoint(run: RunContext) -> dict[str, Any]:
    """All that is needed to continue, in plain tensors and Python values.

    ``state_dict`` and ``hyper_parameters`` are where Lightning puts them, so ``Module.load_from_checkpoint`` reads the
    server's model. The rest is under ``fedlight``. Randomness needs no state: every generator is seeded by its round.
    Tensors that training leaves as they are stay where they are, and are not copied.
    """
    trainer, module, state, data = run.trainer, run.module, run.federation.state, given_data(run.datamodule)
    refuse_registered(run, own := module.state_dict())
    callbacks = {c.state_key: _copied(c.state_dict()) for c in trainer.callbacks}
    checkpoint = {
        "state_dict": server_state_dict(run, own),
        "hyper_parameters": _copied(_hyper_parameters(module)),
        "pytorch-lightning_version": lightning.__version__,
        "epoch": state.round,
        "global_step": state.global_step,
        "callbacks": {k: v for k, v in callbacks.items() if v},
        **({type(data).__qualname__: plain(held)} if (held := data.state_dict()) else {}),
        "fedlight": {
            "format": FORMAT,
            "version": __version__,
            "experiment": run.experiment,
            "schedule": run.schedule.state_dict(),
            "loggers": logger_ids(run.loggers),
            "metrics": run.metrics_csv.text if run.metrics_csv else "",
            **run.federation.state_dict(),
        },
    }
    known = set(checkpoint)
    run.hooks("on_save_checkpoint", checkpoint)
    _say_changed(run, own.keys(), checkpoint.get("state_dict", {}).keys())
    added = {k: _copied(v) for k, v in checkpoint.items() if k not in known and _is_plain(v)}
    fedlight = checkpoint.pop("fedlight")
    kept = {key: fedlight.pop(key) for key in ("clients", "experiment")}  # these are plain, and large
    return {**plain(checkpoint), **added, "fedlight": {**plain(fedlight), **kept}}


def _say_changed(run: RunContext, own: Set[str], saved: Set[str]) -> None:
    """Say what a hook has taken out of the state, or put into it, and no hook makes undone."""
    needed = own if run.module.strict_loading else {info.name for info in run.layout.parameters}
    changed = sorted((needed - saved) | (saved - own))
    if changed and not overrides(run.module, "on_load_checkpoint"):
        _told.info(
            f"model: on_save_checkpoint leaves out, renames or adds {changed[0]!r}{' ...' * (len(changed) > 1)} of"
            " checkpoint['state_dict']: neither fit nor test can go on from it until on_load_checkpoint undoes that."
        )


def refuse_registered(run: RunContext, state: Mapping[str, Any]) -> None:
    """Refuse a module of whose state, its ``state_dict()``, a later one, made anew, could not be given all."""
    if odd := next((name for name, value in state.items() if not _is_plain(value)), None):
        raise MisconfigurationException(
            f"model: {odd!r} of its state is a {type(state[odd]).__name__}, which a checkpoint could not be read with."
            " Let get_extra_state return tensors, numbers, texts, or lists and dicts of these."
        )
    if added := sorted(state.keys() - run.begun):
        raise MisconfigurationException(
            f"model: a hook or step registers {added[0]!r}{' ...' * (len(added) > 1)}, which a checkpoint could not be"
            " read into. Do so in __init__, setup or configure_model; set its value there."
        )


def _hyper_parameters(module: Any) -> dict[str, Any]:
    """Those that it saved; where it was made with more, all of it as a CLI would have it, if that can be written."""
    saved: dict[str, Any] = plain(dict(module.hparams))
    made = {} if "_instantiator" in saved else written(module, "", lost := Lost()).get("init_args", {})
    taken = signature(type(module).__init__).parameters.items()
    untyped = {name for name, parameter in taken if parameter.annotation is Parameter.empty}
    # What has no type is made of no `class_path`.
    if made.keys() <= saved.keys() or lost or any("class_path" in str(made[k]) for k in untyped & made.keys()):
        return saved
    return {**made, "_instantiator": "lightning.pytorch.cli.instantiate_module"}


def write_checkpoint(run: RunContext, path: Path, content: dict[str, Any], wait: bool = True) -> None:
    """Write a snapshot; the first process writes, every process calls.

    Without ``wait`` it is written while training goes on, and what goes wrong is found in ``run.writer``; the other
    processes hand over their clients' rows in threads like its own. Rows on disk are part of a checkpoint and must not
    change until it is written, so it is always waited for then.

    Raises:
        MisconfigurationException: in every process, if it, or one before it, cannot be written.
    """
    rows, store, zero = run.federation.rows, run.federation.store, run.fabric.global_rank == 0
    own = content["fedlight"]["clients"]
    whole = {**content, "fedlight": {**content["fedlight"], "clients": rows.gathered(own)}}
    if zero:
        run.writer.submit(path, lambda: _write(run, path, whole))
    else:
        run.writer.submit(path, lambda: rows.hand_over(own))
    if not wait and not isinstance(store, DiskClientStore):
        return
    # The others wait, too: no one leaves before it is on disk.
    failure = run.fabric.broadcast(run.writer.failure(wait=True) if zero else None)
    if failure is not None:
        raise MisconfigurationException(failure)
    if path.stem == "last":
        store.committed()


def _write(run: RunContext, path: Path, content: dict[str, Any]) -> None:
    try:
        if run.metrics_csv:
            run.metrics_csv.sync()
        save_checkpoint(path, content)
        callback = getattr(run.trainer, "checkpoint_callback", None)
        tell_wandb(run.loggers, lambda logger: note_checkpoint(logger, path, content, callback))
    finally:  # what could not be written is received nevertheless: the others wait until they are rid of it
        deque(content["fedlight"]["clients"].get("rows", ()), maxlen=0)


def server_state_dict(run: RunContext, own: Mapping[str, Any]) -> dict[str, Any]:
    """The module's ``state_dict``, its ``own``, with the server's parameters and buffers where it may hold others."""
    known = run.layout.views(run.federation.params) | run.federation.state.buffers
    by_tensor: dict[int, str] = {}
    for name, tensor in tensor_names(run.module).items():  # tied ones have several names, and one value
        first = by_tensor.setdefault(tensor, name)
        if first in known:
            known[name] = known[first]
    return {k: known[k] if k in known else v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}


def restore_callbacks(run: RunContext, checkpoint: dict[str, Any]) -> None:
    """Give every callback its state back, and let it read what it added."""
    for callback, trainer in run.hooks.audience:
        callback.on_load_checkpoint(trainer, run.module, checkpoint)
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(dict(checkpoint["callbacks"][callback.state_key]))


def plain(value: Any) -> Any:
    """The part of a value that ``torch.load(weights_only=True)`` reads: tensors, numbers, strings and containers."""
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items() if _is_plain(v)}
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value if _is_plain(v)) if type(value) in (list, tuple) else None
    if isinstance(value, Tensor):
        return value.detach()
    return value.item() if isinstance(value, np.generic) else value


def _copied(value: Any) -> Any:
    """The plain part of a value with tensors of its own, which those who gave it may go on changing."""
    return tree_map_only(Tensor, Tensor.clone, plain(value))


def _is_plain(value: Any) -> bool:
    read = type(value) in (bool, int, float, str, list, tuple)
    return value is None or read or isinstance(value, Tensor | Mapping | np.number | np.bool_ | np.str_)


_told = WarningCache()
