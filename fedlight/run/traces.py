"""What an evaluation leaves in a module: no other mode, no other random numbers; what else is said."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torchmetrics import Metric, MetricCollection

from fedlight.module.hooks import overrides
from fedlight.module.logs import with_attributes
from fedlight.module.state import ModuleState
from fedlight.seeding import preserved_global_rng


@contextmanager
def evaluating(module: LightningModule) -> Iterator[None]:
    """Evaluation mode inside; each submodule's own mode, and the global random generators as before, outside.

    Layers whose ``train`` does more (LoRA that merges itself for an evaluation) undo that, and have the same weights.
    """
    modes, trainer = {m: m.training for m in module.modules()}, getattr(module, "_trainer", None)
    switching = [m for m in modes if type(m).train is not nn.Module.train]
    kept = [(p, p.detach().clone()) for m in switching for p in m.parameters(recurse=False)]
    module.eval()
    try:
        # Processes share the batches: none of them could wait for what the others do in a step.
        with preserved_global_rng(), with_attributes([] if trainer is None else [trainer], {"alone": True}):
            yield
    finally:
        for m in switching:
            m.train(modes[m])
        for parameter, value in kept:
            parameter.data.copy_(value)
        for m, mode in modes.items():
            m.training = mode


def watch(module: nn.Module) -> ModuleState:
    """A module as it is now, but for parameters and torchmetrics: to see what a batch or an evaluation changes."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    return ModuleState({"self": module}, lambda: [*module.parameters(), *metrics])  # type: ignore[list-item]


def say_traces(module: LightningModule, stage: str, kept: ModuleState, anew: Sequence[str]) -> None:
    """Say what an evaluation in a fit has changed of the module that was ``kept``, and no checkpoint has.

    What the first hooks of every evaluation change is found ``anew``.
    """
    names = {f"self.{name}" for name, m in module.named_modules() if isinstance(m, Metric) and m.update_called}
    groups = tuple(f"self.{name}._" for name, m in module.named_modules() if isinstance(m, MetricCollection))
    changed = {name for name in kept.changes() if not name.startswith(groups)}  # found anew where they begin anew
    names |= changed - {*anew, *(f"self.{name}" for name, _ in module.named_buffers())}
    if names and module.trainer.state.fn == "fit" and not overrides(module, "on_save_checkpoint"):
        rank_zero_info(
            f"model: {stage} changes {', '.join(sorted(names))}, and no checkpoint has it: what is logged of it is"
            f" another after a resume. Begin anew in on_{stage}_start, or keep it in on_save_checkpoint."
        )
