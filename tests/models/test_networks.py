"""Networks: parameter counts worked out by hand, the order of the layers, and wrong inputs."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from fedlight.models import MLP, CharLSTM, CifarCNN, LeNet, ResNet18GN, SmallCNN, TextMLP, TinyImageNetCNN

NETS = [
    (lambda: CifarCNN(num_classes=100), (3, 32, 32), 100),
    (lambda: CifarCNN(num_classes=10, in_channels=1), (1, 32, 32), 10),
    (lambda: TinyImageNetCNN(num_classes=200), (3, 64, 64), 200),
    (lambda: ResNet18GN(num_classes=100), (3, 32, 32), 100),
    (lambda: SmallCNN(num_classes=10), (3, 32, 32), 10),
    (lambda: SmallCNN(num_classes=62, in_channels=1, image_size=28), (1, 28, 28), 62),
    (lambda: LeNet(num_classes=10), (1, 28, 28), 10),
    (lambda: MLP(in_features=64, num_classes=10, hidden=[32, 16]), (1, 8, 8), 10),
]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def counts(module: nn.Module) -> dict[str, int]:
    return {name: count(child) for name, child in module.named_children() if count(child)}


def kinds(module: nn.Module) -> list[type[nn.Module]]:
    return [type(child) for child in module.children()]


@pytest.mark.parametrize(("build", "shape", "classes"), NETS)
def test_logits_have_one_column_per_class(build, shape, classes):
    assert build()(torch.zeros(2, *shape)).shape == (2, classes)


def test_cifar_cnn_layer_by_layer():
    # inputs * kernel area * outputs + biases
    assert counts(CifarCNN(num_classes=100)) == {
        "conv1": 3 * 25 * 64 + 64,
        "conv2": 64 * 25 * 64 + 64,
        "fc1": 1600 * 384 + 384,
        "fc2": 384 * 192 + 192,
        "fc3": 192 * 100 + 100,
    }
    assert count(CifarCNN(num_classes=100)) == 815_332


def test_tiny_imagenet_cnn_layer_by_layer():
    net = TinyImageNetCNN(num_classes=200)
    assert counts(net) == {
        "conv1": 3 * 9 * 64 + 64,
        "norm1": 2 * 64,
        "conv2": 64 * 9 * 64 + 64,
        "norm2": 2 * 64,
        "conv3": 64 * 9 * 64 + 64,
        "norm3": 2 * 64,
        "fc1": 4096 * 512 + 512,
        "fc2": 512 * 384 + 384,
        "fc3": 384 * 200 + 200,
    }
    assert count(net) == 2_447_688
    assert [m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)] == [4, 4, 4]


def test_small_cnn_layer_by_layer():
    assert counts(SmallCNN(num_classes=10)) == {
        "conv1": 3 * 9 * 32 + 32,
        "conv2": 32 * 9 * 64 + 64,
        "fc1": 64 * 14 * 14 * 128 + 128,
        "fc2": 128 * 10 + 10,
    }
    assert count(SmallCNN(num_classes=10)) == 1_626_442


def test_lenet_has_its_well_known_size():
    assert count(LeNet(num_classes=10)) == 61_706


def test_mlp_layer_by_layer():
    assert counts(MLP(64, 10, hidden=[32, 16])) == {"fc1": 64 * 32 + 32, "fc2": 32 * 16 + 16, "fc3": 16 * 10 + 10}
    assert counts(MLP(64, 10, hidden=[])) == {"fc1": 64 * 10 + 10}


def test_resnet18_has_the_published_size():
    # torchvision's ResNet-18 has 11,689,512 parameters: another stem (3x7x7) and 1000 classes.
    stem = 3 * 64 * 9 - 3 * 64 * 49
    head = 513 * 100 - 513 * 1000
    assert count(ResNet18GN(num_classes=100)) == 11_689_512 + stem + head == 11_220_132


def test_resnet18_normalises_by_groups_and_has_a_module_per_relu():
    net = ResNet18GN(num_classes=10, groups=2)
    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) == 20
    assert all(n.num_groups == 2 for n in norms)
    assert not [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    calls: list[nn.Module] = []
    for relu in (m for m in net.modules() if isinstance(m, nn.ReLU)):
        relu.register_forward_hook(lambda module, args, output: calls.append(module))
    net(torch.zeros(1, 3, 32, 32))
    assert len(calls) == len(set(calls)) == 17  # the stem's and two of each of eight blocks


def test_resnet18_stages_halve_the_image():
    net = ResNet18GN(num_classes=10)
    shapes = []
    for stage in net.stages:
        stage.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape[1:])))
    net(torch.zeros(1, 3, 32, 32))
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_resnet18_block_is_relu_of_branch_plus_shortcut():
    torch.manual_seed(0)
    net = ResNet18GN(num_classes=10).double()
    block, x = net.stages[1][0], torch.randn(2, 64, 8, 8, dtype=torch.float64)
    branch = block.norm2(block.conv2(block.norm1(block.conv1(x)).clamp(min=0)))
    assert torch.equal(block(x), (branch + block.shortcut(x)).clamp(min=0))


def test_activations_come_before_pooling():
    assert kinds(CifarCNN(num_classes=10))[:6] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d] * 2
    assert kinds(CifarCNN(num_classes=10))[6:] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert kinds(TinyImageNetCNN(num_classes=10))[:12] == [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.MaxPool2d] * 3
    assert kinds(LeNet(num_classes=10))[:6] == [nn.Conv2d, nn.ReLU, nn.MaxPool2d] * 2
    assert kinds(SmallCNN(num_classes=10))[:6] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Dropout]


@pytest.mark.parametrize(("build", "shape", "classes"), NETS)
def test_relus_are_not_in_place(build, shape, classes):
    # Penalties keep the activations, and Hessian-vector products differentiate twice.
    assert not [m for m in build().modules() if isinstance(m, nn.ReLU) and m.inplace]


@pytest.mark.parametrize(("build", "shape", "classes"), NETS)
def test_the_global_generator_decides_the_initial_weights(build, shape, classes):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build().parameters()).detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("build", [CifarCNN, ResNet18GN])
def test_wrong_channels_name_the_key(build):
    with pytest.raises(MisconfigurationException, match=r"model\.net\.in_channels: 1.*data\.source") as error:
        build(num_classes=10)(torch.zeros(2, 1, 32, 32))
    assert "[2, 1, 32, 32]" in str(error.value)


@pytest.mark.parametrize("net", [TinyImageNetCNN(num_classes=10), LeNet(num_classes=10, in_channels=3)])
def test_wrong_size_names_expected_and_found(net):
    with pytest.raises(MisconfigurationException, match=r"\[batch, 3, \d+, \d+\].*\[2, 3, 32, 32\].*data\.source"):
        net(torch.zeros(2, 3, 32, 32))


def test_missing_batch_dimension_is_refused():
    with pytest.raises(MisconfigurationException, match="model.net"):
        CifarCNN(num_classes=10)(torch.zeros(3, 32, 32))


def test_mlp_says_how_many_features_it_got():
    with pytest.raises(MisconfigurationException, match=r"model\.net\.in_features: 784"):
        MLP(in_features=64, num_classes=10)(torch.zeros(2, 1, 28, 28))


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: ResNet18GN(num_classes=10, groups=3), "model.net.groups"),
        (lambda: SmallCNN(num_classes=10, image_size=5), "model.net.image_size"),
        (lambda: MLP(in_features=0, num_classes=10), "MLP.in_features must be at least 1, got 0"),
        (lambda: MLP(64, 10, hidden=[32, 1.5]), "MLP.hidden must be a whole number, got 1.5"),
        (lambda: MLP(64, [32], 10), r"MLP.hidden is a list, as in MLP\(64, 10, hidden=\[32\]\), got 10"),
    ],
)
def test_impossible_sizes_are_refused(build, key):
    with pytest.raises(ValueError, match=key):
        build()


def test_the_lstm_reads_a_text_to_its_end_and_no_further():
    """Beside a twin: an LSTM that is given the text without its padding."""
    torch.manual_seed(0)
    net = CharLSTM(num_classes=4, vocab_size=9, embedding_dim=3, hidden_size=5)
    ids = torch.tensor([[3, 1, 8, 0, 0], [2, 7, 7, 5, 4]])
    logits = net(ids)
    for row, length in enumerate((3, 5)):
        said, _ = net.lstm(net.embedding(ids[row : row + 1, :length]))
        torch.testing.assert_close(logits[row], net.fc(said[0, -1]))
    assert sum(p.numel() for p in CharLSTM(80, 80).parameters()) == 819_920


def test_the_text_network_takes_the_mean_of_what_is_no_padding():
    net = TextMLP(num_classes=2, vocab_size=4, embedding_dim=2, hidden_size=2)
    with torch.no_grad():
        net.embedding.weight.copy_(torch.tensor([[9.0, 9], [1, -2], [3, 6], [0, 0]]))
        for layer in (net.fc1, net.fc2):
            layer.weight.copy_(torch.eye(2))
            layer.bias.zero_()
    assert net(torch.tensor([[1, 2, 0], [1, 0, 0], [0, 0, 0]])).tolist() == [[2, 2], [1, 0], [0, 0]]
