"""Every YAML in configs/ is parsed, printed, parsed again and trained with for a round; new ones are found."""

import json
import sys
import tomllib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser

from fedlight.algorithms import Algorithm
from fedlight.cli.command import FederatedCLI, main
from fedlight.cli.configs import shipped
from fedlight.cli.light import light
from fedlight.perturbations import Perturbation
from fedlight.run.loggers import read_metrics

CONFIGS = Path(__file__).parents[1] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))

# Shape and classes of the images that a config is for, by a word in its name; the digits for all others.
IMAGES = {
    "lite/cifar20": ((16, 16, 3), 20),
    "lite/pacs": ((16, 16, 3), 7),
    "tinyimagenet": ((64, 64, 3), 200),
    "pacs": ((64, 64, 3), 7),
    "cifar100": ((32, 32, 3), 100),
    "resnet18gn": ((8, 8, 3), 100),  # it takes any size
    "cifar10": ((32, 32, 3), 10),
    "small_cnn": ((32, 32, 3), 10),
    "fashion": ((28, 28), 10),
    "lenet": ((28, 28), 10),
    "femnist": ((28, 28), 62),
    "inaturalist": ((64, 64, 3), 10),
    "camelyon17": ((96, 96, 3), 2),
}
QUICK = [
    "--trainer.max_rounds=1", "--trainer.clients_per_round=2", "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1", "--trainer.client_val_every_n_rounds=0", "--trainer.accelerator=cpu",
    "--trainer.devices=1", "--trainer.enable_progress_bar=false", "--data.num_clients=8",
]  # fmt: skip


def images_for(name, folder):
    """The arguments that replace a config's data by a few random images of its shape."""
    if name.startswith("text/"):
        rows = [{"text": f"mail {i}", "label": "ab"[i % 2], "client": str(i % 8)} for i in range(80)]
        (folder / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return [f"--data.source={folder / 'texts.jsonl'}", "--data.min_samples=1"]
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
        replaced += [
            "--data.image_size=null",
            "--data.test_domains=null",
            "--data.columns=null",
            inputs,
            f"--model.num_classes={classes}",
        ]
    else:
        replaced += ["--data.partitioner=IID"]
    return replaced


def arguments(name, folder):
    part, path = name.split("/")[0], str(CONFIGS / name)
    keys = {"logger": "trainer.logger", "model": "model", "data": "data"}
    keys |= {"algorithm": "algorithm", "perturbation": "perturbation", "transforms": "trainer.transforms"}
    keys |= {"aggregator": "trainer.aggregator", "analysis": "trainer.callbacks+", "callbacks": "trainer.callbacks+"}
    keys["personal"] = "trainer.personal"
    chosen = ["-c", str(QUICKSTART), f"--{keys[part]}={path}"] if part in keys else ["-c", path]
    where = [f"--trainer.default_root_dir={folder}", "--trainer.name=run"]
    all_of_them = ["--trainer.clients_per_round=8"] * (part == "aggregator")
    evaluated = ["--trainer.client_val_every_n_rounds=1"] * (name == "personal/fine_tune.yaml")
    optimizer = {"algorithm/fedadamw.yaml": "AdamW", "algorithm/fedmuon.yaml": "fedlight.algorithms.fedmuon.Muon"}
    stepping = [f"--model.optimizer={optimizer[name]}"] if name in optimizer else []  # which its comment asks for
    return [*chosen, *stepping, *images_for(name, folder), *QUICK, *all_of_them, *where, *evaluated]


def is_slow(name):
    """Whether others of its kind train as it does: contracts train with every algorithm and perturbation."""
    kept = ("algorithm/feddyn.yaml", "algorithm/fedlesam_d.yaml", "perturbation/sam.yaml")
    others = name.startswith(("algorithm/", "perturbation/", "aggregator/")) and name not in kept
    large = "tinyimagenet" in name or name == "model/resnet18gn.yaml"
    alike = ("lite/pacs.yaml", "data/cifar100_iid.yaml", "data/cifar100_dirichlet06.yaml", "model/cifar100_cnn.yaml")
    alike += tuple(f"transforms/{n}.yaml" for n in ("sign_flip", "gaussian_attack", "alie", "quantize", "clip_update"))
    alike += ("personal/fedbabu.yaml", "personal/fedper.yaml", "personal/lg_fedavg.yaml")
    alike += ("data/femnist.yaml", "data/inaturalist.yaml", "data/camelyon17.yaml")
    alike += ("text/shakespeare.yaml", "text/spam.yaml")
    alike += tuple(f"personal/{n}.yaml" for n in ("ditto", "local_only", "pfedme", "per_fedavg"))
    return others or large or name in (*alike, "analysis/landscape.yaml", "logger/wandb.yaml")


@pytest.mark.parametrize(("part", "base"), [("algorithm", Algorithm), ("perturbation", Perturbation)])
def test_every_algorithm_and_perturbation_is_read(part, base):
    parser = ArgumentParser()
    parser.add_subclass_arguments(base, part)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.53
    for path in (CONFIGS / part).glob("*.yaml"):
        made = instantiate(parser.parse_args([f"--{part}={path}"]))[part]
        assert isinstance(made, base)
        assert type(made).__name__.lower().replace("_", "") == path.stem.replace("_", "")


def test_what_is_trained_with_elsewhere_is_read(tmp_path):
    parser = parser_of_fit()
    for name in FILES:
        if is_slow(name) and not name.startswith(("algorithm/", "perturbation/")):
            assert parser.parse_args(arguments(name, tmp_path)).trainer.max_rounds == 1, name


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * is_slow(n)) for n in FILES])
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


