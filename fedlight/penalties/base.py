"""Penalties: what is added to the task loss, in any trainer, with no change to the module."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from fedlight.penalties.numbers import follow, scheduled
from fedlight.penalties.step import USED_UP, PenalizedStep, penalized_step, unwrapped
from fedlight.penalties.term import Term

if TYPE_CHECKING or "pytorch_lightning" not in sys.modules:
    CallbackBase = Callback
else:
    # Lightning's twin package has a `Callback` of its own. Its Trainer takes any, its CLI asks for a subclass. The twin
    # is not imported for that: doing so redirects Lightning's messages to the twin's logger.
    class CallbackBase(Callback, sys.modules["pytorch_lightning"].Callback):
        """A callback of both packages."""


__all__ = ["PenalizedStep", "Penalty", "penalized_step"]


class Penalty(CallbackBase, Term):
    """A term that is added to the loss which ``training_step`` returns. Base class; MAN is one.

    A new penalty is a subclass with a :meth:`penalty`. Where it is a function of what layers put out, :meth:`observe`
    names these layers and :meth:`measure` says what to keep of an output::

        class LogitNorm(Penalty):
            def __init__(self, weight: float = 0.01) -> None:
                self.weight = weight

            def observe(self, module):
                return {"head": module.head}

            def measure(self, output):
                return output.square().mean()

            def penalty(self, module, measured):
                return self.weight * sum(measured.values())

    As a callback it acts during ``fit`` and leaves nothing behind. Without a trainer, :meth:`attach` it to a module
    whose ``training_step`` returns the loss, or use ``with penalty.attached(module):``. The penalty itself holds no
    state of a module: one object can serve several, and copies of a module share it.
    """

    def attach(self, module: nn.Module) -> PenalizedStep:
        """Add the penalty to what ``module.training_step`` returns, until :meth:`detach`.

        Attaching twice is attaching once. A module that ``torch.compile`` or ``Fabric.setup`` returned may be given.
        Compiled code is forgotten, in the whole process, as it does not look whether hooks have come.

        Raises:
            MisconfigurationException: if the module optimises manually, so that its loss cannot be reached.
            TypeError: if it has no ``training_step``.
        """
        module = unwrapped(module)
        step = penalized_step(module)
        if step is not None and self in step.penalties:
            return step
        self._check(module)
        if any(tensor.round is None for tensor in scheduled(vars(self))):
            call = f"{type(self).__name__}.follow(epoch)"
            raise MisconfigurationException(f"A schedule is to be followed: {call} before attach, and in every epoch.")
        observed: Any = self.observe(module)
        if not hasattr(observed, "items") or not all(isinstance(found, nn.Module) for found in observed.values()):
            what = f"{observed!r:.80}; it must give a dictionary of submodules by their names"
            raise TypeError(f"{type(self).__name__}.observe() gives {what}.")
        if step is None:
            step = PenalizedStep(module)
        step.add(self, observed)
        return step

    def detach(self, module: nn.Module | None) -> None:
        """Undo :meth:`attach`; nothing happens where the penalty is not attached."""
        step = None if module is None else penalized_step(module)
        if step is not None:
            step.remove(self)

    @contextmanager
    def attached(self, module: nn.Module) -> Iterator[PenalizedStep]:
        """Attach for the length of a ``with`` block."""
        step = self.attach(module)
        try:
            yield step
        finally:
            self.detach(module)

    def follow(self, round: int, device: torch.device | None = None) -> None:
        """Set what follows a schedule to its value in a round or epoch, from 0, in a loop of your own."""
        follow(scheduled(vars(self)), round, device)

    # Layers may come into being in configure_model, and DDP redirects to whatever `training_step` the module has when
    # it is called: the start of fit is late enough for the one and early enough for the other.
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach."""
        self.follow(trainer.current_epoch, pl_module.device)
        step = self.attach(pl_module)
        step.end_with_fit(self)
        several = trainer.world_size > 1 and torch.distributed.is_initialized()
        step.totals = {} if several and not hasattr(trainer, "current_round") else None  # which shares logs by itself

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow schedules; ``FederatedTrainer``, which has rounds, does so itself."""
        self.follow(trainer.current_epoch, pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Attach anew where the module has other submodules than before: it may replace some in its own hooks."""
        self._check(pl_module)  # whose hooks may change how it optimises, too
        step = penalized_step(pl_module) if batch_idx == 0 else None
        if step is not None and self in step.penalties and not step.has_all(self):
            step.remove(self, over=True)
            self.on_fit_start(trainer, pl_module)

    def on_round_trained(self, trainer: Any, pl_module: LightningModule) -> None:
        """Refuse in ``FederatedTrainer``, whose engines keep a step, that what is measured is not there any more."""
        step = penalized_step(pl_module)
        if step is not None and (gone := step.gone(self)):
            raise MisconfigurationException(
                f"{type(self).__name__}: a hook has put another module in the place of {gone[0]}, which it measures. Do"
                " so in __init__, setup or configure_model, and train in stages with one fit for each."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what several processes of Lightning's ``Trainer`` have measured."""
        if (step := penalized_step(pl_module)) is not None:
            step.log_totals()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Detach."""
        if (step := penalized_step(pl_module)) is not None:
            step.remove(self, over=True)

    teardown = on_fit_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach, and say what an error of autograd's means here."""
        if "a second time" in str(exception):
            exception.add_note(USED_UP.format(type(self).__name__))
        self.on_fit_end(trainer, pl_module)

    def _check(self, module: nn.Module) -> None:
        name, owner = type(self).__name__, type(module).__name__
        if not callable(getattr(module, "training_step", None)):
            raise TypeError(
                f"{name} cannot be attached to {owner}, which has no training_step. Give it a `training_step(batch)` "
                "that returns the loss, and call that in the loop."
            )
        if not getattr(module, "automatic_optimization", True):
            raise MisconfigurationException(
                f"{name} cannot be added to the loss of {owner}, which sets `automatic_optimization = False`: what it "
                "gives to manual_backward is out of reach. Use automatic optimization."
            )
