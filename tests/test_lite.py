"""The network and the images of configs/lite/."""

import torch

from benchmarks.lite import LiteCNN, reduced
from fedlight.data import ImageArrays


def test_images_are_means_of_four_pixels_in_an_order_of_their_own():
    x = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    x[0, 0, 0, 0] = 255  # 255 / 4 = 63.75
    x[1, 0, 0, :2] = 100  # 200 / 4
    x[2] = 7
    y = torch.tensor([3, 3, 1, 20])  # the 21st class is left out
    names = [f"class{i}" for i in range(21)]
    small = reduced(ImageArrays(x, y, x, y, classes=names))
    assert small.y_train.tolist() == [1, 3, 3]
    assert small.x_train[:, 0].tolist() == [[[7, 7], [7, 7]], [[50, 0], [0, 0]], [[64, 0], [0, 0]]]
    assert small.classes == names[:20]
    turned = reduced(ImageArrays(x.flip(0), y.flip(0), x, y, classes=names))
    assert torch.equal(turned.x_train, small.x_train)
    assert torch.equal(turned.y_train, small.y_train)


def test_the_network_is_as_large_as_is_said():
    net = LiteCNN(20)
    # 16·(3·16 + 1) + 32·(16·16 + 1) + 64·(512 + 1) + 20·(64 + 1)
    assert sum(p.numel() for p in net.parameters()) == 784 + 8224 + 32832 + 1300 == 43140
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 20)
