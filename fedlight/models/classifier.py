"""An image classifier as an ordinary LightningModule."""

from functools import partial
from typing import Any, Literal, Protocol

import torch
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from fedlight.checks import check_whole

Batch = tuple[Tensor, Tensor]
"""Inputs ``[B, ...]`` and labels ``[B]`` int64."""


class NetFactory(Protocol):
    """Builds a network for a number of classes. Every network class with the argument ``num_classes`` is one."""

    def __call__(self, num_classes: int) -> nn.Module:
        """A new network whose logits are ``[B, num_classes]``."""


class Classifier(LightningModule):
    """Trains a network with cross-entropy, in a FederatedTrainer or in a plain Lightning ``Trainer``.

    It logs ``train/loss``, and ``val/loss``, ``val/accuracy``, ``test/loss``, ``test/accuracy`` as means over samples.
    Nothing in :meth:`training_step` waits for the device.

    In a config, ``net`` is given by class, and ``num_classes`` is named once: a network class that needs it gets the
    classifier's. In Python, ``net`` may be a module or such a class::

        Classifier(CifarCNN(num_classes=100), num_classes=100)
        Classifier(CifarCNN, num_classes=100)

    Checkpoints hold the hyperparameters as plain values. Those of a FederatedTrainer or a Lightning CLI name
    ``net``, optimizer and scheduler too, unless these cannot be written; then pass them again:
    ``Classifier.load_from_checkpoint(path, net=CifarCNN)``.

    Args:
        net: the network, which maps inputs ``[B, ...]`` to logits ``[B, num_classes]``.
        num_classes: number of classes.
        optimizer: makes the optimizer of the parameters; plain SGD with a learning rate of 0.1 by default.
        lr_scheduler: makes a learning-rate scheduler of the optimizer.
        lr_interval: when the scheduler steps: after each communication ``round``, local ``epoch`` or local ``step``.
            A plain ``Trainer`` has no rounds: there, ``round`` means ``epoch``.
        label_smoothing: smoothing of the training loss, in [0, 1); the losses of evaluation are never smoothed.

    Raises:
        ValueError: for an argument outside its range.
    """

    def __init__(
        self,
        net: nn.Module | NetFactory,
        num_classes: int,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["round", "epoch", "step"] = "round",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_whole("`model.num_classes`", num_classes, 2)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`model.label_smoothing` must be in [0, 1), got {label_smoothing}.")
        if lr_interval not in ("round", "epoch", "step"):
            raise ValueError(f"`model.lr_interval` must be 'round', 'epoch' or 'step', got {lr_interval!r}.")
        for key, given in {"net": net, "optimizer": optimizer, "lr_scheduler": lr_scheduler}.items():
            if given is not None and not callable(given):
                raise TypeError(
                    f"`model.{key}` must be a function that makes one, as a partial of its class, got {given!r}"
                )
        if lr_interval != "round" and lr_scheduler is None:
            rank_zero_info(f"model.lr_interval={lr_interval} changes nothing, as model.lr_scheduler is null.")
        # Objects cannot be read back with weights_only=True; what a CLI hands over is their plain configuration.
        self.save_hyperparameters(ignore=["net", "optimizer", "lr_scheduler"])
        if "_instantiator" in self.hparams:
            self.save_hyperparameters()
        self.net = net if isinstance(net, nn.Module) else net(num_classes=num_classes)
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.optimizer, self.lr_scheduler, self.lr_interval = _picklable(optimizer), lr_scheduler, lr_interval

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]``."""
        logits: Any = self.net(x)
        if getattr(logits, "shape", ())[1:] != (self.num_classes,):
            found = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise MisconfigurationException(
                f"`model.net`: {type(self.net).__name__} returned {found}, but with"
                f" `model.num_classes: {self.num_classes}` the logits must be [batch, {self.num_classes}]. Correct"
                " `model.num_classes` or the network's own number of outputs."
            )
        return logits  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The cross-entropy of a batch, a scalar."""
        x, y = _pair(batch)
        loss = F.cross_entropy(self(x), y, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def loss_denominator(self, batch: Batch) -> Tensor:
        """How many samples the loss is the mean of: all but those of label -100, which it ignores."""
        return (batch[1] != -100).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/accuracy``."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The class of each sample, ``[B]``; the batch may come with labels or without."""
        x = batch[0] if isinstance(batch, list | tuple) else batch
        logits: Tensor = self(x)
        return logits.argmax(dim=1)

    def _evaluate(self, stage: Literal["val", "test"], batch: Batch) -> None:
        x, y = _pair(batch)
        logits = self(x)
        classes = y.argmax(1) if y.is_floating_point() and y.ndim > 1 else y  # the likeliest, where y are probabilities
        count = (classes != -100).sum()  # nobody waits for it, as a tensor
        values = {"loss": F.cross_entropy(logits, y), "accuracy": (logits.argmax(1) == classes).sum() / count}
        shown = {f"{stage}/{name}": torch.where(count > 0, value, 0.0) for name, value in values.items()}
        self.log_dict(shown, prog_bar=True, batch_size=count, sync_dist=True)  # type: ignore[arg-type]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer, and the scheduler in Lightning's dictionary form."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        plain = isinstance(getattr(self, "_trainer", None), Trainer)  # `self.trainer` raises where there is none
        interval = "epoch" if self.lr_interval == "round" and plain else self.lr_interval
        # Lightning's ReduceLROnPlateau says what it monitors; others ignore the key.
        monitor = getattr(scheduler, "monitor", None) or "val/loss"
        schedule: Any = {"scheduler": scheduler, "interval": interval, "monitor": monitor}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def _pair(batch: Batch) -> Batch:
    if isinstance(batch, dict):
        raise TypeError(
            f"Classifier takes batches of (inputs, labels), found a dict of {', '.join(batch)}: give the data a"
            " collate_fn that makes pairs, or train a LightningModule that takes the dict."
        )
    return batch


def _picklable(optimizer: OptimizerCallable) -> OptimizerCallable:
    """A twin of the default that survives pickling, which spawned processes need; anything else as it is.

    The default itself is a lambda because the CLI reads the class and its arguments from a lambda only.
    """
    if getattr(optimizer, "__qualname__", None) == "Classifier.<lambda>":
        return partial(torch.optim.SGD, lr=0.1)
    return optimizer
