"""The cache of what ``--help`` prints, and how lazily the package is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedlight
from fedlight.cli import help as _help
from fedlight.cli.help import print_help

ROOT = Path(__file__).parents[1]


class Maker:
    """Prints a help, and counts how often it has to."""

    def __init__(self, code=0):
        self.calls, self.code = 0, code

    def __call__(self):
        self.calls += 1
        print(f"usage {self.calls} ζ")
        raise SystemExit(self.code)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fedlight" / "help"


@pytest.mark.parametrize("args", [["fit", "--help"], ["--help"], ["test", "-h"]])
def test_help_is_made_once(capsys, args):
    make = Maker()
    for _ in range(3):
        assert print_help(args, make)
    assert make.calls == 1
    assert capsys.readouterr().out == "usage 1 ζ\n" * 3


@pytest.mark.parametrize(
    "args", [[], ["fit"], ["fit", "-c", "a.yaml"], ["fit", "-c", "a.yaml", "--help"], ["-c", "--help"], ["--version"]]
)
def test_anything_else_is_not_the_cache_s(args):
    make = Maker()
    assert not print_help(args, make)
    assert make.calls == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.setenv("COLUMNS", "77"),
        lambda m: m.setenv("NO_COLOR", "1"),
        lambda m: m.setattr(_help, "_MADE_OF", ("lightning",)),
        lambda m: m.setattr(sys, "version", "4.0"),
        lambda m: m.setattr(_help, "__file__", __file__),
    ],
)
def test_another_terminal_version_or_file_is_another_help(monkeypatch, change):
    make = Maker()
    print_help(["fit", "--help"], make)
    change(monkeypatch)
    print_help(["fit", "--help"], make)
    assert make.calls == 2


def test_a_cache_that_cannot_be_written_is_done_without(cache, capsys):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    make = Maker()
    for _ in range(2):
        assert print_help(["--help"], make)
    assert make.calls == 2


def test_a_failure_is_not_kept(cache):
    make = Maker(code=2)
    for _ in range(2):
        with pytest.raises(SystemExit):
            print_help(["nonsense", "--help"], make)
    assert make.calls == 2
    assert not list(cache.glob("*.txt"))


def test_few_are_kept(cache, monkeypatch):
    for i in range(_help._KEPT + 5):
        monkeypatch.setenv("COLUMNS", str(80 + i))
        print_help(["--help"], Maker())
    assert len(list(cache.iterdir())) == _help._KEPT


@pytest.mark.slow
def test_the_program_prints_the_same_help_twice(tmp_path):
    """The second time without torch."""
    code = "import sys; sys.argv = ['fedlight', 'fit', '--help']; from fedlight.__main__ import main; main();"
    code += " print('LOADED', 'torch' in sys.modules)"
    environment = {**os.environ, "COLUMNS": "100"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("LOADED")
        for _ in range(2)
    ]
    assert runs[0][0] == runs[1][0]
    assert "--trainer.max_rounds" in runs[0][0]
    assert [loaded.strip() for _, loaded in runs] == ["True", "False"]


@pytest.mark.slow
def test_the_package_loads_nothing_before_it_is_asked():
    code = (
        "import sys, fedlight; print('torch' in sys.modules, fedlight.__version__); fedlight.MAN; print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    first, modules = out.splitlines()[0], out.splitlines()[1].split()
    assert first == f"False {fedlight.__version__}"
    assert "fedlight.penalties.man" in modules
    assert "fedlight.trainer" not in modules


def test_names_and_packages_are_found():
    assert set(fedlight.__all__) <= set(dir(fedlight))
    for name in fedlight.__all__:
        found = getattr(fedlight, name)
        assert found.__name__.split(".")[-1] == name
    with pytest.raises(AttributeError, match="no attribute 'FedNothing'"):
        _ = fedlight.FedNothing
