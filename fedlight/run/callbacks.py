"""The callbacks of a run: those of trainer and module, with ours in place of some of Lightning's."""

from collections.abc import Iterable

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_info

from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.callbacks.progress import RoundProgress
from fedlight.module.hooks import lightnings, overrides


def in_federated_terms(callbacks: Iterable[Callback]) -> list[Callback]:
    """The callbacks, with ours in place of those of Lightning that write checkpoints or draw progress; a line for each.

    There is one ``best.ckpt``: that of the first which monitors something.
    """
    out: list[Callback] = []
    for callback in callbacks:
        kind, ours = lightnings(callback, ("ModelCheckpoint", "ProgressBar")), callback
        if kind == "ModelCheckpoint":
            monitor = getattr(callback, "monitor", None)
            ours = Checkpoint(monitor, None if monitor is None else getattr(callback, "mode", None))
        elif kind is not None:
            ours = RoundProgress()
        there = next((i for i, c in enumerate(out) if kind is not None and type(c) is type(ours)), None)
        if there is None:
            out.append(ours)
        elif getattr(out[there], "monitor", True) is None:
            out[there] = ours
        if kind is not None:
            what = f"Checkpoint(monitor={ours.monitor!r})" if isinstance(ours, Checkpoint) else "RoundProgress"
            does = "in place of" if ours in out else "there is one already, so nothing comes for"
            name = type(callback).__name__
            rank_zero_info(f"trainer.callbacks: fedlight's {what}, which counts rounds: {does} {name}.")
    return out


def with_module_callbacks(callbacks: Iterable[Callback], module: LightningModule) -> list[Callback]:
    """The trainer's callbacks and those of the module's ``configure_callbacks``, which replace others of their type.

    Those that write checkpoints come late, as in Lightning, so that they save what the others did in the round. Only
    those that draw or print come after them: no round is lost in a run that is killed meanwhile.
    """
    own: list[Callback] = []
    if overrides(module, "configure_callbacks"):
        found = module.configure_callbacks()
        own = in_federated_terms([found] if isinstance(found, Callback) else found)
    together = [c for c in callbacks if type(c) not in {type(o) for o in own}] + own
    return sorted(together, key=lambda c: (bool(getattr(c, "optional_hooks", ())), isinstance(c, Checkpoint)))
