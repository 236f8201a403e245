"""Images of clients side by side that lie channels last: the same function, without copies of what lies so already."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fedlight.engines.vmap.functions import clients_as_channels

CLIENTS, BATCH = 3, 2
POOLS = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max, module": nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
    "max, of torch": lambda x: torch.max_pool2d(x, [2, 1]),
    "average": lambda x: F.avg_pool2d(input=x, kernel_size=3, stride=2, padding=1, divisor_override=5),
    "average, module": nn.AvgPool2d(2),
    "adaptive": nn.AdaptiveAvgPool2d((3, 2)),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "of sequences": lambda x: F.max_pool1d(x.flatten(2), 2),
    "of one image": lambda x: torch.stack([F.max_pool2d(image, 2) for image in x]),
}


def net(channels, pool):
    torch.manual_seed(0)
    layers = nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3)
    return nn.ModuleDict({"layers": nn.Sequential(*layers), "head": nn.LazyLinear(1)}), pool


def stacked(channels, pool):
    """A client's gradient, the parameters of all clients, and their images."""
    modules, pool = net(channels, pool)
    images = torch.randn(CLIENTS, BATCH, channels, 8, 8)

    def features(x):
        return pool(modules["layers"](x)).flatten(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.modules_ = modules

        def forward(self, x):
            return modules["head"](features(x))

    whole = Net()
    whole(images[0])
    names = [name for name, _ in whole.named_parameters()]
    params = [torch.randn(CLIENTS, *p.shape) * 0.3 for p in whole.parameters()]

    def step(x, *p):
        def loss(p):
            return functional_call(whole, dict(zip(names, p, strict=True)), (x,)).square().sum()

        return grad(loss)(p)

    return step, images, params


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("pool", POOLS)
def test_it_is_the_same_function(pool, channels):
    step, images, params = stacked(channels, POOLS[pool])
    each = [step(images[i], *[p[i] for p in params]) for i in range(CLIENTS)]
    wanted = [torch.stack(g) for g in zip(*each, strict=True)]
    for given in clients_as_channels(vmap(step))(images, *params), vmap(step)(images, *params):
        torch.testing.assert_close(list(given), wanted, rtol=1e-4, atol=1e-5)


class Layouts(TorchDispatchMode):
    """Notes how the images of convolutions and pooling lie, and how often something large is copied."""

    def __init__(self):
        super().__init__()
        self.seen, self.copies = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("convolution", "convolution_backward", "max_pool2d_with_indices"):
            images = args[1] if name == "convolution_backward" else args[0]
            self.seen.append((name, tuple(images.shape), images.is_contiguous(memory_format=torch.channels_last)))
        self.copies += name in ("clone", "copy_") and args[0].numel() > 700
        return func(*args, **(kwargs or {}))


def test_clients_are_channels():
    step, images, params = stacked(2, POOLS["max"])
    with Layouts() as usual:
        vmap(step)(images, *params)
    with Layouts() as seen:
        clients_as_channels(vmap(step))(images, *params)
    assert {name for name, *_ in seen.seen} == {"convolution", "convolution_backward", "max_pool2d_with_indices"}
    assert all(shape[:2] in {(BATCH, CLIENTS * c) for c in (2, 4, 6)} and last for _, shape, last in seen.seen)
    assert not all(last for *_, last in usual.seen)
    assert seen.copies == 1 < usual.copies  # the images, where they come in


@pytest.mark.parametrize("pool", ["max", "average", "adaptive"])
def test_pooling_has_second_derivatives(pool):
    """A penalty on a gradient with respect to the images, say."""
    images = torch.randn(CLIENTS, BATCH, 2, 8, 8)

    def step(x):
        def slope(x):
            return grad(lambda x: POOLS[pool](x.tanh()).pow(3).sum())(x).square().sum()

        return grad(slope)(x)

    wanted = torch.stack([step(x) for x in images])
    torch.testing.assert_close(clients_as_channels(vmap(step))(images), wanted, rtol=1e-4, atol=1e-5)


def test_images_that_all_clients_share():
    """They are not the clients' own, but what is weighed with them is."""
    shared, weights = torch.randn(BATCH, 2, 8, 8), torch.randn(CLIENTS, BATCH, 2, 4, 4)

    def step(weight):
        return grad(lambda x: (F.max_pool2d(x, 2) * weight).sum())(shared)

    wanted = torch.stack([step(w) for w in weights])
    torch.testing.assert_close(clients_as_channels(vmap(step))(weights), wanted)
