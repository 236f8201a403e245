"""ResNet-18 with group normalisation, for small images."""

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn

from fedlight.models.cnn import ImageStack


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He 2016); a ReLU of its own after each sum and each first convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, norm=nn.GroupNorm(groups, outputs)))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        result: Tensor = self.relu2(out + self.shortcut(x))
        return result


class ResNet18GN(ImageStack):
    """ResNet-18 (He 2016) for images of about 32x32, GroupNorm in place of BatchNorm.

    BatchNorm's statistics differ between clients; GroupNorm has none. The stem is one 3x3 convolution without
    pooling, then four stages of two blocks with 64, 128, 256 and 512 channels. 11,220,132 parameters for 100 classes.

    Args:
        num_classes: logits.
        groups: groups of every GroupNorm; must divide 64.
        in_channels: channels of the images.
    """

    def __init__(self, num_classes: int, groups: int = 2, in_channels: int = 3) -> None:
        if groups < 1 or 64 % groups:
            raise ValueError(f"`model.net.groups` must divide 64, got {groups}.")
        layers: dict[str, nn.Module] = {
            "conv": nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False),
            "norm": nn.GroupNorm(groups, 64),
            "relu": nn.ReLU(),
        }
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        for stage, (inputs, outputs) in enumerate(pairwise((64, 64, 128, 256, 512)), start=1):
            blocks = _Block(inputs, outputs, 1 if stage == 1 else 2, groups), _Block(outputs, outputs, 1, groups)
            stages[f"stage{stage}"] = nn.Sequential(*blocks)
        layers |= {"stages": nn.Sequential(stages), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
        super().__init__(layers | {"fc": nn.Linear(512, num_classes)}, in_channels)
