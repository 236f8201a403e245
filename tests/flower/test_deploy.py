"""`fedlight deploy flower`: what it writes, and what it refuses."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import fedlight
from fedlight.cli.command import main

QUICK = ["--trainer.accelerator=cpu", "--trainer.name=mine"]
NET = """
from lightning.pytorch import LightningModule
from travelling.layers import Head
from travelling_too import WIDTH

class Net(LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.net, self.lr = Head(64, WIDTH), lr
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def deploy(*args):
    with pytest.raises(SystemExit) as stop:
        main(["deploy", *args])
    return stop.value.code


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """An app of the quickstart, and what was printed, with overrides."""
    out = tmp_path_factory.mktemp("deploy") / "My app_1"
    overrides = ["--trainer.max_rounds", "7", "--seed_everything=5", "--algorithm", "FedProx", "--algorithm.mu=0.3"]
    assert deploy("flower", "-c", "quickstart", *QUICK, *overrides, "-o", str(out), "--publisher", 'a "b"') == 0
    return out


def test_an_app_is_what_flower_asks_for(app):
    project = tomllib.loads((app / "pyproject.toml").read_text())
    flower = project["tool"]["flwr"]["app"]
    assert project["project"]["name"] == "My-app-1"
    assert project["project"]["license"] == {"file": "LICENSE"}
    assert (app / "LICENSE").is_file()
    extras = tomllib.loads((Path(fedlight.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["project"]["dependencies"] == [
        f"fedlight[flower]=={fedlight.__version__}", *extras["optional-dependencies"]["flower"],
    ]  # fmt: skip
    assert flower["publisher"] == 'a "b"'
    assert flower["config"] == {
        "rounds": 7, "seed": 5, "min-results": 1, "timeout": 3600, "folder": "", "resume": "", "wait": 600,
        "data": "experiment", "clients": 0, "spectrum": "server",
    }  # fmt: skip
    code = "".join(path.read_text() for path in (Path(fedlight.__file__).parent / "flower").glob("s*.py"))
    assert set(re.findall(r'options\.get\("([\w-]+)"', code)) <= set(flower["config"])  # others cannot be given
    for side, component in flower["components"].items():
        module, name = component.split(":")
        code = (app / f"{module.replace('.', '/')}.py").read_text()
        function = side.replace("app", "_app")
        assert f"from fedlight.flower import {function}\n\n{name} = {function}(__file__)\n" in code
    folder = module.split(".")[0]
    assert {p.relative_to(app).as_posix() for p in app.rglob("*") if p.is_file()} == {
        "pyproject.toml", "LICENSE",
        *(f"{folder}/{name}" for name in ("__init__.py", "client_app.py", "server_app.py", "config.yaml")),
    }  # fmt: skip


def test_the_configuration_is_complete_and_is_read_again(app, capsys):
    config = app / "fedlight_app" / "config.yaml"
    found = yaml.safe_load(config.read_text())
    assert (found["seed_everything"], found["trainer"]["max_rounds"], found["trainer"]["name"]) == (5, 7, "mine")
    assert found["algorithm"]["class_path"].endswith(".FedProx")
    assert found["algorithm"]["init_args"]["mu"] == 0.3
    assert found["trainer"]["limit_val_batches"] is None
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(config), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == found


def test_a_folder_that_holds_something_is_refused(app, capsys):
    before = (app / "pyproject.toml").read_bytes()
    assert deploy("flower", "-c", "quickstart", "-o", str(app)) == 2
    assert f"{app} is there already" in capsys.readouterr().err
    assert (app / "pyproject.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["flower", "-o", "app"], "deploy flower -c quickstart -o app"),
        (["flwr", "-c", "quickstart", "-o", "app"], "no 'flwr'"),
        (["flower", "-c", "quickstart", "-o", "app", "--trainer.max_round=3"], "did you mean 'trainer.max_rounds'"),
        (["flower", "-c", "quickstart", "-o", "app", "--algorithm=FedProx", "--algorithm.mu=-1"], "mu"),
        (["flower", "-c", "quickstart", "-o", "app", "--ckpt_path=last"], "resume"),
        (["flower", "-c", "quickstart", "-o", "app", "--data.held_out_clients=2"], "data.held_out_clients"),
        (["flower", "-c", "quickstart", "-o", "app", "--trainer.personal=FedPer"], "'FedPer' means nothing"),
        (["flower", "-c", "quickstart", "-o", "app", "--local=0"], "must be at least 1"),
        (["flower", "-c", "quickstart", "-o", "app", "--local=2"], 'pip install "fedlight[flower]"'),
        (["flower", "-o", "app", "--local=2"], 'pip install "fedlight[flower]"'),
        ([], "`fedlight deploy flower`"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(args, said, capsys, monkeypatch):
    monkeypatch.setattr("fedlight.flower.deploy.find_spec", lambda name: None)
    assert deploy(*args) == 2
    assert said in capsys.readouterr().err
    assert not Path("app").exists()


def test_local_runs_what_was_written_with_all_clients(app, monkeypatch):
    monkeypatch.setattr("fedlight.flower.deploy.find_spec", lambda name: name)
    monkeypatch.setattr("fedlight.flower.deploy.run_local", lambda *found: runs.append(found) or 1)
    monkeypatch.syspath_prepend("")  # what is put before it is taken away
    runs, config = [], yaml.safe_load((app / "fedlight_app" / "config.yaml").read_text())
    assert deploy("flower", "-o", str(app), "--local", "3") == 1
    assert runs == [(app, 3, config["data"]["init_args"]["num_clients"], "")]


def test_code_that_is_not_installed_travels_and_sites_are_told_what_to_allow(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(
        str(tmp_path)
    )  # its modules stay: a class whose module is gone troubles the next parser
    Path("travelling_too.py").write_text("WIDTH = 10\n")
    Path("unused.py").write_text("")
    Path("travelling").mkdir()
    Path("travelling/__init__.py").write_text("")
    Path("travelling/layers.py").write_text("from torch.nn import Linear as Head\n")
    Path("travelling/later.py").write_text("")
    Path("travelling/test_layers.py").write_text("")
    Path("travelling/net.py").write_text(NET)
    model = ["--model=travelling.net.Net", "--model.lr=0.2"]
    Path("plain.yaml").write_text("data: {class_path: ImageData, init_args: {source: digits, num_clients: 4}}\n")
    assert deploy("flower", "-c", "plain.yaml", *QUICK, *model, "-o", "app") == 0
    assert 'allow="travelling"' in capsys.readouterr().out
    assert {p.relative_to("app").as_posix() for p in Path("app").rglob("*.py")} == {
        "travelling_too.py", *(f"travelling/{name}.py" for name in ("__init__", "layers", "later", "net")),
        *(f"fedlight_app/{name}.py" for name in ("__init__", "client_app", "server_app")),
    }  # fmt: skip
    Path("travelling/net.py").rename("test_travelling.py")
    assert deploy("flower", "-c", "plain.yaml", *QUICK, "--model=test_travelling.Net", "-o", "app2") == 2
    assert "test_travelling.py would not travel" in capsys.readouterr().err
    assert not Path("app2").exists()
