"""What is loaded for a first round, where little more is installed than that needs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedlight

ROOT = Path(__file__).parents[1]
ABSENT = ("torchvision", "scipy", "matplotlib", "transformers", "pandas", "wandb", "tensorboard", "datasets", "timm")
"""What torchmetrics would load, or a callback or a logger might."""
OWN = {"fedlight", "attr", "attrs", "torch"}
"""What a first round loads when Lightning is there: of the others, what jsonargparse looks for and saving takes."""

CODE = """
import gc, json, sys
loaded = {}
def note(stage):
    loaded[stage] = sorted(sys.modules)
import fedlight
note("package")
fedlight.MAN
note("MAN")
assert gc.isenabled()
gc.disable()  # for time alone
import lightning.pytorch.cli, torch
torch.optim.SGD([torch.zeros(1)], lr=0.1)
note("Lightning")
from fedlight.__main__ import main
sys.argv = ["fedlight", "fit", "-c", "quickstart", "--trainer.max_rounds=1", "--trainer.devices=1", *sys.argv[1:]]
main()
note("round")
print("LOADED", json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The names in ``sys.modules`` by stage, of a process without site-packages of its own."""
    spec = importlib.util.spec_from_file_location("startup_benchmark", ROOT / "benchmarks" / "startup.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    folder = tmp_path_factory.mktemp("packages")
    benchmark.few_packages(folder, ABSENT)
    settings = ["--trainer.enable_plots=false", "--trainer.enable_progress_bar=false"]
    ended = subprocess.run(
        [sys.executable, "-S", "-c", CODE, *settings],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])},
        cwd=tmp_path_factory.mktemp("run"),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "failed, and the run goes on" not in ended.stderr
    return {stage: set(names) for stage, names in json.loads(ended.stdout.split("LOADED")[1]).items()}


def test_the_package_loads_nothing_before_it_is_asked(loaded):
    assert {name for name in loaded["package"] if name.startswith("fedlight")} == {"fedlight"}
    assert "torch" not in loaded["package"]
    assert "fedlight.penalties.man" in loaded["MAN"]
    assert "fedlight.trainer" not in loaded["MAN"]


def test_a_first_round_needs_few_packages_and_loads_little_besides_lightning(loaded):
    new = loaded["round"] - loaded["Lightning"]
    assert "fedlight.run.session" in new
    assert {name.split(".")[0] for name in new} - sys.stdlib_module_names <= OWN
    assert all(name.startswith("torch.utils.serialization") for name in new if name.startswith("torch"))
    assert not loaded["round"] & {*ABSENT, "sklearn", "aiohttp", "functorch", "torch._inductor.compile_fx"}
    for later in ("report", "studies", "engines.cuda_graph.engine", "cli.fidelity"):
        assert f"fedlight.{later}" not in loaded["round"]


HELP = """
import sys
from fedlight.__main__ import main
sys.argv = ["fedlight", "fit", "--model.help", "Classifier"]
try:
    main()
finally:
    loaded = {name.split(".")[0] for name in sys.modules}
    from lightning_utilities.core.imports import RequirementCache, package_available
    assert RequirementCache("scipy") and package_available("scipy")
    print("LOADED", *loaded)
"""


def test_a_help_loads_nothing_that_torchmetrics_finds():
    ended = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=ROOT)
    assert "smoothing" in ended.stdout, ended.stderr
    assert {"torchmetrics", "lightning"} <= {*ended.stdout.split("LOADED")[1].split()}
    assert not {"scipy", "matplotlib", "torchvision", "transformers"} & {*ended.stdout.split("LOADED")[1].split()}


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_again_if_it_was(monkeypatch, collects):
    monkeypatch.setattr(fedlight.gc, "isenabled", lambda: collects)
    calls = []
    monkeypatch.setattr(fedlight.gc, "disable", lambda: calls.append("off"))
    monkeypatch.setattr(fedlight.gc, "enable", lambda: calls.append("on"))
    with pytest.raises(ImportError), fedlight.loading():
        raise ImportError
    assert calls == ["off", "on"][: 1 + collects]


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'FedNothing'"):
        _ = fedlight.FedNothing


def test_names_and_packages_are_found():
    assert set(fedlight.__all__) <= set(dir(fedlight))
    for name in fedlight.__all__:
        assert getattr(fedlight, name).__name__.split(".")[-1] == name


def test_the_program_may_be_called_in_a_thread():
    code = "import sys, threading; from fedlight.__main__ import main; sys.argv = ['fedlight', 'fit', '--nothing'];"
    code += " thread = threading.Thread(target=main); thread.start(); thread.join()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "signal only works" not in ended.stderr
    assert "--nothing" in ended.stderr
