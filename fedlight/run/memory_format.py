"""In which order the entries of images lie in memory."""

import torch
from lightning.fabric.plugins import Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


def feed_channels_last(precision: Precision) -> None:
    """From now on ``convert_input`` gives images ``[B, C, H, W]`` whose channels are neighbours in memory.

    Shapes and values stay; convolutions then take kernels that need no copies in between, and give outputs of this
    format themselves. So it is in training and evaluation, in every engine.

    Args:
        precision: of a run's own Fabric.
    """
    convert = precision.convert_input
    precision.convert_input = lambda data: apply_to_collection(  # type: ignore[method-assign]
        convert(data), Tensor, _channels_last
    )


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4 or not tensor.is_floating_point():
        return tensor
    out = tensor.contiguous(memory_format=torch.channels_last)
    # Images of one channel are in both formats; torch takes the one that their strides are written in.
    _, channels, height, width = out.shape
    return out.as_strided(out.shape, (channels * height * width, 1, channels * width, channels))
