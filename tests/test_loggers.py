"""Where metrics go: rows, names, and W&B with and without its server. The real one is in tests/studies."""

import csv
import types
import warnings

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger

from fedlight.callbacks.checkpoint import Checkpoint
from fedlight.run import snapshot, wandb
from fedlight.run.loggers import MetricsCSV, close_loggers, make_loggers, read_metrics
from tests.helpers.tiny import Clients, Regression, quiet_trainer


class FakeRun:
    def __init__(self, mode):
        self.settings = types.SimpleNamespace(sync_dir="here/offline-run", mode=mode)
        self.exit_code = None

    def finish(self, exit_code):
        self.exit_code = exit_code


class FakeWandbLogger(Logger):
    """Has what fedlight touches of Lightning's, and a server that is there or not."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.run, self.finalized = error, None, None
        self._wandb_init = {"dir": ".", "id": None}

    name = version = None

    @property
    def experiment(self):
        if self.run is None:
            if self.error is not None and self._wandb_init.get("mode") != "offline":
                raise self.error
            self.run = FakeRun(self._wandb_init.get("mode"))
        return self.run

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params): ...

    def finalize(self, status):
        self.finalized = status


@pytest.mark.parametrize("kind", ["CommError", "UsageError"])
def test_without_its_server_wandb_goes_on_offline(tmp_path, kind):
    wandb = pytest.importorskip("wandb")
    logger = FakeWandbLogger(getattr(wandb.errors, kind)("connection refused\nmore"))
    with pytest.warns(UserWarning, match=r"cannot be reached \(connection refused\).*wandb sync here/offline-run"):
        make_loggers(logger, tmp_path, {})
    assert logger.run.settings.mode == "offline"
    assert logger._wandb_init["dir"] == str(tmp_path)


def test_a_run_that_was_begun_here_is_ended_here(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    ours = FakeWandbLogger()
    made = make_loggers(["csv", ours], tmp_path, {})
    close_loggers(made, "success")
    assert (ours.finalized, ours.run.exit_code) == ("success", 0)
    failed = FakeWandbLogger()
    close_loggers(make_loggers(failed, tmp_path, {}), "failed")
    assert (failed.finalized, failed.run.exit_code) == ("failed", 1)
    monkeypatch.setattr(wandb, "run", object())
    theirs = FakeWandbLogger()
    close_loggers(make_loggers(theirs, tmp_path, {}), "success")
    assert theirs.run.exit_code is None, "whoever begins a run ends it"


def test_a_resumed_run_keeps_its_id(tmp_path):
    pytest.importorskip("wandb")
    logger = FakeWandbLogger()
    make_loggers(logger, tmp_path, {"FakeWandbLogger": "abc"})
    assert logger._wandb_init["id"] == "abc"


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """What W&B is begun with, for the settings that a user has given to the logger."""
    pytest.importorskip("wandb")
    for variable in ("PROJECT", "NAME", "RUN_GROUP", "INIT_TIMEOUT"):
        monkeypatch.delenv(f"WANDB_{variable}", raising=False)

    def begin(id=None, **given):
        logger = FakeWandbLogger()
        logger._wandb_init |= {"project": "lightning_logs", "name": None} | given
        ids = {} if id is None else {"FakeWandbLogger": id}
        make_loggers(logger, tmp_path / "study" / "version_3", ids, "FedDyn+MAN-seed1")
        return logger._wandb_init

    return begin


def test_project_group_and_name_follow_from_the_experiment_and_the_method(begun):
    found = begun()
    assert [found[key] for key in ("project", "group", "name")] == ["fedlight", "study", "FedDyn+MAN-seed1-version_3"]
    assert found["settings"] == {"init_timeout": 30}


def test_what_the_user_has_set_wins(begun, monkeypatch):
    mine = {"project": "mine", "group": "g", "name": "n", "tags": ["t"], "settings": {"init_timeout": 5}}
    assert {key: begun(**mine)[key] for key in mine} == mine
    for variable in ("PROJECT", "NAME", "RUN_GROUP"):
        monkeypatch.setenv(f"WANDB_{variable}", variable.lower())
    assert [begun()[key] for key in ("project", "name", "group")] == ["project", "name", "run_group"]
    assert {key: begun(**mine)[key] for key in mine} == mine, "the configuration before the environment"


def test_a_run_that_is_continued_keeps_the_names_that_wandb_has_for_it(begun):
    found = begun(id="abc")
    assert [found[key] for key in ("id", "project", "name", "group")] == ["abc", "fedlight", None, None]


def test_a_logger_begins_another_run_with_another_fit(tmp_path):
    pytest.importorskip("wandb")
    logger = FakeWandbLogger()
    close_loggers(make_loggers(logger, tmp_path / "a", {"FakeWandbLogger": "abc"}), "success")
    logger._experiment = "the old one"
    make_loggers(logger, tmp_path / "b", {})
    assert (logger._wandb_init["id"], logger._wandb_init["dir"]) == (None, str(tmp_path / "b"))
    assert logger._experiment is None


def test_what_log_model_may_be(tmp_path):
    pytest.importorskip("wandb")
    logger = FakeWandbLogger()
    logger._log_model = "sometimes"
    with pytest.raises(MisconfigurationException, match="log_model='sometimes': use true .*all .* or false"):
        make_loggers(logger, tmp_path, {})


def test_offline_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(MisconfigurationException, match="WANDB_MODE=offline nothing .*'me/p/model-x:best' would be"):
        quiet_trainer(tmp_path).fit(Regression(), Clients(), ckpt_path="wandb:me/p/model-x:best")
    assert not list(tmp_path.iterdir())


def test_what_is_no_logger(tmp_path):
    with pytest.raises(MisconfigurationException, match="trainer.logger='visdom' is no logger"):
        make_loggers(["visdom"], tmp_path, {})


def test_metrics_csv_grows_columns_and_resumes(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    log.log_metrics({"round": 0, "a": 0.5})
    log.log_metrics({"round": 1, "a": 0.25, "b": 3})
    assert path.read_text().splitlines() == ["round,a,b", "0,0.5,", "1,0.25,3"]
    again = MetricsCSV(path)
    again.resume(1, None)
    again.log_metrics({"round": 1, "a": 1e-30})
    assert read_metrics(path) == [{"round": 0, "a": 0.5}, {"round": 1, "a": 1e-30}]
    with path.open("a") as file:
        file.write("2,0.")
    assert len(read_metrics(path)) == 2


ROWS = [{"round": float(r), "a": r / 4, **({"b, too": 1e-9 * r} if r > 1 else {})} for r in range(5)]


def written(path, rows=ROWS):
    log = MetricsCSV(path)
    for row in rows:
        log.log_metrics(row)
    return log


def without(*lines):
    return lambda text: "".join(line for i, line in enumerate(text.splitlines(True)) if i not in lines)


@pytest.mark.parametrize("value", ["text", None, [1.0]])
def test_what_a_module_logs_there_and_is_no_number_is_named(tmp_path, value):
    with pytest.raises(TypeError, match="metrics.csv takes numbers, and 'own' is"):
        MetricsCSV(tmp_path / "metrics.csv").log_metrics({"loss": 0.5, "own": value})


DAMAGE = {  # what was done to the file, and the rounds whose rows differ then
    "nothing": (lambda text: text, []),
    "a missing row": (without(2), [1]),
    "missing rows": (without(1, 3, 4), [0, 2, 3]),
    "a torn end": (lambda text: text[:-12], [3]),
    "a torn row inside": (lambda text: text.replace("2,0.5,", "2,0."), [2]),
    "another header": (lambda text: text.replace("round", "step"), [0, 1, 2, 3]),
    "a renamed column": (lambda text: text.replace("a,", "acc,", 1), [0, 1, 2, 3]),
    "a row twice": (lambda text: text + text.splitlines(True)[2], []),
    "a changed row": (lambda text: text.replace("1,0.25", "1,7"), [1]),
    "an empty file": (lambda text: "", [0, 1, 2, 3]),
    "binary garbage": (lambda text: "\0\udcff\udc80\n" * 7, [0, 1, 2, 3]),
    "no round": (lambda text: text.replace("3,0.75", "nan,0.75").replace("2,0.5", ",0.5"), [2, 3]),
    "an infinite round": (lambda text: text.replace("3,0.75", "inf,0.75"), [3]),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("known", [True, False])
def test_a_damaged_metrics_csv_is_restored_or_named(tmp_path, damage, known):
    path, (change, differ) = tmp_path / "metrics.csv", DAMAGE[damage]
    named = ", ".join(str(round + 1) for round in differ)  # a person counts from 1
    text = written(path, ROWS[:4]).text  # the checkpoint's; a fifth round was trained after it
    written(path)
    path.write_bytes(change(text).encode(errors="surrogateescape"))
    log = MetricsCSV(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log.resume(4, text if known else None)
    said = " ".join(str(w.message) for w in caught)
    if known:
        assert read_metrics(path) == ROWS[:4]
        assert path.read_bytes().decode() == log.text == text
        assert (f"rounds {named} are missing or damaged; they are restored" in said) == bool(differ)
    elif damage not in ("a renamed column", "a changed row"):  # nobody can know that
        assert read_metrics(path) == [row for row in ROWS[:4] if row["round"] not in differ]
        assert (f"rounds {named} are missing or damaged; the checkpoint does not" in said) == bool(differ)


def test_what_is_left_of_a_damaged_file_is_read_and_the_rest_named(tmp_path):
    path = tmp_path / "metrics.csv"
    text = written(path).text.splitlines(True)
    path.write_text("".join([*text[:2], "x,y,z\n", *text[2:5], text[3], text[5], "4,1"]))
    with pytest.warns(UserWarning, match="metrics.csv: lines 3, 7 cannot be read, and are left out"):
        assert read_metrics(path) == ROWS
    with pytest.raises(ValueError, match="metrics.csv: lines 3, 7 cannot be read"):
        read_metrics(path, strict=True)


def test_a_resume_restores_the_rows_and_says_so(tmp_path):
    whole = quiet_trainer(tmp_path / "whole", max_rounds=4)
    whole.fit(Regression(), Clients())
    first = quiet_trainer(tmp_path, max_rounds=3)
    first.fit(Regression(), Clients())
    path = first.run_dir / "metrics.csv"
    path.write_text(without(2)(path.read_text())[:-9])
    with pytest.warns(UserWarning, match="rounds 2, 3 are missing or damaged; they are restored"):
        quiet_trainer(tmp_path, max_rounds=4).fit(Regression(), Clients(), ckpt_path="last")

    def columns(path):
        rows = csv.DictReader((path / "metrics.csv").read_text().splitlines())
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    assert columns(path.parent) == columns(whole.run_dir)


def test_rows_are_on_the_disk_before_the_checkpoint_that_follows(tmp_path, monkeypatch):
    order, sync, save = [], MetricsCSV.sync, snapshot.save_checkpoint
    monkeypatch.setattr(MetricsCSV, "sync", lambda self: (order.append(self.path.read_text()), sync(self)))
    monkeypatch.setattr(
        snapshot, "save_checkpoint", lambda path, content: (order.append(content["epoch"]), save(path, content))
    )
    trainer = quiet_trainer(tmp_path, max_rounds=3, callbacks=[Checkpoint(max_overhead=1)])
    trainer.fit(Regression(), Clients())
    assert len(order) >= 6
    for text, rounds in zip(order[::2], order[1::2], strict=True):
        assert len(text.splitlines()) == 1 + rounds


class Failing(FakeWandbLogger):
    """Fails in everything that a run asks of it."""

    def fail(self, *args, **kwargs):
        raise ConnectionError("no route to host")

    experiment = property(fail)
    log_metrics = log_hyperparams = log_image = log_table = finalize = fail


def test_a_logger_that_fails_does_not_end_the_run(tmp_path, monkeypatch):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        monkeypatch.setattr(wandb, "begin", lambda *_: None)  # it fails later
        trainer = quiet_trainer(tmp_path, logger=Failing(), max_rounds=3)
        trainer.fit(Regression(), Clients())
    assert [str(w.message) for w in said if "no route" in str(w.message)] == [
        "trainer.logger: Failing failed, and the run goes on without it: ConnectionError: no route to host"
    ]
    assert len(read_metrics(trainer.run_dir / "metrics.csv")) == 3
    assert (trainer.run_dir / "summary.json").exists()
