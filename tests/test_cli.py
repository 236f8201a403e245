"""The command line: composing a run, evaluating it, and what it says about what it cannot read."""

import csv
import gc
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import fedlight.__main__
import fedlight.cli.command
from fedlight.cli.command import FederatedCLI, main
from tests.helpers.tiny import Clients, Regression, quiet_trainer, weights

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = ["--model=tests.helpers.tiny.Regression", "--data=tests.helpers.tiny.Clients", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.clients_per_round=2", "--trainer.max_rounds=2"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fails(capsys, *args):
    """The exit code and the error output of a command that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    return stop.value.code, capsys.readouterr().err


def printed(capsys, *args):
    """The configuration that ``--print_config`` gives."""
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_a_run_leaves_a_config_that_runs_it_again(tmp_path):
    main(["fit", *TINY, *QUIET, "--model.lr=0.07", "--seed_everything=5", "--algorithm=FedProx", "--algorithm.mu=0.3"])
    run = Path("runs/default/version_0")
    expected = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["algorithm"] == {"class_path": "fedlight.FedProx", "init_args": {"mu": 0.3, "server_lr": 1.0}}
    assert config["trainer"]["limit_train_batches"] is None
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    main(["fit", "-c", str(tmp_path / run / "config.yaml")])
    again = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(again[k], v) for k, v in expected.items())
    model = Regression(lr=0.07)
    from fedlight.algorithms import FedProx

    quiet_trainer(tmp_path, max_rounds=2, seed=5, algorithm=FedProx(0.3)).fit(model, Clients())
    assert torch.equal(weights(model), torch.cat([again["net.weight"][0], again["net.bias"]]))


def test_printed_configs_are_read_again(capsys):
    first = printed(capsys, "fit", "-c", str(CONFIGS / "quickstart.yaml"), "--trainer.callbacks.zeta=0.3")
    Path("printed.yaml").write_text(first)
    assert printed(capsys, "fit", "-c", "printed.yaml") == first
    assert yaml.safe_load(first)["trainer"]["callbacks"][0]["init_args"]["zeta"] == 0.3


def test_configs_are_read_in_order_and_arguments_win(capsys):
    Path("a.yaml").write_text("trainer: {max_rounds: 7, local_epochs: 3}\n")
    Path("b.yaml").write_text("trainer: {max_rounds: 9}\nperturbation: {class_path: SAM, init_args: {rho: 0.2}}\n")
    quickstart = ["-c", str(CONFIGS / "quickstart.yaml")]
    found = yaml.safe_load(printed(capsys, "fit", *quickstart, "-c", "a.yaml", "-c", "b.yaml", "--trainer.name=mine"))
    assert (found["trainer"]["max_rounds"], found["trainer"]["local_epochs"], found["trainer"]["name"]) == (
        9,
        3,
        "mine",
    )
    assert found["perturbation"] == {"class_path": "fedlight.perturbations.SAM", "init_args": {"rho": 0.2}}
    assert found["model"]["init_args"]["net"]["init_args"]["hidden"] == [128, 64]


def test_parts_are_yaml_paths_relative_to_the_file_that_names_them(capsys):
    """``configs/paper/cifar100.yaml`` says ``../model/...``, and the command is run from somewhere else."""
    found = yaml.safe_load(printed(capsys, "fit", "-c", str(CONFIGS / "paper" / "cifar100.yaml")))
    assert found["model"]["init_args"]["net"]["class_path"].endswith("CifarCNN")
    assert found["data"]["init_args"]["partitioner"]["init_args"]["alpha"] == 0.3
    dyn, iid = str(CONFIGS / "algorithm" / "feddyn.yaml"), str(CONFIGS / "data" / "cifar100_iid.yaml")
    given = [
        "--algorithm",
        dyn,
        f"--data={iid}",
        "--algorithm.alpha=0.5",
        "--perturbation=SAM",
        "--perturbation.rho=0.1",
    ]
    found = yaml.safe_load(printed(capsys, "fit", "-c", str(CONFIGS / "paper" / "cifar100.yaml"), *given))
    assert found["algorithm"]["class_path"] == "fedlight.algorithms.FedDyn"
    assert found["algorithm"]["init_args"]["alpha"] == 0.5
    assert found["data"]["init_args"]["partitioner"]["class_path"].endswith("IID")
    assert found["perturbation"]["init_args"]["rho"] == 0.1


def test_callbacks_are_added_and_taken_away(capsys):
    base = ["fit", "-c", str(CONFIGS / "quickstart.yaml")]
    added = yaml.safe_load(
        printed(capsys, *base, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss")
    )
    assert [c["class_path"].rsplit(".", 1)[1] for c in added["trainer"]["callbacks"]] == ["MAN", "EarlyStopping"]
    assert added["trainer"]["callbacks"][1]["init_args"]["monitor"] == "val/loss"
    plain = ["fit", *TINY, "--trainer.callbacks+=MAN", "--trainer.callbacks.zeta=0.2"]
    assert yaml.safe_load(printed(capsys, *plain))["trainer"]["callbacks"][0]["init_args"]["zeta"] == 0.2
    assert yaml.safe_load(printed(capsys, *base, "--trainer.callbacks=null"))["trainer"]["callbacks"] is None


def test_a_list_that_takes_the_place_of_a_configurations_is_said(caplog):
    Path("a.yaml").write_text("trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]}\n")
    for given, lost in ((["--trainer.callbacks=ModelSummary"], True), (["--trainer.callbacks+=ModelSummary"], False)):
        main(["fit", *TINY, *QUIET, "-c", "a.yaml", "--trainer.fast_dev_run=true", *given])
        said = "trainer.callbacks: a later list took the place of one with EarlyStopping; `callbacks+` adds to it."
        assert (said in caplog.messages) is lost
        caplog.clear()


def test_checkpoints_are_named_last_best_or_by_their_file(capsys):
    main(["fit", *TINY, *QUIET])
    main(["fit", *TINY, *QUIET, "--trainer.max_rounds=4", "--ckpt_path=last"])
    run = Path("runs/default/version_0")
    assert not Path("runs/default/version_1").exists()
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["round"] for row in rows] == ["0", "1", "2", "3"]
    assert json.loads((run / "summary.json").read_text())["rounds"] == 4
    capsys.readouterr()
    found = {}
    for name in ("last", "best", str(run / "checkpoints" / "best.ckpt")):
        main(["test", *TINY, f"--ckpt_path={name}"])
        found[name] = capsys.readouterr().out
    assert found["best"] == found[str(run / "checkpoints" / "best.ckpt")]
    assert float(found["last"].split()[1]) == pytest.approx(float(rows[-1]["val/loss"]), abs=1e-4)
    assert found["last"].split()[::2] == ["test/loss", "test/loss_selected", "test/loss_all"]
    main(["validate", *TINY, "--ckpt_path=last"])
    assert capsys.readouterr().out.startswith("val/loss ")
    assert sorted(p.name for p in Path("runs/default").iterdir()) == ["version_0"]


def test_the_command_is_installed_and_runs_as_a_module():
    from importlib.metadata import PackageNotFoundError, entry_points

    scripts = [e for e in entry_points(group="console_scripts") if e.name == "fedlight"]
    assert all(script.value == "fedlight.__main__:main" for script in scripts)
    assert Path(fedlight.__file__).with_name("__main__.py").exists()
    assert issubclass(PackageNotFoundError, ImportError)


NET = """
import json, pathlib, random
from tests.helpers.tiny import Regression

class Net(Regression):
    def setup(self, stage):
        assert random.random() < 1
        pathlib.Path("seen.json").write_text(json.dumps([__name__, stage]))
"""


@pytest.mark.slow
def test_a_module_in_the_current_folder_is_found_by_the_console_script(tmp_path):
    """What stands there besides, as W&B's folder and a file of an unlucky name, replaces nothing of the program's."""
    (tmp_path / "my_module.py").write_text(NET)
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    (tmp_path / "wandb").mkdir()
    script = tmp_path / "bin" / "fedlight"  # what pip installs: sys.path begins with its own folder
    script.parent.mkdir()
    script.write_text("import sys\nfrom fedlight.__main__ import main\nsys.exit(main())\n")
    settings = ["--model=my_module.Net", *TINY[1:], *QUIET, "--trainer.max_rounds=1"]
    ended = subprocess.run(
        [sys.executable, script, "fit", *settings],
        env={
            **os.environ,
            "PYTHONPATH": str(CONFIGS.parent),
        },  # an empty entry would be the folder
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "seen.json").read_text()) == ["my_module", "fit"]


@pytest.mark.parametrize("safe", [False, True])
def test_the_current_folder_comes_first_as_with_python_m_unless_that_is_forbidden(tmp_path, monkeypatch, safe):
    found = []
    monkeypatch.setattr(fedlight.cli.command, "main", lambda: found.append(sys.path[0]))
    monkeypatch.setattr(sys, "path", ["the script's folder", *sys.path])
    monkeypatch.setattr(sys, "flags", SimpleNamespace(safe_path=safe))
    fedlight.__main__._run()
    gc.unfreeze()
    assert found == ["the script's folder" if safe else str(tmp_path)]


def test_what_may_not_be_read_is_named_in_a_line(monkeypatch, capsys):
    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "runs/a")

    monkeypatch.setattr(fedlight.cli.command, "FederatedCLI", forbidden)
    with pytest.raises(SystemExit) as stop:
        main(["fit"])
    assert (stop.value.code, capsys.readouterr().err) == (
        2,
        "fedlight: error: [Errno 13] Permission denied: 'runs/a'\n",
    )


def test_ctrl_c_while_modules_are_loaded_ends_quietly(monkeypatch):
    handlers = []

    @contextmanager
    def loading():
        handlers.append(signal.getsignal(signal.SIGINT))
        yield

    monkeypatch.setattr(fedlight.__main__, "loading", loading)
    monkeypatch.setattr(fedlight.cli.command, "main", lambda: handlers.append(signal.getsignal(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    fedlight.__main__._run()
    gc.unfreeze()
    signal.signal(signal.SIGINT, before)
    assert handlers == [signal.SIG_DFL, signal.default_int_handler]  # an exception may be lost in what is imported


def test_help_names_every_key_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--trainer.max_rounds", "communication rounds", "--algorithm", "--perturbation", "--ckpt_path"):
        assert words in text
    with pytest.raises(SystemExit):
        main(["fit", "--algorithm.help", "FedDyn"])
    assert "--algorithm.alpha" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("algorithm", "FedDyn A dynamic regulariser aligns"),
        ("trainer.callbacks", "EarlyStopping "),
        ("data.partitioner", "IID "),
        ("model.optimizer", "SGD "),
    ],
)
def test_what_there_is_for_a_key_is_listed_a_line_each(capsys, monkeypatch, key, line):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *TINY, f"--{key}.help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [found for found in lines if f"{' '.join(found.split())} ".startswith(line)]
    assert all(len(found) <= 90 and ":class:" not in found for found in lines)
    assert lines[-1].startswith(f"The arguments of one: --{key}.help ")


def test_the_help_of_a_class_fits_on_a_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "Classifier"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 60  # of 736
    assert re.search(r"fedlight\.models\.MLP,.*and\s+others\)", text, re.DOTALL)
    assert "torch.nn.Identity" not in text


class Configured(Regression):
    """Takes a dict, in which names may be those of YAML's classes."""

    def __init__(self, config: dict, lr: float = 0.1):
        super().__init__()
        self.config = config


def test_a_dict_of_ones_own_may_have_keys_beside_class_path():
    Path("own.yaml").write_text(
        "model: {class_path: tests.test_cli.Configured, init_args: {config: {class_path: labels.txt, at: 08, lr: 3}}}"
    )
    config = FederatedCLI([TINY[1], "--config=own.yaml"], run=False).model.config
    assert config == {"class_path": "labels.txt", "at": "08", "lr": 3}


def test_keys_for_anchors_are_left_out_and_short_names_are_of_this_package(capsys):
    """``MLP`` is also a class of torchvision's, ``Checkpoint`` one of Lightning's."""
    lines = ["_net: &net {class_path: MLP, init_args: {in_features: 4}}", ".seed: &seed 7", "seed_everything: *seed"]
    lines += ["model: {class_path: Classifier, init_args: {num_classes: 3, net: *net}}"]
    Path("anchors.yaml").write_text("\n".join([*lines, "trainer: {callbacks: [Checkpoint]}"]))
    config = yaml.safe_load(printed(capsys, "fit", "-c", "anchors.yaml", TINY[1]))
    assert config["seed_everything"] == 7
    assert config["model"]["init_args"]["net"]["class_path"] == "fedlight.models.MLP"
    assert config["trainer"]["callbacks"][0]["class_path"] == "fedlight.Checkpoint"
    assert not {"_net", ".seed"} & config.keys()


def test_the_program_is_called_fedlight(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fedlight/__main__.py"])
    assert "run: fedlight fit --help" in fails(capsys, "fit", "--nothing")[1]


BAD = {
    "trainer: {max_round: 3}": "'trainer.max_round' is not known; did you mean 'trainer.max_rounds'?",
    "algoritm: {class_path: FedAvg}": "'algoritm.class_path' is not known; did you mean 'algorithm'?",
    "algorithm: {class_path: FedDny}": "'FedDny' is not known; did you mean 'FedDyn'?",
    "algorithm: {class_path: FedProx, init_args: {muu: 1}}": "'muu' is not known; did you mean 'mu'?",
    "perturbation: SAMM": "'SAMM' is not known; did you mean 'SAM'",
    "trainer: {callbacks: [{class_path: MANN}]}": "'MANN' is not known; did you mean 'MAN'?",
    "trainer: {callbacks: [{class_path: MAN, init_args: {zetta: 1}}]}": "'zetta' is not known; did you mean 'zeta'?",
    "trainer: {sampler: Bernouli}": "'Bernouli' is not known; did you mean 'Bernoulli'?",
    "trainer: {max_epochs: 3}": "'trainer.max_epochs' is not known; did you mean 'trainer.max_rounds'?",
    "optimizer: {class_path: SGD, init_args: {lr: 1}}": "did you mean 'model.optimizer",
    "perturbation: FedSAM": "'FedSAM' belongs under another key: --algorithm FedSAM",
    "algorithm: {class_path: FedDyn, init_args: {alfa: 0.1}}": "FedDyn takes alpha",
    "data: {class_path: ImageData, init_args: {colour: 2}}": "ImageData takes source, num_clients, partitioner",
    "model: {class_path: Classifier, init_args: {lr: 1}}": "'lr' is the optimizer's; did you mean 'optimizer.lr'?",
    "trainer: {max_rounds: many}": "Parser key \"trainer.max_rounds\": Expected a <class 'int'>. Got value: many",
    "data: {class_path: ImageData, init_args: {partitioner: Dirichlet}}": "did you mean 'DirichletClients'",
    "data: {class_path: ImageData, init_args: {num_client: 3}}": "did you mean 'num_clients'?",
    "model: {class_path: Classifier, init_args: {num_classes: 2, net: fedlight.models.MPL}}": "'fedlight.models.MLP'?",
    "model: {class_path: my_model.Net}": "my_model",
    "algorithm: missing.yaml": "missing.yaml",
    "trainer:\n  max_rounds: 3\ndata: {seed: 1}\ntrainer:\n  seed: 1": "bad.yaml: trainer is there twice, of which",
    "trainer: {callbacks: [{class_path: MAN, init_args: {zeta: 1, zeta: 2}}]}": "trainer.callbacks.init_args.zeta is",
    "# trainer: {max_rounds: 3}": "bad.yaml holds no keys, as `trainer: {max_rounds: 30}`, but '# trainer:",
    "trainer:\n\tmax_rounds: 3": "YAML is indented with spaces, not with tabs",
    "trainer: {max_rounds: 1:30, transforms: [{class_path: SignFlip, init_args: {clients: [010, 07]}}]}": "bad.yaml: "
    "trainer.max_rounds: 1:30 is 90 in YAML: write that, or quotes around it; "
    "trainer.transforms.init_args.clients: 010 is 8 in YAML: write that, or quotes around it.",
    "model: {class_path: Classifier, init_args: {optimizer: {class_path: torch.optim.SGD, lr: 1}}}": "settings stand "
    "below `init_args`, not beside `class_path`",
    "trainer:\n  name: my: run": 'in "bad.yaml", line 2, column 11',
    "trainer:\nalgorithm: {class_path: FedDyn, alpha: 1, init_args: }\ndata: [{class_path: ImageData}]": "bad.yaml: "
    "trainer holds no keys, but nothing: remove it; algorithm.alpha stands beside class_path: put it below "
    "algorithm.init_args; algorithm.init_args holds no keys, but nothing: remove it; data holds no keys, but a list.",
    "trainer: {views: , callbacks: }\nalgorithm: {class_path: FedDyn, init_args: {alpha: }}": "error: trainer.views, "
    "algorithm.alpha is null: give a value, or leave the key out",
    "seed_everything: null": "seed_everything=None must be at least 0",
    "trainer: {callbacks: [{MAN: {zeta: 1}}]}": "lightning.Callback takes nothing; `class_path` names another class",
    "trainer: {algorithm: FedDyn}": "'trainer.algorithm' is not known; did you mean 'algorithm'?",
    "trainer: {logger: {wandb: {project: p}}}": "`class_path` names the class, `init_args` holds its settings",
    "model: missing.yaml": "there is no file",
    "model: {class_path: Classifier, init_args: {num_classes: 2, net: fedlight.models.MLP, "
    "optimizer: {class_path: SGD, init_args: {rate: 1}}}}": "torch.optim.SGD takes params, lr, momentum",
    "trainer: {default_root_dir: $SCRATCH/runs}": "$VARIABLES are replaced by shells, not in files",
    "trainer: {name: 007}": "YAML reads 7 as another thing than a word: write it in quotes",
    "# Größe": "a configuration that begins with b'# Gr\\xf6\\xdfe' is not UTF-8",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_not_known_is_named_with_the_nearest_name(capsys, text):
    Path("bad.yaml").write_text(text, encoding="latin-1")
    code, error = fails(capsys, "fit", *TINY, "-c", "bad.yaml")
    assert code == 2
    assert BAD[text] in " ".join(error.split())
    assert len(error.splitlines()) < 14
    assert "Traceback" not in error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.max_rounds=1:30"], "command line: trainer.max_rounds: 1:30 is 90 in YAML"),
        (["--trainer.max_rounds", "1:30"], "command line: trainer.max_rounds: 1:30 is 90 in YAML"),
        (["--algorithm=FedProx", "--algorithm.mu=1:30"], "algorithm.mu: 1:30 is 90"),
        (["--trainer.callbacks+={class_path: MAN, init_args: {zeta: 010}}"], "callbacks+.init_args.zeta: 010 is 8"),
        (["--algorithm={class_path: FedProx, init_args: {mu: 1, mu: 2}}"], "algorithm.init_args.mu is there twice"),
    ],
)
def test_mistakes_of_yaml_on_the_command_line_are_named(capsys, args, message):
    code, error = fails(capsys, "fit", *TINY, *args)
    assert code == 2
    assert message in " ".join(error.split())


def test_words_with_colons_stay_words(capsys):
    listed = "--trainer.transforms=[{class_path: SignFlip, init_args: {clients: [0, 1, 2, 3]}}]"
    main(["fit", *TINY, "--trainer.name=1:30", "--trainer.max_rounds=010", listed])
    assert "max_rounds: 10\n" in Path("runs/1:30/version_0/config.yaml").read_text()


@pytest.mark.parametrize("args", [["--algorithm", "part.yaml"], ["--algorithm=part.yaml"], ["-c", "main.yaml"]])
def test_a_key_that_a_part_has_twice_is_refused(capsys, args):
    Path("part.yaml").write_text("class_path: FedProx\ninit_args: {mu: 0.1, mu: 0.2}\n")
    Path("main.yaml").write_text("algorithm: part.yaml\n")
    code, error = fails(capsys, "fit", *TINY, *args)
    assert code == 2
    assert "part.yaml: init_args.mu is there twice" in " ".join(error.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.max_round=3"], "'trainer.max_round' is not known; did you mean 'trainer.max_rounds'?"),
        (["--trainer.seed=3"], "'trainer.seed' is not known; did you mean 'seed_everything'?"),
        (["--trainer.max_epochs=3"], "'trainer.max_epochs' is not known; did you mean 'trainer.max_rounds'?"),
        (["--trainer.max_steps=3"], "did you mean 'trainer.max_rounds' with 'trainer.local_steps'?"),
        (["--trainer.val_check_interval=3"], "did you mean 'trainer.check_val_every_n_rounds'?"),
        (["--trainer.resume_from_checkpoint=2"], "is not known; did you mean 'ckpt_path'?"),
        (["--trainer.gpus=2"], "did you mean 'trainer.accelerator=gpu' with 'trainer.devices'?"),
        (["--trainer.num_sanity_val_steps=2"], "is of Lightning's own Trainer and has no counterpart in rounds"),
        (["--optimizer.lr=1"], "'optimizer.lr' is not known; did you mean 'model.optimizer.lr'?"),
        (["--algorithm.qffl=1"], "fedlight.FedAvg takes server_lr; `class_path` names another class"),
        (["--perturbation.rho=1"], "fedlight.Perturbation has no 'rho'; of ASAM, "),
        (["--trainer.personal.lam=1"], "name one, as `trainer.personal: {class_path: Ditto, init_args: {lam: ...}}`"),
        (["--algorithm=SAM"], "'SAM' belongs under another key: --perturbation SAM"),
        (
            ["--trainer.logger=wandb", "--trainer.logger.project=p"],
            "settings of a logger go to its class: --trainer.logger WandbLogger --trainer.logger.<setting>",
        ),
        (["—trainer.max_rounds=3"], "two hyphens begin an option: --trainer.max_rounds"),
        (["algorithm=FedDyn"], "two hyphens begin an option: --algorithm"),
        (["my.yaml"], "-c reads a configuration: -c my.yaml"),
        (["quickstart"], "-c reads a configuration: -c quickstart"),
        (["--ckpt=last"], "'ckpt' is not known; did you mean 'ckpt_path'?"),
        (["--algorithm=FedAvgg"], "did you mean 'FedAvg'"),
        (["--algorithm=configs/none.yaml"], "there is no file"),
        (["-c", "none.yaml"], "File does not exist"),
        (
            ["--trainer.callbacks+=MAN", "--trainer.callbacks.zeta=-1"],
            "MAN.zeta must be a finite number at least 0, found -1",
        ),
        (["--algorithm=FedProx", "--algorithm.mu=.nan"], "algorithm.mu must be a finite number at least 0, found nan"),
        (["--data=ImageData", "--data.batch_size=0"], "`data.batch_size` must be at least 1, got 0"),
        (["--trainer.clients_per_round=50"], "trainer.clients_per_round=50 must lie between 1 and data.num_clients=4"),
        (["--trainer.local_steps=1", "--trainer.local_epochs=1"], "exclude each other"),
        (["--algorithm=FedSAM", "--perturbation=SAM"], "perturbation: FedSAM brings its own SAM"),
        (["--trainer.callbacks+=LearningRateFinder"], "trainer.callbacks: LearningRateFinder does not work"),
        (["--trainer.logger=wandbb"], "trainer.logger"),
        (["--trainer.transforms+=TopK", "--trainer.transforms.fraction=0"], "trainer.transforms.fraction must be"),
        (["--trainer.transforms=TopK", "--trainer.transforms.fraction=1.5"], "above 0 and at most 1, found 1.5"),
        (
            ["--trainer.transforms+=Quantize", "--trainer.transforms.bits=17"],
            "transforms.bits=17 must be a whole",
        ),
        (["--trainer.transforms+=Quantize", "--trainer.transforms.bits=2.5"], "Expected a <class 'int'>"),
        (["--trainer.transforms=[Quantize, TopK]"], "Write ['TopK', 'Quantize']"),
        (["--trainer.transforms=Topk"], "'Topk' is not known; did you mean 'TopK'?"),
        (["--trainer.transforms+=ClipUpdate", "--algorithm=SCAFFOLD"], "SCAFFOLD sends control_change as well"),
        (["--ckpt_path=last"], "ckpt_path='last': no run below"),
        (["--trainer.devices=0"], "trainer.devices=0"),
        (["--seed_everything=-3"], "seed_everything=-3 must be at least 0 and below 2**32"),
    ],
)
def test_bad_arguments_exit_with_2_and_say_what_to_do(capsys, args, message):
    code, error = fails(capsys, "fit", *TINY, *args)
    assert code == 2
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not list(Path().glob("runs/default/version_*"))