def test_a_run_names_its_parts_and_a_file_of_that_name_wins(tmp_path, monkeypatch):
    """As on the command line, so in a configuration, wherever it lies."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "below").mkdir()
    text = (
        "model: digits_mlp\ndata: data/digits\nalgorithm: feddyn\ntrainer: {transforms: top_k, callbacks: [hessian]}\n"
    )
    (tmp_path / "below" / "mine.yaml").write_text(text)
    parser = parser_of_fit()
    found = parser.parse_args(["-c", "below/mine.yaml", "--algorithm=feddyn", "--algorithm.alpha=0.5"])
    assert found.algorithm.class_path == "fedlight.algorithms.FedDyn"
    assert found.algorithm.init_args.alpha == 0.5
    assert found.data.init_args.num_clients == 20
    assert found.model.init_args.net.class_path == "fedlight.models.MLP"
    assert [c.class_path for c in found.trainer.callbacks] == ["fedlight.HessianSpectrum"]
    assert parser.parse_args(["-c", "quickstart", "--algorithm", "FedDyn"]).algorithm.class_path.endswith("FedDyn")
    added = parser.parse_args(["-c", "quickstart", "--trainer.callbacks+=client_metrics"]).trainer.callbacks
    assert [c.class_path for c in added] == ["fedlight.MAN", "fedlight.callbacks.ClientMetrics"]
    (tmp_path / "below" / "feddyn").write_text("{class_path: FedProx, init_args: {mu: 0.25}}")
    assert parser.parse_args(["-c", "below/mine.yaml"]).algorithm.init_args.mu == 0.25


@pytest.mark.parametrize("name", ["quickstart", "paper/cifar100", "paper/tinyimagenet"])
def test_whole_configs_are_known_by_name_and_go_on_working_elsewhere(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert light(["configs", name]) == 0
    Path("mine.yaml").write_text(capsys.readouterr().out)
    assert Path("mine.yaml").read_text() == (CONFIGS / f"{name}.yaml").read_text()
    parser = parser_of_fit()
    assert parser.parse_args(["-c", "mine.yaml"]).data == parser.parse_args(["-c", name]).data


@lru_cache
def parser_of_fit():
    return FederatedCLI(["-c", str(QUICKSTART)], run=False).parser


@pytest.mark.parametrize("given", [["--algorithm=FedSWA"], ["--algorithm=FedSWA", "--algorithm.rho=0.2"]])
def test_another_algorithm_has_its_own_defaults(given):
    """``server_lr`` is 1 of FedAvg, which is the default, and 1.5 of FedSWA."""
    assert parser_of_fit().parse_args(["-c", str(QUICKSTART), *given]).algorithm.init_args.server_lr == 1.5


def test_a_method_takes_no_settings_over_from_another():
    """jsonargparse keeps those of the same names; of optimizers they are kept."""
    parse = parser_of_fit().parse_args
    given = ["-c", str(CONFIGS / "lite" / "cifar20.yaml")]  # FedAvg with its server_lr of 1
    sam = ["--perturbation=SAM", "--perturbation.rho=0.3"]
    found = parse([*given, "--algorithm=FedAdam", *sam, "--perturbation=ASAM"])
    assert (found.algorithm.init_args.server_lr, found.perturbation.init_args.rho) == (0.01, 0.5)
    same = parse([*given, "--algorithm.server_lr=0.7", "--algorithm=fedlight.algorithms.FedAvg"])
    assert same.algorithm.init_args.server_lr == 0.7
    assert parse([*given, "--model.optimizer=AdamW"]).model.init_args.optimizer.init_args.lr == 0.2


def test_the_list_has_every_config_and_what_it_is(capsys):
    assert light(["configs"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert lines[0].startswith("quickstart ")
    names, about = zip(*(line.split(None, 1) for line in lines), strict=True)
    assert sorted(f"{name}.yaml" for name in names) == FILES
    assert all(line[0].isupper() or line[0].isdigit() or line.startswith("clients.csv") for line in about)
    assert not [line for line in about if line.endswith(",")]
    assert light(["configs", "perturbation/", "--help"]) == 0
    assert capsys.readouterr().out.startswith("perturbation/asam  ")


@pytest.mark.parametrize(
    ("name", "near"),
    [("quikstart", "'quickstart'"), ("cifar100", "'paper/cifar100'"), ("configs/quickstart.yaml", "'quickstart'")],
)
def test_a_name_that_no_config_has_gets_the_nearest(name, near, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert light(["configs", name]) == 2
    assert f"{name!r} is no packaged configuration; did you mean {near}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", name])
    assert stop.value.code == 2
    assert f"did you mean {near}" in capsys.readouterr().err


def test_the_wheel_holds_what_is_found_beside_the_package_here():
    wheel = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    names = "cases", "fitted", "networks", "newer_twins", "twins"
    twins = {f"tests/algorithms/{n}.py": f"fedlight/twins/{n}.py" for n in names}
    assert wheel["force-include"] == {kind: f"fedlight/{kind}" for kind in ("configs", "templates")} | twins
    assert shipped("configs") == CONFIGS
