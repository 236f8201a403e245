"""The studies that are shipped: W&B takes them, every command they produce is understood, and runs."""

import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight import algorithms as fedlight_algorithms
from fedlight.cli.command import FederatedCLI
from fedlight.cli.command import main as fedlight
from fedlight.report.command import main as report
from fedlight.report.naming import Method
from fedlight.studies.command import main as run_study
from fedlight.studies.command import selected
from fedlight.studies.plan import command, plan
from fedlight.studies.study import Distribution, load_study
from tests.studies.helpers import read, write_study

REPOSITORY = Path(__file__).parents[2]
SWEEPS = sorted((REPOSITORY / "sweeps").glob("*.yaml"))
LOCAL = [path for path in SWEEPS if yaml.safe_load(path.read_text())["method"] != "bayes"]
DIGITS = [path for path in LOCAL if "--config=configs/quickstart.yaml" in path.read_text()]
PAPER = [path for path in LOCAL if path.stem.startswith("paper_")]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


class Parsed(FederatedCLI):
    """Understands a command line and runs nothing."""

    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture(scope="module")
def parser():
    return Parsed(["fit", "-c", str(REPOSITORY / "configs" / "quickstart.yaml")]).parser


def arguments(study, run) -> list[str]:
    """A run's command behind ``python -m fedlight``."""
    return command(study, run, Path("runs"), resume=False)[3:]


