"""The models in stock Lightning CLIs: short names, one number of classes, configs and checkpoints."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from fedlight.models import MLP, CifarCNN, Classifier

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
PAPER = [
    *["--model", "Classifier", "--model.net", "CifarCNN", "--model.num_classes", "100"],
    *["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1"],
    *["--model.optimizer.weight_decay", "1e-3"],
    *["--model.lr_scheduler", "torch.optim.lr_scheduler.ExponentialLR", "--model.lr_scheduler.gamma", "0.998"],
]
IMAGE_SHAPES = {
    "cifar100_cnn": (3, 32, 32),
    "tinyimagenet_cnn": (3, 64, 64),
    "resnet18gn": (3, 32, 32),
    "digits_mlp": (1, 8, 8),
    "lenet": (1, 28, 28),
    "small_cnn": (3, 32, 32),
}


class Foreign(nn.Module):
    """A network of somebody else, which does not take the number of classes."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 7)


class Rows(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.eye(4), torch.arange(4)), batch_size=2)

    val_dataloader = train_dataloader


def parser() -> LightningArgumentParser:
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    return parser


def build(args: list[str]) -> LightningModule:
    p = parser()
    return p.instantiate(p.parse_args(args)).model


def test_the_papers_command_line():
    model = build(PAPER)
    assert isinstance(model.net, CifarCNN)
    assert model.net.fc3.out_features == 100
    found = model.configure_optimizers()
    group = found["optimizer"].param_groups[0]
    assert (group["initial_lr"], group["weight_decay"], group["momentum"]) == (0.1, 1e-3, 0)
    assert isinstance(found["lr_scheduler"]["scheduler"], ExponentialLR)
    assert found["lr_scheduler"]["scheduler"].gamma == 0.998
    assert found["lr_scheduler"]["interval"] == "round"


def test_default_optimizer_can_be_changed_in_part():
    model = build(
        ["--model", "Classifier", "--model.net", "LeNet", "--model.num_classes=10", "--model.optimizer.momentum=0.9"]
    )
    group = model.configure_optimizers().param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.1, 0.9)


def test_printed_config_gives_the_same_model():
    p = parser()
    first = p.parse_args(PAPER)
    again = p.parse_object({"model": yaml.safe_load(p.dump(first))["model"]})
    assert p.dump(again) == p.dump(first)
    assert repr(p.instantiate(again).model) == repr(p.instantiate(first).model)


def test_a_network_without_num_classes_is_taken_as_it_is():
    model = build(
        ["--model=Classifier", f"--model.net={__name__}.Foreign", "--model.net.width=5", "--model.num_classes=7"]
    )
    assert model.net.layer.weight.shape == (7, 5)


def test_num_classes_of_the_network_may_be_given_too():
    model = build(["--model=Classifier", "--model.net=CifarCNN", "--model.net.num_classes=7", "--model.num_classes=7"])
    assert model.net.fc3.out_features == 7


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_parts_build_a_model_that_fits_their_images(config):
    model = build(["--model", str(config)])
    x = torch.zeros(2, *IMAGE_SHAPES[config.stem])
    assert isinstance(model, Classifier)
    assert model(x).shape == (2, model.num_classes)
    found = model.configure_optimizers()
    optimizer = found["optimizer"] if isinstance(found, dict) else found
    assert optimizer.param_groups[0]["lr"] > 0


def test_every_config_part_is_known_here():
    assert {path.stem for path in CONFIGS} == set(IMAGE_SHAPES)


def test_cli_checkpoint_holds_plain_hyperparameters_and_loads_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit"])  # Lightning warns of pytest's own
    cli = LightningCLI(
        LightningModule,
        Rows,
        subclass_mode_model=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        args=[
            "fit",
            *["--model=Classifier", "--model.net=fedlight.models.MLP", "--model.net.in_features=4"],
            *["--model.net.hidden=[5]", "--model.num_classes=4", "--model.optimizer.lr=0.5"],
            *["--model.lr_scheduler=ExponentialLR", "--model.lr_scheduler.gamma=0.9"],
            *["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.logger=false"],
            *["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"],
            *["--trainer.log_every_n_steps=1", f"--trainer.default_root_dir={tmp_path}"],
        ],
    )
    path = cli.trainer.checkpoint_callback.best_model_path
    hparams = torch.load(path, weights_only=True)["hyper_parameters"]
    assert hparams["net"]["class_path"].endswith(".MLP")
    assert hparams["net"]["init_args"] == {"in_features": 4, "hidden": [5]}
    assert hparams["_class_path"].endswith(".Classifier")
    for load in (Classifier.load_from_checkpoint, LightningModule.load_from_checkpoint):
        loaded = load(path, weights_only=True)
        assert isinstance(loaded.net, MLP)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), cli.model.parameters(), strict=True))
        assert loaded.configure_optimizers()["optimizer"].param_groups[0]["initial_lr"] == 0.5
