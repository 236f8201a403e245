"""`fedlight check-fidelity`: what it compares, what it says, and that the wheel and the docs have the same."""

import ast
import json
import tomllib
from pathlib import Path

import pytest
import yaml

from fedlight.algorithms import FedAvg
from fedlight.cli.command import main
from fedlight.cli.fidelity import HEAD, TOLERANCE, table, twins
from tests.algorithms.cases import comparisons, problem, source

ROOT = Path(__file__).parents[2]


def run(capsys, *words):
    """The exit code and the table's rows."""
    with pytest.raises(SystemExit) as stop:
        main(["check-fidelity", *words])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return stop.value.code, [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]], out


def test_everything_that_is_shipped_is_compared():
    parts = [p for kind in ("algorithm", "perturbation") for p in (ROOT / "configs" / kind).glob("*.yaml")]
    shipped = {yaml.safe_load(path.read_text())["class_path"].split(".")[-1] for path in parts}
    assert len(shipped) == len(parts)
    assert shipped <= set(comparisons())
    assert all(source(name).split(":")[0] for name in comparisons())


def test_a_method_its_settings_and_a_perturbation(tmp_path, capsys):
    code, rows, out = run(capsys, "feddyn", "LESAM", "--json", str(tmp_path / "rows.json"))
    assert (code, [row[0] for row in rows]) == (0, ["FedDyn", "FedDyn, equal", "LESAM"])
    assert all(row[2:4] + row[5:] == ["5 quadratics", "6", "agrees"] and float(row[4]) < 1e-14 for row in rows)
    assert "\n3 of 3 agree within 1e-10, in float64, engine eager.\n" in out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["method"] for row in written] == [row[0] for row in rows]
    assert [line.split("|")[5].strip() for line in list(table(written))[2:]] == [row[4] for row in rows]
    assert all(row["ok"] is True and 0 <= row["error"] <= TOLERANCE for row in written)


def test_a_wrong_equation_is_found(monkeypatch, capsys):
    right = FedAvg.aggregate
    monkeypatch.setattr(FedAvg, "aggregate", lambda self, server, total: right(self, server, total) | {
        "params": right(self, server, total)["params"] * (1 + 1e-9)
    })  # fmt: skip
    code, rows, out = run(capsys, "FedProx", "--engine", "vmap")
    assert (code, rows[0][5]) == (1, "DIFFERS")
    assert 1e-10 < float(rows[0][4]) < 1e-8
    assert "\n0 of 1 agree" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fedavgg"], "check-fidelity: no method 'fedavgg'; did you mean FedAvg?"),
        (["xyz"], "no method 'xyz'; known are Algorithm, FedAvg, "),
        (["FedAvg", "--engine", "vmapp"], "trainer.engine='vmapp' must be one of"),
        (["--json", "none/rows.json"], "there is no folder"),
    ],
)
def test_what_is_not_understood(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check-fidelity", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_twins_in_the_wheel_need_nothing_of_the_tests():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    files = [ROOT / source for source in wheel["force-include"] if source.endswith(".py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(file.with_name(f"{name}.py") in files for name in names), file.name
            elif isinstance(node, ast.Import | ast.ImportFrom):
                name = node.names[0].name if isinstance(node, ast.Import) else node.module
                used = {"fedlight", "numpy", "torch", "lightning", "functools", "dataclasses", "tempfile"}
                assert name.split(".")[0] in used, file.name
    assert Path(twins().__file__) in files


def test_the_docs_have_the_table_of_the_command():
    page = (ROOT / "docs" / "fidelity.md").read_text().split("## ")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    assert rows[0] == list(HEAD)
    assert [row[:4] for row in rows[2:]] == [[name, source(name), *map(str, problem(name))] for name in comparisons()]
    assert all(float(row[4]) < TOLERANCE and row[5] == "agrees" for row in rows[2:])


@pytest.mark.slow
def test_all_methods_are_their_twins(capsys):
    code, rows, _ = run(capsys)
    assert code == 0
    assert [row[:2] for row in rows] == [[name, source(name)] for name in comparisons()]
