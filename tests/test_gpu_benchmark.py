"""benchmarks/gpu.py, which needs a GPU, in a dry run on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_dry_run_writes_both_files(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", "--out", str(tmp_path / "gpu")]
    command += ["--only", "checks", "speed: eager", "speed: cuda_graph, unequal"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(found) == ["checks", "speed: eager", "speed: cuda_graph, unequal clients"]
    assert found["checks"]["failed"] == []
    assert found["speed: cuda_graph, unequal clients"]["eager's bits"] is True
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("a CPU, dry run")
    assert all(f"| {name} |" in text for name in found if name != "checks")
