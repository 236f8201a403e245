"""Training without a federation."""

import torch
from lightning.pytorch import LightningModule

from fedlight.module.parameters import ParameterLayout
from fedlight.personal.parts import PersonalParts


class LocalOnly(PersonalParts):
    """Each client goes on with its own model in every round that it takes part in: all of the model is personal.

    It is the lower line of a study: nothing crosses, and a client begins with the module as it was initialised. The
    server's model, which is evaluated as ever, is the mean of those of the round's clients.
    """

    def __init__(self) -> None:
        super().__init__([".*"])

    def setup(self, module: LightningModule, layout: ParameterLayout) -> None:
        """Everything is the client's own."""
        self.entries = torch.ones(layout.numel, dtype=torch.bool)
        self.buffers = frozenset(name for name, _ in module.named_buffers())

    def phrase(self, layout: ParameterLayout) -> str:
        """What it is."""
        return "every client trains alone"