def test_precision_is_written_as_for_lightning(tmp_path):
    Path("p.yaml").write_text("trainer: {precision: 32}")
    given = {"p.yaml": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
    for text, name in given.items():
        words = ["-c", text] if text == "p.yaml" else [f"--trainer.precision={text}"]
        assert FederatedCLI([*TINY, *words], run=False).trainer.settings["precision"] == name
    assert quiet_trainer(tmp_path, precision=64).precision == "64-true"


def test_a_run_that_diverges_exits_with_1(capsys):
    code, error = fails(capsys, "fit", *TINY, *QUIET, "--model.lr=1e30", "--trainer.local_epochs=5")
    assert code == 1
    assert "fedlight: error: round 1: the update of every client" in error


def test_a_mistake_in_the_users_own_code_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        main(["fit", *TINY[1:], "--model=tests.test_cli.Broken", *QUIET])


class FailsLater(Regression):
    """Fails in the second round."""

    def training_step(self, batch, batch_idx):
        if self.trainer.current_round == 1:
            raise ValueError("a mistake of one's own")
        return super().training_step(batch, batch_idx)


def test_an_exception_in_a_client_names_round_and_client(capsys):
    with pytest.raises(ValueError, match="of one's own") as caught:
        main(["fit", *TINY[1:], "--model=tests.test_cli.FailsLater", *QUIET])
    assert re.fullmatch(r"This happened in round 2, client \d.", caught.value.__notes__[0])
    error = ValueError("ours")
    error.add_note("This happened in round 1, client 2.")
    assert fedlight.cli.command._fail(error) == 2
    assert capsys.readouterr().err.endswith("fedlight: error: ours\nThis happened in round 1, client 2.\n")


class Broken(Regression):
    """Divides by zero when it is configured."""

    def configure_optimizers(self):
        return 1 / 0


def test_a_cli_of_ones_own(tmp_path):
    """With classes given, as in any LightningCLI, and without running anything."""
    cli = FederatedCLI(["--trainer.max_rounds=3"], run=False, model_class=Regression, datamodule_class=Clients)
    assert cli.trainer.max_rounds == 3
    assert type(cli.model) is Regression
    cli.trainer.fit(cli.model, cli.datamodule)
    assert Path("runs/default/version_0/metrics.csv").exists()


def test_the_seed_is_the_trainers(caplog):
    def seed(*args):
        return FederatedCLI([*TINY, *args], run=False).trainer.seed

    assert seed() == 0
    assert seed("--seed_everything=7") == 7
    assert "weights of its own" not in caplog.text
    assert seed("--seed_everything=false") == 0
    assert "initial weights differ from run to run; all other draws have seed 0" in caplog.text
