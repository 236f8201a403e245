"""Fixtures that hold for every test: a test leaves the process as it found it."""

import functools
import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lightning.fabric import fabric
from lightning.pytorch.trainer.connectors import callback_connector
from PIL import Image

from fedlight.callbacks import pictures
from fedlight.seeding import preserved_global_rng
from tests.helpers import leaks

# Networks this small run no faster on a second thread, and far slower where another process wants its core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the mark ``gpu`` to whatever ``RunIf`` says needs one."""
    for item in items:
        if any(mark.kwargs.get("min_cuda_gpus", 0) > 0 for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def _entry_points_are_read_once() -> Iterator[None]:
    """Lightning looks for callbacks in all installed packages at each start: a quarter of the time of a small fit."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (fabric, callback_connector):
            patch.setattr(module, "_load_external_callbacks", functools.cache(module._load_external_callbacks))
        yield


@pytest.fixture(autouse=True)
def _global_rng_is_restored() -> Iterator[None]:
    with preserved_global_rng():
        yield


REAL = {"curves": pictures.draw_curves, "partition": pictures.save_partition_picture}
"""What draws the pictures of every run."""


@pytest.fixture(autouse=True, scope="session")
def _pictures_of_every_run_are_quick() -> Iterator[None]:
    """Drawing one takes longer than most fits here: all tests but those of a picture get an empty one."""

    def save(_: object, path: Path, *more: object) -> None:
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (1, 1)).save(path)

    with pytest.MonkeyPatch.context() as patch:
        for draw in REAL.values():
            patch.setattr(pictures, draw.__name__, save)
        yield


@pytest.fixture(autouse=True)
def _pictures_that_are_tested_are_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, draw in REAL.items():
        if request.node.path.match(f"callbacks/test_{name}.py"):
            monkeypatch.setattr(pictures, draw.__name__, draw)


@pytest.fixture(autouse=True)
def _environment_is_not_leaked() -> Iterator[None]:
    before = dict(os.environ)
    yield
    leaked = leaks.changed_environment(before)
    leaks.restore_environment(before)
    assert not leaked, f"the test left these environment variables changed: {leaked}"


@pytest.fixture(autouse=True)
def _processes_are_not_leaked() -> Iterator[None]:
    before = leaks.children()
    yield
    if not leaks.leaked_children(before, patience=0):
        return
    gc.collect()  # loaders stop their workers when they are collected
    leaked = leaks.leaked_children(before)
    for pid in leaked:
        os.kill(pid, signal.SIGKILL)
    assert not leaked, f"the test left these processes running: {leaked}"


@pytest.fixture(autouse=True)
def _torch_settings_are_not_leaked() -> Iterator[None]:
    before = leaks.torch_settings()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    precision = torch.get_float32_matmul_precision()
    yield
    # What a trainer's own options set (`deterministic`, `benchmark`) is put back without a word.
    torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    if torch.get_float32_matmul_precision() != precision:
        torch.set_float32_matmul_precision(precision)
    after = leaks.torch_settings()
    leaks.restore_torch_settings(before)
    assert after == before, f"the test changed torch's global settings: {before} became {after}"


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """``shared_data("cifar100")`` is an ``.npz`` file, ``shared_data("pacs64")`` a folder of domains; else a skip.

    The images are not part of the repository. Where ``../shared/data/unpack.py`` lies beside it, they are unpacked
    once, into a folder of the system's temporary directory that later runs find again.
    """
    targets = {"cifar100": "cifar100.npz", "pacs64": "pacs64"}

    def unpacked(name: str) -> Path:
        script = Path(__file__).parents[2] / "shared" / "data" / "unpack.py"
        if not script.is_file():
            pytest.skip(f"{name} is not here: there is no {script}")
        cache = Path(tempfile.gettempdir()) / f"fedlight-test-data-{os.getuid()}" / name
        if not cache.exists():
            cache.parent.mkdir(exist_ok=True)
            building = Path(tempfile.mkdtemp(dir=cache.parent))
            subprocess.run([sys.executable, str(script), name, str(building)], check=True)
            try:
                building.rename(cache)
            except OSError:  # another process was faster
                shutil.rmtree(building)
        return cache / targets[name]

    return unpacked
