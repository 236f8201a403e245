"""What a run says of itself: before the first round, after the last one, and when it is stopped."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.callbacks.progress import RoundProgress
from fedlight.cli.classes import completion
from fedlight.cli.command import main, parsers
from fedlight.run.summary import facts
from fedlight.server.sampling import Bernoulli
from fedlight.trainer import FederatedTrainer
from tests.helpers.tiny import Clients, Regression, quiet_trainer

TINY = ["--model=tests.helpers.tiny.Regression", "--data=tests.helpers.tiny.Clients", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.clients_per_round=2", "--trainer.max_rounds=2"]


def said(caplog):
    """The lines of the last call by their first words."""
    lines = [line for text in caplog.messages for line in text.splitlines() if "  " in line]
    return {name.strip(): phrase.strip() for name, phrase in (line.split("  ", 1) for line in lines)}


def fit(*more):
    main(["fit", *TINY, *QUIET, *more])


@pytest.fixture(autouse=True)
def _heard(caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")


def test_a_run_begins_with_what_is_trained_and_ends_with_what_came_of_it(caplog):
    fit("--algorithm=FedDyn", "--perturbation=SAM", "--trainer.devices=1")
    found = said(caplog)
    assert found["method"] == "FedDyn+SAM, 2 rounds of 1 local epoch, batches of 4"
    assert found["clients"] == "4, 2 a round; 3 / 6.5 / 12 samples (min / median / max)"
    assert found["model"] == "Regression, 4 parameters"
    assert found["device"].startswith("cpu, 1 process, ")
    assert found["device"].endswith(" each, 32-true")
    assert found["engine"] == "Eager: auto; steps of 2 clients are too few, or too unlike, to be one program"
    run = Path("runs/default/version_0")
    assert found["folder"] == str(run)
    assert "resumed" not in found
    assert found["rounds"].startswith("2 in ")
    assert found["val/loss"].endswith("after round 2")
    assert found["test"] == f"fedlight test -c {run}/config.yaml"
    assert found["go on"].endswith("--trainer.max_rounds 4")
    caplog.clear()
    main(found["go on"].split()[1:])  # a run that has had all its rounds, as its last line says
    found = said(caplog)
    assert found["resumed"] == f"after round 2, from {run}/checkpoints/last.ckpt"
    assert found["rounds"].startswith("4 in ")
    caplog.clear()
    main(["fit", "-c", str(run / "config.yaml"), "--ckpt_path=last"])
    assert "after round 4: the run is finished, as trainer.max_rounds=4. Raise that" in caplog.text


def test_names_of_files_are_quoted_for_the_shell(caplog):
    fit("--trainer.name=my run")
    assert said(caplog)["test"] == "fedlight test -c 'runs/my run/version_0/config.yaml'"


def test_a_run_that_is_stopped_says_how_to_go_on(caplog):
    with pytest.raises(SystemExit) as stop:
        fit("--model=tests.test_summary.Stopped")
    assert stop.value.code == 128 + signal.SIGTERM
    found = said(caplog)
    assert found["stopped"] == "after round 1"
    assert "--trainer.max_rounds" not in found["go on"]
    assert "test" not in found


class Stopped(Regression):
    def on_train_batch_start(self, batch, batch_idx):
        if not ASKED:
            ASKED.append(os.kill(os.getpid(), signal.SIGTERM))


ASKED = []


def test_the_facts_of_other_runs(tmp_path):
    class Facts(Regression):
        def on_round_start(self):
            session = self.trainer._session
            SEEN.append(facts(session))

    SEEN.clear()
    model = Facts()
    model.net.bias.requires_grad_(False)
    quiet_trainer(tmp_path, local_steps=3, sampler=Bernoulli(), engine="eager", max_rounds=1).fit(model, Clients())
    quiet_trainer(tmp_path, centralized=True, max_rounds=1).fit(Facts(), Clients())
    FederatedTrainer(fast_dev_run=True, accelerator="cpu").fit(Facts(), Clients())
    steps, central, quick = SEEN
    assert "1 round of 3 local steps" in steps["method"]
    assert "2 a round on average; 3 " in steps["clients"]
    assert steps["model"] == "Facts, 3 parameters, 1 frozen"
    assert steps["engine"] == "Eager: as trainer.engine says"
    assert central["method"].startswith("Central, ")
    assert central["clients"] == "all data in one place; 28 samples"
    assert "folder" not in quick


SEEN: list[dict[str, str]] = []


def test_weights_are_looked_at_of_the_best_round_where_no_checkpoint_is_named(caplog, capsys):
    """Of the run whose config.yaml is given; else of the newest run of the name, and without any that is said."""
    main(["test", *TINY])
    assert "ckpt_path: there is no checkpoint in runs/default, so the weights are untrained." in caplog.text
    fit()
    fit("--trainer.max_rounds=1")
    old, new = Path("runs/default/version_0"), Path("runs/default/version_1")
    for args, run, rounds in ((TINY, new, "1 round"), (["-c", str(old / "config.yaml")], old, "2 rounds")):
        caplog.clear()
        main(["validate", *args])
        assert f"Reading {run}/checkpoints/best.ckpt, written after {rounds}." in caplog.text
    (old / "checkpoints" / "best.ckpt").unlink()
    caplog.clear()
    main(["test", "-c", str(old / "config.yaml")])
    assert f"Reading {old}/checkpoints/last.ckpt" in caplog.text
    caplog.clear()
    main(["test", *TINY, "--ckpt_path=last"])
    assert f"Reading {new}/checkpoints/last.ckpt" in caplog.text


@pytest.mark.parametrize("columns", [50, 120])
def test_the_bar_shows_round_and_time_on_a_narrow_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    progress, metrics = RoundProgress(), {f"val/{name}": 0.25 for name in ("accuracy", "loss")}
    trainer = SimpleNamespace(current_round=0, max_rounds=5000, is_global_zero=True, callback_metrics={})
    progress.on_train_start(trainer, None)
    trainer.current_round, trainer.callback_metrics = 1234, metrics
    progress.on_round_end(trainer, None)
    progress.on_train_end(trainer, None)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).strip().splitlines()[-1].split("\r")[-1]
    assert re.fullmatch(r"round [━╸╺ ]+ 1234/5000 (-|\d+):[-\d]+(:[-\d]+)? +accuracy 0\.2500.*", last)
    assert ("val loss" in last) == (columns == 120)
    assert len(last) <= columns


def test_a_script_for_the_shell_completes_what_there_is():
    found = completion(["bash"], parsers())
    typed = ("fit --algorithm FedDy", "fit --algorithm fedprox", "test -c paper/c", "ana", "fit --trainer.max_r")
    bash = f"{found}\nCOMP_TYPE=9\n" + "".join(
        f"COMP_WORDS=(fedlight {words}); COMP_CWORD={len(words.split())}; _shtab_fedlight; echo ${{COMPREPLY[@]}}\n"
        for words in typed
    )
    run = subprocess.run(["bash", "-c", bash], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["FedDyn", "fedprox", "paper/cifar100", "analyze", "--trainer.max_rounds"]


def test_a_script_for_no_shell_or_without_shtab_is_refused(monkeypatch):
    with pytest.raises(MisconfigurationException, match="takes one of bash, zsh"):
        completion(["dos"], {})
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(MisconfigurationException, match=r'needs shtab: pip install "fedlight\[completion\]"'):
        completion(["bash"], {})


@pytest.mark.parametrize("centralized", [False, True])
def test_after_fit_the_best_round_is_tested_without_a_module_as_in_lightning(tmp_path, caplog, centralized):
    trainer, model, data = quiet_trainer(tmp_path, max_rounds=4, centralized=centralized), Worse(), Clients()
    with pytest.raises(MisconfigurationException, match="model: give a module, or fit one before"):
        trainer.test()
    trainer.fit(model, data)
    (as_it_is,) = trainer.test(model, data, verbose=False)
    caplog.clear()
    (best,) = trainer.test(verbose=False)
    assert f"Reading {trainer.run_dir}/checkpoints/best.ckpt, written after 1 round." in caplog.text
    assert best["test/loss"] > as_it_is["test/loss"]  # the first round was best by what this module validates
    (again,) = trainer.test(Worse(), data, ckpt_path="best", verbose=False)
    assert again == best


class Worse(Regression):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", float(self.current_epoch))
