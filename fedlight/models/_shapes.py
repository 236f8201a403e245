"""What networks are made of: dense layers, and the check of what reaches them in the words of the config."""

from itertools import pairwise

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn


def check_images(net: nn.Module, x: Tensor, channels: int, size: int | None = None) -> None:
    """Refuse a batch that is not ``[B, channels, size, size]``; ``size=None`` takes any height and width."""
    if x.ndim == 4 and x.shape[1] == channels and (size is None or tuple(x.shape[2:]) == (size, size)):
        return
    name = type(net).__name__
    side = "any, any" if size is None else f"{size}, {size}"
    hint = "choose a `data.source` of that shape, or another `model.net`"
    if x.ndim == 4 and x.shape[1] != channels and hasattr(net, "in_channels"):
        hint = f"set `model.net.in_channels: {x.shape[1]}` if the channels differ, or {hint}"
    raise MisconfigurationException(
        f"`model.net`: {name} takes images of shape [batch, {channels}, {side}], but the batch has shape"
        f" {list(x.shape)}. To fix it, {hint}."
    )


def dense_layers(sizes: list[int], first_relu: int = 1) -> dict[str, nn.Module]:
    """``flatten``, and layers ``fc1, fc2, ...`` with a ReLU after each but the last, counted from ``first_relu``."""
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers[f"fc{i + 1}"] = nn.Linear(inputs, outputs)
        if i + 2 < len(sizes):
            layers[f"relu{first_relu + i}"] = nn.ReLU()
    return layers
