"""Convolutional networks of the papers. Each is a plain stack: convolution, ReLU, pooling, then dense layers."""

from collections import OrderedDict
from itertools import pairwise

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fedlight.written import Remembers


def _stages(*convolutions: nn.Conv2d, groups: int = 0) -> dict[str, nn.Module]:
    """After each convolution a GroupNorm, if there are ``groups``, a ReLU, and max-pooling 2; all numbered from 1."""
    layers: dict[str, nn.Module] = {}
    for i, convolution in enumerate(convolutions, start=1):
        layers[f"conv{i}"] = convolution
        if groups:
            layers[f"norm{i}"] = nn.GroupNorm(groups, convolution.out_channels)
        layers |= {f"relu{i}": nn.ReLU(), f"pool{i}": nn.MaxPool2d(2)}
    return layers


def dense_layers(sizes: list[int], first_relu: int = 1) -> dict[str, nn.Module]:
    """``flatten``, and layers ``fc1, fc2, ...`` with a ReLU after each but the last, counted from ``first_relu``."""
    layers: dict[str, nn.Module] = {"flatten": nn.Flatten()}
    for i, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers[f"fc{i + 1}"] = nn.Linear(inputs, outputs)
        if i + 2 < len(sizes):
            layers[f"relu{first_relu + i}"] = nn.ReLU()
    return layers


class ImageStack(Remembers, nn.Sequential):
    """Layers in sequence, for images ``[B, in_channels, image_size, image_size]``; of any size where that is None."""

    def __init__(self, layers: dict[str, nn.Module], in_channels: int, image_size: int | None = None) -> None:
        super().__init__(OrderedDict(layers))
        self.in_channels, self.image_size = in_channels, image_size

    def forward(self, input: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, in_channels, image_size, image_size]``."""
        size, channels = self.image_size, self.in_channels
        if input.ndim != 4 or input.shape[1] != channels or (size and tuple(input.shape[2:]) != (size, size)):
            hint = "choose a `data.source` of that shape, or another `model.net`"
            if input.ndim == 4 and input.shape[1] != channels:
                hint = f"set `model.net.in_channels: {input.shape[1]}` if the channels differ, or {hint}"
            wanted = f"images of shape [batch, {channels}, {size or 'any'}, {size or 'any'}]"
            found = f"but the batch has shape {list(input.shape)}. To fix it, {hint}."
            raise MisconfigurationException(f"`model.net`: {type(self).__name__} takes {wanted}, {found}")
        logits: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return logits


class CifarCNN(ImageStack):
    """The CIFAR network of the MAN paper (WACV 2024), without normalisation.

    Two times convolution 5x5 with 64 channels, ReLU, max-pooling 2; then dense layers 1600, 384, 192, classes with a
    ReLU between them. 815,332 parameters for 100 classes.

    Args:
        num_classes: logits.
        in_channels: channels of the images, which are ``[B, in_channels, 32, 32]``.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        stages = _stages(nn.Conv2d(in_channels, 64, kernel_size=5), nn.Conv2d(64, 64, kernel_size=5))
        super().__init__(stages | dense_layers([64 * 5 * 5, 384, 192, num_classes], first_relu=3), in_channels, 32)


class TinyImageNetCNN(ImageStack):
    """The Tiny-ImageNet network of the MAN paper (WACV 2024).

    Three times convolution 3x3 with 64 channels (padding 1), GroupNorm with 4 groups, ReLU, max-pooling 2; then dense
    layers 4096, 512, 384, classes with a ReLU between them. 2,447,688 parameters for 200 classes.

    Args:
        num_classes: logits.
        in_channels: channels of the images, which are ``[B, in_channels, 64, 64]``.
    """

    def __init__(self, num_classes: int, in_channels: int = 3) -> None:
        stages = _stages(*(nn.Conv2d(c, 64, kernel_size=3, padding=1) for c in (in_channels, 64, 64)), groups=4)
        super().__init__(stages | dense_layers([64 * 8 * 8, 512, 384, num_classes], first_relu=4), in_channels, 64)


class SmallCNN(ImageStack):
    """The small CNN with dropout that pfl-research's CIFAR-10 benchmark trains.

    Convolutions 3x3 with 32 and 64 channels, a ReLU after each, max-pooling 2, dropout ¼, a dense layer of 128, ReLU,
    dropout ½, classes. 1,626,442 parameters for CIFAR-10. PyTorch's default initialisation is kept.

    Args:
        num_classes: logits.
        in_channels: channels of the images.
        image_size: their height and width, in pixels.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, image_size: int = 32) -> None:
        pooled = (image_size - 4) // 2
        if pooled < 1:
            raise ValueError(f"`model.net.image_size` must be at least 6, got {image_size}.")
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, 32, kernel_size=3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 64, kernel_size=3),
                relu2=nn.ReLU(),
                pool=nn.MaxPool2d(2),
                dropout1=nn.Dropout(0.25),
                flatten=nn.Flatten(),
                fc1=nn.Linear(64 * pooled * pooled, 128),
                relu3=nn.ReLU(),
                dropout2=nn.Dropout(0.5),
                fc2=nn.Linear(128, num_classes),
            ),
            in_channels,
            image_size,
        )


class LeNet(ImageStack):
    """LeNet-5 (LeCun 1998) for 28x28 images, with ReLU and max-pooling as it is used today.

    Convolutions 5x5 with 6 (padding 2) and 16 channels, ReLU and max-pooling 2 after each; then dense layers 400, 120,
    84, classes. 61,706 parameters for ten classes of grey images.

    Args:
        num_classes: logits.
        in_channels: channels of the images, which are ``[B, in_channels, 28, 28]``.
    """

    def __init__(self, num_classes: int, in_channels: int = 1) -> None:
        stages = _stages(nn.Conv2d(in_channels, 6, kernel_size=5, padding=2), nn.Conv2d(6, 16, kernel_size=5))
        super().__init__(stages | dense_layers([16 * 5 * 5, 120, 84, num_classes], first_relu=3), in_channels, 28)
