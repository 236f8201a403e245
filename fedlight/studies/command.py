"""``fedlight study``."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.run.folder import place
from fedlight.run.names import nearest
from fedlight.studies.plan import PlannedRun, RunSlot, command, plan, study_folder
from fedlight.studies.runner import StudyRunner
from fedlight.studies.study import load_study


def main(args: list[str]) -> int:
    """Run a study; the exit code is 0 if every run is finished, 1 if one failed, 130 or 143 if it was stopped."""
    options = _parser().parse_args(args)
    study = load_study(options.study)
    runs = selected(plan(study, options.count), options.only)
    for run in runs[:1]:
        command(study, run, options.root, resume=False)  # so that a command that cannot be built is known at once
    if options.dry_run:
        for run in runs:
            slot = RunSlot(run, study_folder(options.root, study))
            done = "# finished: " if slot.summary() is not None else ""
            print(done + shlex.join(command(study, run, options.root, slot.resumable())))
        return 0
    return StudyRunner(study, runs, options.root, options.jobs).run()


def selected(runs: Sequence[PlannedRun], only: Sequence[str]) -> list[PlannedRun]:
    """The runs that have given values of parameters: ``key=value``, the value as agents and YAML write it."""
    left = list(runs)
    for condition in only:
        key, _, text = condition.partition("=")
        known = sorted({name for run in runs for name in run.parameters})
        if key not in known:
            near = nearest(key, known)
            raise MisconfigurationException(f"--only {condition}: {key!r} is no parameter of this study{near}")
        left = [run for run in left if text == str(run.parameters[key]) or yaml.safe_load(text) == run.parameters[key]]
    if not left:
        raise MisconfigurationException(f"There is no run with {' and '.join(only)}: look at --dry-run without --only.")
    return left


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fedlight study",
        description="Run the YAML of a W&B sweep (grid or random) on this machine, without W&B. Runs that are finished "
        "are skipped, interrupted ones go on from their last checkpoint: the same command resumes a study.",
    )
    add = parser.add_argument
    add("study", type=place, help="the YAML: method, parameters, command")
    add("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--root", type=place, default=Path("runs"), metavar="DIR", help="runs go to DIR/<name of the study>/")
    add("--count", type=positive, metavar="N", help="at most N runs; needed for random without run_cap")
    add("--only", action="append", default=[], metavar="KEY=VALUE", help="only runs with this value; repeatable")
    add("--dry-run", action="store_true", help="print the commands and run nothing")
    return parser


def positive(text: str) -> int:
    """A number of an argument, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {value}")
    return value
