"""MAN in a stock LightningCLI: from YAML and from the command line, and the example that shows it."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from fedlight.callbacks import MAN
from tests.callbacks.nets import Batches, Lit, batches

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv[:1])  # a LightningCLI with `args` warns of others


class WithData(Lit):
    """The small network with data of its own."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)

    def train_dataloader(self):
        return Batches(batches(1))


def run(*arguments, model=WithData, data=None, **kwargs):
    settings = {"trainer_defaults": QUIET, "save_config_callback": None, "seed_everything_default": 0} | kwargs
    return LightningCLI(model, data, args=list(arguments), **settings)


@pytest.mark.parametrize("name", ["MAN", "fedlight.callbacks.MAN", "fedlight.penalties.man.MAN"])
def test_on_the_command_line(name):
    cli = run("fit", f"--trainer.callbacks+={name}", "--trainer.callbacks.zeta=0.3")
    assert cli.trainer.callback_metrics.keys() == {"train/penalty", "man/net.relu", "man/net.tanh"}


def test_with_nothing_but_its_name():
    cli = run("fit", "--trainer.callbacks+=MAN")
    (man,) = [c for c in cli.trainer.callbacks if isinstance(c, MAN)]
    assert (man.zeta, man.layers) == (0.15, None)


LAYERS = ["torch.nn.ReLU", "Tanh", r"net\.(relu|tanh)", "net.relu"]


def test_in_yaml_and_back(tmp_path):
    config = tmp_path / "config.yaml"
    callback = {"class_path": "fedlight.callbacks.MAN", "init_args": {"zeta": 0.3, "layers": LAYERS}}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    cli = run("-c", str(config), run=False)
    (man,) = [c for c in cli.trainer.callbacks if isinstance(c, MAN)]
    assert man.zeta == 0.3
    assert list(man.observe(cli.model)) == ["net.relu", "net.tanh"]
    printed = yaml.safe_load(cli.parser.dump(cli.config))
    assert printed["trainer"]["callbacks"][0] == callback


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--trainer.callbacks.zeta=-1", "MAN.zeta must be a finite number"),
        ("--trainer.callbacks.zta=1", "zta"),
    ],
)
def test_bad_input_ends_before_training(argument, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        run("fit", "--trainer.callbacks+=MAN", argument)
    assert message in capsys.readouterr().err + str(caught.value)


def test_the_example(tmp_path):
    example = runpy.run_path(str(EXAMPLES / "man_in_plain_lightning.py"), run_name="man_in_plain_lightning")
    cli = run(
        "fit", "-c", str(EXAMPLES / "man_in_plain_lightning.yaml"), f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--trainer.enable_checkpointing=false",
        model=example["DigitsNet"], data=example["Digits"], trainer_defaults={},
    )  # fmt: skip
    metrics = cli.trainer.callback_metrics
    assert metrics["man/net.1"] > 0
    assert metrics["man/net.3"] > 0
    torch.testing.assert_close(metrics["train/penalty"], 0.075 * (metrics["man/net.1"] + metrics["man/net.3"]))
    assert metrics["val/accuracy"] > 0.2
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert {"train/penalty", "man/net.1", "man/net.3", "val/accuracy"} <= set(header.split(","))
