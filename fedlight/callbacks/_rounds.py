"""What callbacks have in common that only a federated run can call."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback


class RoundCallback(Callback):
    """A callback that acts on rounds, and says so where there are none."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a stock trainer, in which it would do nothing."""
        if not hasattr(type(trainer), "current_round"):
            raise MisconfigurationException(
                f"trainer.callbacks: {type(self).__name__} acts on rounds, which only fedlight.FederatedTrainer has. "
                "Leave it out: Lightning's Trainer writes checkpoints with ModelCheckpoint, and has a progress bar."
            )
