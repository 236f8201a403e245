"""A multilayer perceptron."""

import math
from collections import OrderedDict
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fedlight.models.cnn import dense_layers
from fedlight.written import Remembers


class MLP(Remembers, nn.Sequential):
    """Dense layers with a ReLU after each but the last; whatever comes in is flattened.

    Args:
        in_features: numbers per sample: channels times height times width of an image.
        num_classes: logits.
        hidden: widths of the hidden layers; an empty list makes it multinomial logistic regression.
    """

    def __init__(self, in_features: int, num_classes: int, hidden: Sequence[int] = (64,)) -> None:
        sizes = [in_features, *hidden, num_classes]
        if min(sizes) < 1:
            found = f"in_features={in_features}, hidden={list(hidden)}, num_classes={num_classes}"
            raise ValueError(f"`model.net`: MLP needs sizes of at least 1, got {found}.")
        super().__init__(OrderedDict(dense_layers(sizes)))
        self.in_features = in_features

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of samples ``[B, ...]`` with ``in_features`` numbers each."""
        found = math.prod(input.shape[1:])
        if input.ndim < 2 or found != self.in_features:
            raise MisconfigurationException(
                f"`model.net`: MLP takes {self.in_features} numbers per sample, but the batch has shape"
                f" {list(input.shape)}. To fix it, set `model.net.in_features: {found}`, or choose another"
                " `data.source`."
            )
        logits: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return logits
