"""What configs/lite/ needs besides the package: a small network, and small images.

usage: python benchmarks/lite.py [--cifar100 cifar100 | FILE.npz] [--pacs FOLDER] [--root data]

It writes data/lite/cifar20.npz: the first 20 classes of CIFAR-100, 10,000 images for training and 2,000 for the test,
each pixel the mean of 2x2. They are sorted by class and pixels, so that clients hold the same images in whatever order
the source has them. And data/lite/pacs.npz, where there are the folders of PACS: 9,991 images in four domains, of which
a fifth of each class and domain is for the test. All images are 16x16.
"""

import argparse
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedlight.data import ImageArrays, load_source
from fedlight.data.sources import download_source

CLASSES, SIZE = 20, 16


class LiteCNN(nn.Sequential):
    """Two convolutions 4x4 of stride 2 with 16 and 32 channels, dense layers of 64 and classes, a ReLU between all.

    For images of 3x16x16; 43,140 parameters for 20 classes. Strides in place of pooling: a step takes half the time.

    Args:
        num_classes: logits.
        norm: put a BatchNorm before the ReLU of both convolutions.
    """

    def __init__(self, num_classes: int, norm: bool = False) -> None:
        norms = [OrderedDict({f"bn{i}": nn.BatchNorm2d(16 * i)}) if norm else {} for i in (1, 2)]
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(3, 16, kernel_size=4, stride=2, padding=1),
                **norms[0],
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(16, 32, kernel_size=4, stride=2, padding=1),
                **norms[1],
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                fc1=nn.Linear(32 * (SIZE // 4) ** 2, 64),
                relu3=nn.ReLU(),
                fc2=nn.Linear(64, num_classes),
            )
        )


def reduced(arrays: ImageArrays) -> ImageArrays:
    """The first classes of 32x32 images, half as high and wide, sorted."""
    kept: dict[str, Tensor] = {}
    for split in ("train", "test"):
        x, y = getattr(arrays, f"x_{split}"), getattr(arrays, f"y_{split}")
        x, y = nn.functional.avg_pool2d(x[y < CLASSES].float(), 2).round().to(torch.uint8), y[y < CLASSES]
        order = torch.from_numpy(np.lexsort((*x.flatten(1).T.flip(0).numpy(), y.numpy())))
        kept |= {f"x_{split}": x[order], f"y_{split}": y[order]}
    return replace(arrays, **kept, classes=arrays.classes[:CLASSES])


def main() -> None:
    """Write what there are images for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar100", default="cifar100", help="cifar100, downloaded to --root, or an .npz file")
    parser.add_argument("--pacs", type=Path, help="folder <domain>/<class>/*.jpg (default: ROOT/pacs, if it is there)")
    parser.add_argument("--root", type=Path, default=Path("data"))
    options = parser.parse_args()
    download_source(options.cifar100, options.root)
    written = {"cifar20": reduced(load_source(options.cifar100, options.root))}
    pacs = options.pacs or options.root / "pacs"
    if options.pacs or pacs.is_dir():
        written["pacs"] = load_source(str(pacs), image_size=SIZE)
    for name, arrays in written.items():
        target = options.root / "lite" / f"{name}.npz"
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays.save(target)
        counts = f"{len(arrays.y_train)} training and {len(arrays.y_test)} test images of {arrays.num_classes} classes"
        print(f"{target}: {counts}")


if __name__ == "__main__":
    main()
