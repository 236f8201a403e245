"""The notebook, and how a run looks in one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedlight.callbacks import progress
from tests.helpers.tiny import Clients, Regression, quiet_trainer

NOTEBOOK = Path(__file__).parents[2] / "examples" / "federate_a_module.ipynb"
UPDATES = []


def test_it_is_kept_as_it_was_executed():
    assert NOTEBOOK.stat().st_size < 300_000
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    html = "".join("".join(output.get("data", {}).get("text/html", [])) for output in outputs)
    assert "<th>method</th><td>FedAvg+MAN" in html
    assert "round 20/20" in html
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_it_runs(tmp_path):
    pytest.importorskip("nbmake")
    copy = shutil.copy(NOTEBOOK, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", str(copy)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


class Line:
    def update(self, data, raw):
        UPDATES.append((data["text/plain"].split("  ")[0], data["text/html"].split(" <code>")[0], raw))


def test_a_notebook_has_one_line_that_changes(tmp_path, monkeypatch, capsys):
    UPDATES.clear()
    assert progress._notebook_line() is None
    monkeypatch.setattr(progress, "_notebook_line", Line)
    quiet_trainer(tmp_path, enable_progress_bar=True, max_rounds=2).fit(Regression(), Clients())
    assert [(f"round {n}/2", f'<progress value="{n}" max="2"></progress>', True) for n in (1, 2)] == UPDATES
    assert "round" not in capsys.readouterr().out
