"""Every YAML in configs/ is parsed, printed, parsed again and trained with for a round; new ones are found."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedlight.cli.command import FederatedCLI
from fedlight.run.loggers import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))

# Shape and classes of the images that a config is for, by a word in its name; the digits for all others.
IMAGES = {
    "tinyimagenet": ((64, 64, 3), 200),
    "pacs": ((64, 64, 3), 7),
    "cifar100": ((32, 32, 3), 100),
    "resnet18gn": ((8, 8, 3), 100),  # it takes any size
    "cifar10": ((32, 32, 3), 10),
    "small_cnn": ((32, 32, 3), 10),
    "fashion": ((28, 28), 10),
    "lenet": ((28, 28), 10),
}
QUICK = [
    "--trainer.max_rounds=1", "--trainer.clients_per_round=2", "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1", "--trainer.client_val_every_n_rounds=0", "--trainer.accelerator=cpu",
    "--trainer.devices=1", "--trainer.enable_progress_bar=false", "--data.num_clients=8",
]  # fmt: skip


def images_for(name, folder):
    """The arguments that replace a config's data by a few random images of its shape."""
    found = next((value for word, value in IMAGES.items() if word in name), None)
    if found is None:
        return []
    shape, classes = found
    rng = np.random.default_rng(0)
    arrays = {"group_train": np.repeat(np.arange(4), 20)}
    for split, n in (("train", 80), ("test", 20)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(n) % classes
    np.savez(folder / "images.npz", **arrays)
    replaced = [f"--data.source={folder / 'images.npz'}", "--data.normalize=auto"]
    replaced += ["--data.batch_size=4", "--data.eval_batch_size=4"]
    if name.startswith("data/"):  # the quickstart's network, for these images
        inputs = f"--model.net.in_features={int(np.prod(shape))}"
        replaced += ["--data.image_size=null", "--data.test_domains=null", inputs, f"--model.num_classes={classes}"]
    else:
        replaced += ["--data.partitioner=IID"]
    return replaced


def arguments(name, folder):
    part, path = name.split("/")[0], str(CONFIGS / name)
    keys = {"logger": "trainer.logger", "model": "model", "data": "data"}
    keys |= {"algorithm": "algorithm", "perturbation": "perturbation", "transforms": "trainer.transforms"}
    keys |= {"analysis": "trainer.callbacks+", "callbacks": "trainer.callbacks+"}
    chosen = ["-c", str(QUICKSTART), f"--{keys[part]}={path}"] if part in keys else ["-c", path]
    return [*chosen, *images_for(name, folder), *QUICK, f"--trainer.default_root_dir={folder}", "--trainer.name=run"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore:.*FedBN")  # the quickstart's network has no BatchNorm
@pytest.mark.filterwarnings("ignore:.*num_batches|.*does not have many workers")
def test_every_config_runs(name, tmp_path, monkeypatch, request):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    request.addfinalizer(lambda: "wandb" in sys.modules and sys.modules["wandb"].teardown())
    cli = FederatedCLI(["fit", *arguments(name, tmp_path)])
    folder = tmp_path / "run" / "version_0"
    (row,) = read_metrics(folder / "metrics.csv")
    assert row["train/loss"] > 0
    printed = (folder / "config.yaml").read_text()
    again = cli.parser.parse_args(["fit", "-c", str(folder / "config.yaml")])
    assert yaml.safe_load(cli._parser("fit").dump(again.fit, skip_none=False)) == yaml.safe_load(printed)


def test_there_are_configs():
    parts = {name.split("/")[0] for name in FILES}
    assert {"quickstart.yaml", "paper", "algorithm", "perturbation", "model", "data", "logger"} <= parts
