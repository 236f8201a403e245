"""MAN on networks as the libraries of the field make them: which layers it takes, by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedlight.callbacks import MAN


class Trained(nn.Module):
    def __init__(self, net, loss=None):
        super().__init__()
        self.net, self.loss = net.train(), loss or (lambda net, x: net(x).square().mean())

    def training_step(self, batch):
        return self.loss(self.net, batch)


@pytest.fixture
def messages(monkeypatch):
    """What is said."""
    said = []
    monkeypatch.setattr("fedlight.penalties.observation.rank_zero_info", said.append)
    return said


def taken(net, batch, loss=None):
    """Names in the network, the same in two steps, with the penalty that they add up to."""
    module, man = Trained(net, loss), MAN(0.5)
    with man.attached(module) as step:
        module.training_step(batch)
        first = list(man.norms(module))
        module.training_step(batch).backward()
        norms = man.norms(module)
        torch.testing.assert_close(step.penalty, 0.25 * sum(norms.values()))
    assert list(norms) == first
    return [name.removeprefix("net.") for name in first]


def images(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def modules(net, *classes):
    return sum(isinstance(child, classes) for child in net.modules())


# torch


@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu])
def test_transformer_encoder(activation):
    name = activation if isinstance(activation, str) else "silu"
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, 0.0, activation, batch_first=True), 2, enable_nested_tensor=False
    )
    assert taken(net, torch.randn(2, 3, 8)) == [f"layers.0.{name}", f"layers.1.{name}"]


def test_transformer_encoder_with_a_module():
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, activation=nn.GELU()), 2, enable_nested_tensor=False
    )
    assert taken(net, torch.randn(2, 3, 8)) == ["layers.0.activation", "layers.1.activation"]


def test_value_of_a_transformer_layer_computed_by_hand():
    net = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, norm_first=True, batch_first=True).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module, man = Trained(net), MAN(0.5)
    with man.attached(module):
        module.training_step(x)
        measured = man.norms(module)["net.relu"]
    z = net.norm1(x)
    y = x + net.self_attn(z, z, z, need_weights=False)[0]
    expected = F.relu(net.linear1(net.norm2(y))).square().mean()
    torch.testing.assert_close(measured, expected.detach(), rtol=1e-12, atol=0)


# torchvision


def vision(name, **settings):
    return pytest.importorskip("torchvision.models").get_model(name, weights=None, **settings)


def test_resnet():
    names = taken(vision("resnet18"), images(32))
    assert names[:3] == ["relu", "layer1.0.relu", "layer1.0.relu_2"]
    assert len(names) == 17


def test_mobilenet_without_the_gates_of_squeeze_excite(messages):
    net = vision("mobilenet_v3_small")
    names = taken(net, images(32))
    assert len(names) == modules(net, nn.ReLU, nn.Hardswish)
    assert not any("scale_activation" in name for name in names)
    assert "Left out, as gates, which multiply something: net.features.1.block.1.scale_activation, " in messages[0]
    assert messages[0].endswith("and 1 more.")


def test_squeezenet():
    assert len(taken(vision("squeezenet1_1"), images(64))) == 26


def test_inception_modules_that_call_functions():
    parts = pytest.importorskip("torchvision.models.inception")
    names = taken(nn.Sequential(parts.BasicConv2d(3, 8, kernel_size=3), parts.InceptionA(8, 4)), images(12))
    inner = ("branch1x1", "branch5x5_1", "branch5x5_2", "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    assert names == ["0.relu", *[f"1.{name}.relu" for name in (*inner, "branch_pool")]]


def test_googlenet_modules_that_call_functions():
    parts = pytest.importorskip("torchvision.models.googlenet")
    net = parts.Inception(3, 4, 4, 4, 4, 4, 4)
    branches = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
    assert taken(net, images(8)) == [f"{name}.relu" for name in branches]


def test_vision_transformer():
    net = pytest.importorskip("torchvision.models").VisionTransformer(32, 16, 2, 2, 16, 32)
    assert taken(net, images(32)) == [f"encoder.layers.encoder_layer_{i}.mlp.1" for i in (0, 1)]


# timm


def timm(name, **settings):
    return pytest.importorskip("timm", reason="timm is not installed").create_model(name, **settings)


def test_timm_squeeze_excite(messages):
    net = timm("mobilenetv3_small_050")
    names = taken(net, images(32))
    assert "blocks.0.0.se.act1" in names
    assert not any(name.endswith("gate") for name in names)
    assert "as gates, which multiply something: net.blocks.0.0.se.gate, " in messages[0]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}),
        ("vit_tiny_patch16_224", {"depth": 4, "embed_dim": 16, "num_heads": 2, "img_size": 32}),
    ],
)
def test_timm_blocks(name, settings):
    names = taken(timm(name, **settings), images(32))
    assert len(names) == 4
    assert all(name.endswith(".mlp.act") for name in names)


@pytest.mark.parametrize("act", ["swish", "mish", "hard_swish", "hard_mish", "gelu_tanh", "quick_gelu", "tanh"])
def test_timm_activations(act):
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    assert taken(nn.Sequential(nn.Linear(4, 4), layers.create_act_layer(act)), torch.randn(3, 4)) == ["1"]


# transformers


def labelled(net, batch):
    return net(**batch, labels=batch.get("input_ids", torch.tensor([0, 1]))).loss


TOKENS = {"input_ids": torch.arange(12).reshape(2, 6)}
SIZES = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def transformer(model, config, **settings):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def test_bert():
    net = transformer("BertForMaskedLM", "BertConfig", **SIZES)
    inner = [f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn" for i in (0, 1)]
    assert taken(net, TOKENS, labelled) == [*inner, "cls.predictions.transform.transform_act_fn"]


@pytest.mark.filterwarnings("ignore")
def test_gpt2():
    settings = {"vocab_size": 32, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
    net = transformer("GPT2LMHeadModel", "GPT2Config", **settings, bos_token_id=0, eos_token_id=0)
    assert taken(net, TOKENS, labelled) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]


def test_llama():
    net = transformer("LlamaForCausalLM", "LlamaConfig", **SIZES)
    assert taken(net, TOKENS, labelled) == ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"]


def test_vit():
    settings = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    net = transformer("ViTForImageClassification", "ViTConfig", **settings, image_size=32, patch_size=16)
    names = taken(net, {"pixel_values": images(32)}, labelled)
    assert len(names) == 2
    assert not any("attention" in name for name in names)
