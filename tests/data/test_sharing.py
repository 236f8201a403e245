"""The processes of a machine hold the data once."""

import os
import subprocess
import sys

import pytest
import torch
from lightning.fabric import Fabric

from fedlight.data import datamodule
from fedlight.data.datamodule import share_among_processes
from tests.data.sharing_processes import Data
from tests.helpers.runif import RunIf


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder, temporary = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "tests.data.sharing_processes", str(folder)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
    left = [path.name for path in temporary.iterdir() if path.name.startswith("fedlight")]
    return [torch.load(folder / f"shared{rank}.pt") for rank in (0, 1)], left


@RunIf(linux=True)
@pytest.mark.slow
def test_two_processes_hold_one_copy(two):
    for rank in two[0]:
        assert rank["bytes"] == 7 * 3 + 7 * 8 + 3 * 2 * 8 + 3 * 4
        assert rank["same"]
        assert rank["seen"] == (True, 42.0)
    assert two[1] == []


@RunIf(linux=True)
@pytest.mark.slow
def test_data_that_differ_between_processes_are_left_alone(two):
    assert [rank["unlike"] for rank in two[0]] == [0, 0]
    assert [rank["untouched"] for rank in two[0]] == [7, 8]


def test_one_process_has_nothing_to_share():
    data = Data()
    inputs = data.all.inputs
    assert share_among_processes(Fabric(accelerator="cpu", devices=1), data) == 0
    assert data.all.inputs is inputs


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(datamodule.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch, "save", full)
    assert datamodule._write([torch.zeros(3)]) is None
    assert list(tmp_path.iterdir()) == []


def test_no_folder_for_temporary_files(monkeypatch):
    monkeypatch.setattr(datamodule.tempfile, "tempdir", "/nowhere")
    assert datamodule._write([torch.zeros(3)]) is None
