"""What is answered without loading torch: the commands, the version, a new project; and the words in any order."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fedlight
from fedlight.cli.command import COMMANDS, FederatedCLI, main
from fedlight.cli.light import TRAINERS, command_first, light
from fedlight.run.loggers import read_metrics
from fedlight.studies.plan import plan
from fedlight.studies.study import load_study

TEMPLATES = Path(__file__).parents[1] / "templates"


def test_without_a_command_all_of_them_are_named(capsys):
    assert (light([]), light(["--help"]), light(["-h"])) == (2, 0, 0)
    text = capsys.readouterr().out
    for name in (*FederatedCLI.subcommands(), *COMMANDS, "configs", "new"):
        assert f"\n  {name} " in text
    assert "fedlight fit -c quickstart" in text
    assert max(map(len, text.splitlines())) <= 100
    assert set(FederatedCLI.subcommands()) <= set(TRAINERS)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_command_alone_says_what_to_type_first(name, capsys):
    assert light([name]) == 2
    assert f"fedlight {name} -c quickstart" in capsys.readouterr().err
    assert light([name, "--help"]) is None


def test_a_command_that_does_not_exist(capsys):
    assert light(["stuy", "sweep.yaml"]) == 2
    assert "there is no command 'stuy'; did you mean 'study'? `fedlight --help` lists them." in capsys.readouterr().err
    assert light(["study", "sweep.yaml"]) is None


def test_the_version(capsys):
    assert light(["--version"]) == 0
    assert capsys.readouterr().out == f"fedlight {fedlight.__version__}\n"


def test_nothing_heavy_is_loaded_for_it():
    code = "import sys; from fedlight.cli.light import light; light(['configs']); print({'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-c FILE fit --trainer.name=a", "fit -c FILE --trainer.name=a"),
        ("--config=FILE test", "test --config=FILE"),
        ("-c fit fit", "fit -c fit"),
        ("fit -c FILE", "fit -c FILE"),
        ("study fit.yaml", "study fit.yaml"),
        ("--trainer.name test", "--trainer.name test"),
    ],
)
def test_the_command_may_come_after_its_options(words, expected):
    assert command_first(words.split()) == expected.split()


def test_a_new_project_trains_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert light(["new", "my project"]) == 0
    assert "cd 'my project'" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "my project")
    monkeypatch.syspath_prepend(str(tmp_path / "my project"))
    assert sorted(p.name for p in Path().iterdir()) == sorted(p.name for p in TEMPLATES.iterdir() if p.is_file())
    assert not [p for p in Path().iterdir() if "my_project" in p.read_text()]
    assert len(Path("README.md").read_text().splitlines()) <= 10
    main(["fit", "-c", "config.yaml", "--trainer.max_rounds=3", "--trainer.enable_progress_bar=false"])
    rows = read_metrics(Path("runs/my-project/version_0/metrics.csv"))
    assert rows[-1]["val/accuracy"] > 0.3  # one in ten is chance
    runs = plan(load_study(Path("sweep.yaml")))
    assert len(runs) == 12
    assert yaml.safe_load(Path("config.yaml").read_text())["algorithm"] in runs[0].parameters["algorithm"]
    sys.modules.pop("module", None)


def test_nothing_is_overwritten_by_a_new_project(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert light(["new", str(tmp_path)]) == 2
    assert "it holds mine.txt; name a folder that is new or empty" in capsys.readouterr().err
    assert light(["new", str(tmp_path / "mine.txt")]) == 2
    assert "File exists" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    assert (light(["new"]), light(["new", "--help"])) == (2, 0)


def test_a_pipe_that_is_closed_is_no_error():
    command = [sys.executable, "-m", "fedlight", "configs"]
    read = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert read.stdout is not None
    read.stdout.close()  # before anything is written
    said = read.stderr.read()
    read.stderr.close()
    assert (read.wait(60), said) == (0, b"")
