"""Flat parameters: views in both directions, whatever the module."""

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from fedlight.module.parameters import FlatParameters, ParameterLayout, flat_parameters, load_flat_parameters
from tests.helpers.tiny import seeded


def network():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(seeded(*p.shape, seed=i))
    return net


def test_the_order_is_that_of_named_parameters():
    net = network()
    layout = ParameterLayout.of(net)
    assert [info.name for info in layout.parameters] == [name for name, _ in net.named_parameters()]
    assert layout.numel == sum(p.numel() for p in net.parameters())
    flat = flat_parameters(net)
    assert torch.equal(flat, torch.cat([p.flatten() for p in net.parameters()]))
    for name, view in layout.views(flat).items():
        assert torch.equal(view, dict(net.named_parameters())[name])
        assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_views_keep_leading_dimensions():
    layout = ParameterLayout.of(network())
    stacked = seeded(5, 2, layout.numel)
    views = layout.views(stacked)
    assert views["0.weight"].shape == (5, 2, 4, 3)
    assert torch.equal(views["0.weight"][3, 1], layout.views(stacked[3, 1])["0.weight"])


def test_a_parameter_may_be_a_scalar():
    net = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(3.0)), "other": nn.Parameter(torch.tensor([4.0]))})
    layout = ParameterLayout.of(net)
    assert {k: v.tolist() for k, v in layout.views(torch.tensor([1.0, 2.0])).items()} == {"other": [1.0], "scale": 2.0}
    flat = FlatParameters(net)
    (net["scale"] * 5).backward()
    assert (flat.params.tolist(), flat.grad.tolist()) == ([4.0, 3.0], [0.0, 5.0])


class Scaled(nn.LayerNorm):
    """A normalisation by another name."""


def test_masks_by_kind():
    layout = ParameterLayout.of(network())
    sizes = {"is_norm": 8 + 8, "is_bias": 4 + 4 + 4}
    for kind, size in sizes.items():
        assert int(layout.mask(lambda info, kind=kind: getattr(info, kind)).sum()) == size
    mask = layout.mask(lambda info: info.name == "3.weight")
    assert mask.nonzero().flatten().tolist() == list(range(layout.numel - 8, layout.numel))


def test_biases_of_attention_and_every_norm_are_known():
    net = nn.ModuleList([nn.MultiheadAttention(4, 2), nn.InstanceNorm2d(3, affine=True), nn.LSTM(2, 2), Scaled(4)])
    found = {info.name: (info.is_bias, info.is_norm) for info in ParameterLayout.of(net).parameters}
    assert {name for name, (bias, _) in found.items() if bias} == {name for name in found if "bias" in name}
    assert {name for name, (_, norm) in found.items() if norm} == {"1.weight", "1.bias", "3.weight", "3.bias"}


def test_loading_writes_trainable_parameters_only():
    net = network()
    net[0].weight.requires_grad_(False)
    before, layout = net[0].weight.clone(), ParameterLayout.of(net)
    vector = seeded(layout.numel, seed=9)
    load_flat_parameters(net, vector)
    assert torch.equal(flat_parameters(net), vector)
    assert torch.equal(net[0].weight, before)


def test_an_optimizer_and_a_backward_pass_work_on_the_vectors():
    net, twin = network(), network()
    flat = FlatParameters(net)
    assert torch.equal(flat.params, flat_parameters(twin))
    x = seeded(6, 3, seed=7)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (net, twin)]
    for _ in range(3):
        flat.grad.zero_()
        optimizers[1].zero_grad()
        for module in (net, twin):
            module(x).square().sum().backward()
        assert torch.equal(flat.grad, torch.cat([p.grad.flatten() for p in twin.parameters()]))
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(flat.params, flat_parameters(twin))
    flat.params.zero_()
    assert all(p.abs().sum() == 0 for p in net.parameters())
    flat.release()
    flat.params.fill_(1)
    assert all(p.abs().sum() == 0 and p.grad is None for p in net.parameters())
    assert len({p.untyped_storage().data_ptr() for p in net.parameters()}) == len(list(net.parameters()))


def test_tied_parameters_count_once_and_stay_tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    flat = FlatParameters(net)
    assert flat.layout.numel == 9 + 3 + 3
    flat.params.copy_(torch.arange(15.0))
    assert torch.equal(net[1].weight, torch.arange(9.0).view(3, 3))
    assert net[0].weight is net[1].weight
    assert copy.deepcopy(net)[0].weight.shape == (3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ReLU(), "has no trainable parameter"),
        (lambda: nn.LazyLinear(3), "parameter 'weight' is lazy and has no shape yet"),
        (
            lambda: nn.Linear(2, 2, dtype=torch.complex64),
            "parameter 'weight' is complex, and sums over clients are real",
        ),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).half()), "must share one data type, found 0.weight is"),
    ],
)
def test_what_cannot_be_flat(make, message):
    with pytest.raises(MisconfigurationException, match=message):
        ParameterLayout.of(make())