def names(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", SWEEPS, ids=names)
def test_wandbs_own_package_takes_it(path):
    config = yaml.safe_load(path.read_text())
    assert config["name"] == path.stem
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "pip install --no-deps sweeps jsonref; pip install jsonschema"
        sweeps = pytest.importorskip("sweeps", reason=f"wandb's sweep schema is not here: {reason}")
    from sweeps.config import schema_violations_from_proposed_config

    assert schema_violations_from_proposed_config(config) == []
    if config["method"] == "grid":
        study = load_study(path)
        theirs = sweeps.next_runs(config, [], n=len(plan(study)) + 1)
        ours = [{key: {"value": value} for key, value in run.parameters.items()} for run in plan(study)]
        assert [run.config for run in theirs if run is not None] == ours


def test_bayes_is_left_to_wandb(capsys):
    with pytest.raises(MisconfigurationException, match="start it with `wandb sweep`"):
        load_study(REPOSITORY / "sweeps" / "feddyn_man_bayes.yaml")


def test_what_bayes_draws_is_understood(parser):
    content = yaml.safe_load((REPOSITORY / "sweeps" / "feddyn_man_bayes.yaml").read_text())
    drawn = {key: Distribution.of(spec, key) for key, spec in sorted(content["parameters"].items())}
    flags = [f"--{k}={d.settings.get('value', d.settings.get('min'))}" for k, d in drawn.items()]
    config = parser.parse_args([*content["command"][1:-1], *flags]).fit
    assert config.algorithm.init_args.alpha == 0.001
    assert config.trainer.callbacks[0].init_args.zeta == 0.05
    assert content["early_terminate"]["type"] == "hyperband"


METHODS = ["fedavg", "fedsam", "feddyn", "feddc", "fedspeed"]
PARTITIONS = ["dirichlet03", "dirichlet06", "iid"]


@pytest.mark.parametrize("path", PAPER, ids=names)
def test_the_papers_cells_are_composed(path, parser):
    study = load_study(path)
    cells = {(cell_of(run), run.parameters["seed_everything"]): run for run in plan(study)}
    wanted = [(m, d, man) for m in METHODS for d in PARTITIONS for man in (False, True)]
    assert set(cells) == {(cell, seed) for cell in wanted for seed in (0, 1, 2)}
    # Every method with and without MAN, on the partitions in turn: every part of every cell.
    for index, (method, man) in enumerate((m, man) for m in METHODS for man in (False, True)):
        cell = method, PARTITIONS[index % 3], man
        check_cell(parser.parse_args(arguments(study, cells[cell, 0])).fit.as_dict(), cell, "cifar" in path.stem)


def cell_of(run) -> tuple[str, str, bool]:
    given = run.parameters
    return Path(given["algorithm"]).stem, Path(given["data"]).stem.split("_")[1], len(given["trainer.callbacks"]) > 1


def check_cell(config, cell, is_cifar) -> None:
    """The setting of the paper, as its section on experiments has it."""
    method, partition, man = cell
    trainer, data, algorithm = config["trainer"], config["data"]["init_args"], config["algorithm"]
    callbacks = [{k: c[k] for k in ("class_path", "init_args")} for c in trainer["callbacks"]]
    name = Method({"algorithm.class_path": algorithm["class_path"], "trainer.callbacks": callbacks}).name
    assert name.lower() == method + ("+man" if man else "")
    assert [c["init_args"]["zeta"] for c in callbacks if "zeta" in c["init_args"]] == [0.15 if is_cifar else 0.1] * man
    delta = {"dirichlet03": 0.3, "dirichlet06": 0.6, "iid": None}[partition]
    assert (data["partitioner"].get("init_args") or {}).get("alpha") == delta
    assert (data["num_clients"], data["batch_size"]) == (100, 50)
    assert (trainer["max_rounds"], trainer["local_epochs"], trainer["clients_per_round"]) == (500, 5, 0.1)
    assert trainer["gradient_clip_val"] == 10
    assert trainer["sampler"]["class_path"].endswith("Bernoulli")
    optimizer = config["model"]["init_args"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"], optimizer["momentum"]) == (0.1, 0.001, 0)
    assert config["model"]["init_args"]["lr_scheduler"]["init_args"]["gamma"] == 0.998
    hyperparameters = {"fedsam": {"rho": 0.05}, "feddyn": {"alpha": 0.01}, "feddc": {"alpha": 0.01}}
    hyperparameters["fedspeed"] = {"alpha": 0.01, "rho": 0.01}
    for key, value in hyperparameters.get(method, {}).items():
        assert algorithm["init_args"][key] == value


@pytest.mark.parametrize("path", DIGITS, ids=names)
def test_the_commands_are_understood_and_the_last_one_runs(path, parser):
    study = load_study(path)
    runs = plan(study)
    parser.parse_args(arguments(study, runs[0]))
    fedlight([*arguments(study, runs[-1]), "--trainer.fast_dev_run=true"])


@pytest.mark.parametrize("path", PAPER, ids=names)
def test_a_cell_of_the_paper_runs_on_images_of_that_shape(path, tmp_path):
    size, classes = (32, 100) if "cifar" in path.stem else (64, 200)
    rng = np.random.default_rng(0)
    counts = {"train": 400, "test": 20}
    arrays = {f"x_{part}": rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8) for part, n in counts.items()}
    labels = {f"y_{part}": np.arange(n) * 7 % classes for part, n in counts.items()}
    np.savez(tmp_path / "images.npz", **arrays, **labels)
    study = load_study(path)
    ours = [f"--data.source={tmp_path / 'images.npz'}", "--data.num_clients=4", "--data.batch_size=4"]
    ours += ["--data.download=false", "--trainer.callbacks=MAN", "--trainer.fast_dev_run=true"]  # a Hessian takes long
    fedlight([*arguments(study, plan(study)[-1]), *ours])


def test_a_parameter_that_does_not_exist_fails_fast_with_the_nearest_key(capsys):
    with pytest.raises(SystemExit) as stop:
        fedlight(["fit", "-c", "configs/quickstart.yaml", "--trainer.max_ruonds=3"])
    assert stop.value.code == 2
    assert re.search(r"did you mean .*trainer\.max_rounds", capsys.readouterr().err)


def test_only_some_runs(tmp_path):
    man = [{"class_path": "MAN"}]
    _, runs = read(write_study(tmp_path, {"a": [1, 2], "b": ["x.yaml", "y.yaml"], "c": [None, man]}))
    assert [r.parameters["b"] for r in selected(runs, ["a=2", "c=null"])] == ["x.yaml", "y.yaml"]
    assert [r.parameters["a"] for r in selected(runs, ["b=y.yaml", "c=[{class_path: MAN}]"])] == [1, 2]
    with pytest.raises(MisconfigurationException, match="'aa' is no parameter of this study; did you mean 'a'"):
        selected(runs, ["aa=1"])
    with pytest.raises(MisconfigurationException, match="There is no run with a=3"):
        selected(runs, ["a=3"])


def test_dry_run_prints_commands(capsys):
    assert run_study(["sweeps/digits.yaml", "--dry-run", "--only", "seed_everything=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("fedlight fit --config=configs/quickstart.yaml" in line and "wandb" not in line for line in lines)


def test_a_tilde_behind_an_equals_sign_is_the_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile("sweeps/digits.yaml", tmp_path / "digits.yaml")
    assert run_study(["~/digits.yaml", "--root=~/runs", "--dry-run"]) == 0
    assert f"--trainer.default_root_dir={tmp_path}/runs/digits" in capsys.readouterr().out
    with pytest.raises(MisconfigurationException, match=f"There is no folder {tmp_path}/none"):
        report(["~/none", "--output=~/report"])


def test_bad_studies_end_with_2_and_a_message(tmp_path, capsys):
    path = write_study(tmp_path, {"a": [1]}, methd="grid")
    with pytest.raises(SystemExit) as stop:
        fedlight(["study", str(path)])
    assert stop.value.code == 2
    assert "`methd` is not known; did you mean 'method'" in capsys.readouterr().err


LITE = [path for path in LOCAL if path.stem.startswith("lite")]


def algorithms_of(path: Path) -> dict[str, list[dict]]:
    """Settings of each algorithm in a study, by its name."""
    found: dict[str, list[dict]] = {}
    for value in yaml.safe_load(path.read_text())["parameters"]["algorithm"]["values"]:
        found.setdefault(value["class_path"], []).append(value["init_args"])
    return found


def test_every_method_of_the_lite_table_is_searched_for_with_the_same_budget():
    searched = algorithms_of(REPOSITORY / "sweeps" / "lite_tuning.yaml")
    table = algorithms_of(REPOSITORY / "sweeps" / "lite.yaml")
    assert {name: len(settings) for name, settings in searched.items()} == dict.fromkeys(table.keys() - {"FedAvg"}, 6)
    for name in ("lr", "zeta"):
        assert len(plan(load_study(REPOSITORY / "sweeps" / f"lite_{name}.yaml"))) == 6
    assert all(len(settings) == 1 for settings in table.values())
    assert algorithms_of(REPOSITORY / "sweeps" / "lite_pacs.yaml").items() <= table.items()


@pytest.mark.parametrize("path", LITE, ids=names)
def test_the_lite_commands_are_understood(path, parser):
    study = load_study(path)
    runs = plan(study)
    seeds = {run.parameters["seed_everything"] for run in runs}
    assert seeds == ({0} if "val_fraction" in path.read_text() else {1, 2, 3}), "tuned on other seeds than reported"
    for value in (run.parameters["algorithm"] for run in runs if "algorithm" in run.parameters):
        getattr(fedlight_algorithms, value["class_path"])(**value["init_args"])
    parser.parse_args(arguments(study, runs[-1]))
