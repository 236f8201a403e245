"""What ``validate``, ``test`` and ``analyze`` leave in the run's folder and with the loggers."""

import json

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger

from tests.helpers.tiny import Clients, Regression, quiet_trainer

ROWS = []


class Kept(Logger):
    name = version = "kept"

    def log_metrics(self, metrics, step=None):
        ROWS.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        """Of no interest."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = quiet_trainer(tmp_path_factory.mktemp("results"))
    trainer.fit(Regression(), Clients())
    return trainer.run_dir


def other(run, **settings):
    return quiet_trainer(run.parents[1], **settings)


def records(run, name):
    return json.loads((run / f"{name}_metrics.json").read_text())


def test_results_are_kept_by_checkpoint_rounds_and_settings(run):
    ROWS.clear()
    last = run / "checkpoints" / "last.ckpt"
    (found,) = other(run, logger=Kept()).test(Regression(), Clients(), last, verbose=False)
    first = {"checkpoint": "checkpoints/last.ckpt", "rounds": 3, "metrics": found}
    assert records(run, "test") == [first]
    assert [(2, {**found, "round": 2.0})] == ROWS
    (few,) = other(run, limit_test_batches=1).test(Regression(), Clients(), last, verbose=False)
    (again,) = other(run).test(Regression(lr=1.0), Clients(), last, verbose=False)
    assert again == found != few
    limited = {"checkpoint": "checkpoints/last.ckpt", "rounds": 3, "limit_test_batches": 1, "metrics": few}
    assert records(run, "test") == [limited, first]
    trainer = other(run, max_rounds=5)
    trainer.fit(Regression(), Clients(), last)
    (later,) = trainer.test(Regression(), Clients(), "last", verbose=False)
    assert records(run, "test")[:2] == [limited, first]
    assert records(run, "test")[2] == {"checkpoint": "checkpoints/last.ckpt", "rounds": 5, "metrics": later}


def test_what_validate_and_analyze_found_is_kept(run):
    (found,) = other(run).validate(Regression(), Clients(), "best", verbose=False)
    (record,) = records(run, "validate")
    assert (record["checkpoint"], record["metrics"]) == ("checkpoints/best.ckpt", found)
    result = other(run).analyze(
        Regression(), Clients(), "best", top_k=1, density=False, trace=False, layerwise=False, verbose=False
    )["server"]
    (record,) = records(run, "analyze")
    assert record["metrics"]["hessian/lambda_max"] == result.lambda_max
    assert (record["on"], record["max_samples"], record["float64"], record["seed"]) == ("train", 5000, False, 0)


def test_weights_of_no_run_have_a_folder_of_their_own(run, tmp_path):
    quiet_trainer(tmp_path).test(Regression(), Clients(), verbose=False)
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes((run / "checkpoints" / "best.ckpt").read_bytes())
    quiet_trainer(tmp_path).test(Regression(), Clients(), moved, verbose=False)
    found = [(r["checkpoint"], r["rounds"]) for r in records(tmp_path / "default" / "analysis", "test")]
    assert found == [(None, None), (str(moved), 5)]
    assert {p.name for p in tmp_path.iterdir()} == {"default", "moved.ckpt"}
    quiet_trainer(tmp_path / "dry", fast_dev_run=True).test(Regression(), Clients(), verbose=False)
    assert not (tmp_path / "dry").exists()


def test_a_file_that_cannot_be_written_is_warned_of(run):
    path = run / "test_metrics.json"
    path.write_text("{")
    with pytest.warns(UserWarning, match=r"test_metrics.json: writing failed.*JSONDecodeError"):
        found = other(run).test(Regression(), Clients(), "best", verbose=False)
    assert found
    assert path.read_text() == "{"


def test_the_summary_is_text_and_html(tmp_path):
    trainer = quiet_trainer(tmp_path, name="<b>")
    with pytest.raises(MisconfigurationException, match="no summary before fit"):
        trainer.summary()
    trainer.fit(Regression(), Clients())
    found = trainer.summary()
    lines = dict(line.split(maxsplit=1) for line in str(found).splitlines())
    assert lines["method"].startswith("FedAvg, 3 rounds of 1 local epoch")
    assert lines["rounds"].startswith("3 in ")
    assert "val/loss" in lines
    html = found._repr_html_()
    assert f"<tr><th>method</th><td>{lines['method']}</td></tr>" in html
    assert "&lt;b&gt;" in html
    assert '<img src="data:image/png;base64,' in html
    trainer.test(Regression(), Clients(), verbose=False)
    assert str(trainer.summary()) == str(found)
    dry = quiet_trainer(tmp_path, fast_dev_run=True)
    dry.fit(Regression(), Clients())
    assert "<img" not in dry.summary()._repr_html_()
    assert "not finished" in str(dry.summary())


@pytest.mark.parametrize("content", [b"", b'{"final"', b"[1, 2]", b'{"final": 3}', b"\xff\xfe"])
def test_a_damaged_summary_is_written_anew(tmp_path, content):
    """And a damaged ``config.yaml`` keeps nobody from going on: what was given stands in the checkpoint."""
    trainer = quiet_trainer(tmp_path)
    trainer.fit(Regression(), Clients())
    path, config = trainer.run_dir / "summary.json", trainer.run_dir / "config.yaml"
    expected = json.loads(path.read_text())["final"]
    path.write_bytes(content)
    assert "not finished" in str(trainer.summary())
    trainer.fit(Regression(), Clients(), ckpt_path="last")
    assert json.loads(path.read_text())["final"] == expected
    config.write_bytes(content)
    quiet_trainer(tmp_path, max_rounds=4).fit(Regression(), Clients(), ckpt_path="last")
    assert json.loads(path.read_text())["rounds"] == 4
