"""A multilayer perceptron."""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fedlight.checks import check_whole
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
        if not isinstance(hidden, Iterable):
            raise ValueError(f"`model.net`: MLP.hidden is a list, as in MLP(64, 10, hidden=[32]), got {hidden!r}.")
        given = {"in_features": [in_features], "hidden": hidden, "num_classes": [num_classes]}
        sizes = [check_whole(f"`model.net`: MLP.{key}", size) for key, sizes in given.items() for size in sizes]
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
