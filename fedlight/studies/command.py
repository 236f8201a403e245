"""``fedlight study``: every run a process of its own, several at a time."""

import argparse
import os
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.run.folder import place
from fedlight.run.names import nearest
from fedlight.studies.plan import OUTPUT, PlannedRun, RunSlot, command, log_tail, now, plan, study_folder, write_plan
from fedlight.studies.study import Study, load_study

_POLL_S = 0.1
_say = partial(print, flush=True)
_INTERRUPTED = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)


@dataclass
class _Active:
    """A run that is being trained."""

    slot: RunSlot
    process: "subprocess.Popen[bytes]"
    words: list[str]
    job: int
    began: float = field(default_factory=time.monotonic)
    began_at: str = field(default_factory=now)


class StudyRunner:
    """Runs what is left to run of a study below ``root``, so many ``jobs`` at the same time."""

    def __init__(self, study: Study, runs: Sequence[PlannedRun], root: Path, jobs: int = 1) -> None:
        self.study, self.runs, self.root, self.jobs = study, list(runs), root, jobs
        self.folder = study_folder(root, study)
        self.failed: dict[str, str] = {}
        self._slots = deque(RunSlot(run, self.folder) for run in self.runs)
        self._active: list[_Active] = []
        self._done = 0
        self._waiting_said = False
        self._stop = self._signals = 0

    def run(self) -> int:
        """Run them all: the exit code is 0 if every run is finished, 1 if one failed, or what a signal asks for."""
        write_plan(self.folder, self.study, self.runs)
        finished = [slot for slot in self._slots if slot.summary() is not None]
        newer = [slot.newer(command(self.study, slot.run, self.root, resume=False)) for slot in finished]
        self._slots = deque(slot for slot in self._slots if slot not in finished)
        self._done = len(self.runs) - len(self._slots)
        counts = f"{len(self.runs)} runs, {self._done} finished before, {len(self._slots)} to do"
        _say(f"study {self.study.name}: {counts}, in {self.folder}")
        if files := set().union(*newer):
            _say(
                f"{', '.join(sorted(files))}: written after {sum(map(bool, newer))} finished runs began, which stay as"
                " they are. If other runs are meant now, give the study another name."
            )
        if self.study.early_terminate:
            _say("early_terminate is W&B's: here, every run trains to its end.")
        with handling(self._on_signal, signal.SIGINT, signal.SIGTERM):
            while self._active or (self._slots and not self._stop):
                self._begin_runs()
                self._end_runs()
                time.sleep(_POLL_S)
        return self._conclude()

    def _begin_runs(self) -> None:
        for _ in range(len(self._slots)):
            if len(self._active) >= self.jobs or self._stop:
                return
            slot = self._slots.popleft()
            descriptor = slot.take()
            if descriptor is None:
                self._slots.append(slot)
                if not self._waiting_said and not self._active:
                    _say(f"{len(self._slots)} runs are in the hands of another process; waiting for them.")
                    self._waiting_said = True
            elif slot.summary() is not None:  # another process has finished it
                slot.release()
                self._finish_line(slot, "finished by another process")
            else:
                self._begin(slot, descriptor)

    def _begin(self, slot: RunSlot, descriptor: int) -> None:
        words = command(self.study, slot.run, self.root, slot.resumable())
        job = min(set(range(self.jobs)) - {active.job for active in self._active})
        with (slot.path / OUTPUT).open("ab") as output:
            output.write(f"# {now()}: {' '.join(words)}\n".encode())
            output.flush()
            try:
                # In a group of its own, so that Ctrl-C reaches it through this process only.
                how: Any = {"env": self._environment(job), "pass_fds": (descriptor,), "process_group": 0}
                pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
                process = subprocess.Popen(words, **how, **pipes)
            except OSError as error:
                self._fail(slot, words, f"{words[0]} cannot be started: {error.strerror}", {})
                slot.release()
                return
        active = _Active(slot, process, words, job)
        slot.record(words, status="running", began=active.began_at, pid=process.pid)
        self._active.append(active)
        if self._stop:  # asked for while the process was being started
            process.terminate()

    def _environment(self, job: int) -> dict[str, str]:
        """Cores and, where ``CUDA_VISIBLE_DEVICES`` lists several, GPUs are shared among the jobs."""
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.jobs > 1:
            from fedlight.run.processes import available_cores

            env.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // self.jobs)))
            devices = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
            if len(devices) > 1:
                env["CUDA_VISIBLE_DEVICES"] = devices[job % len(devices)]
        return env

    def _end_runs(self) -> None:
        for active in list(self._active):
            if (code := active.process.poll()) is not None:
                self._active.remove(active)
                self._end(active, code)
                active.slot.release()

    def _end(self, active: _Active, code: int) -> None:
        slot, seconds = active.slot, time.monotonic() - active.began
        times: Any = {"returncode": code, "began": active.began_at, "ended": now(), "seconds": round(seconds, 1)}
        summary = slot.summary()
        if code == 0 and summary is not None:
            slot.record(active.words, status="finished", **times)
            metric = self.study.metric or "val/accuracy"
            value = summary.get("final", {}).get(metric)
            shown = "" if value is None else f", {metric} {value:.4g}"
            self._finish_line(slot, f"finished in {seconds:.0f} s{shown}")
        elif self._stop and code in _INTERRUPTED:
            slot.record(active.words, status="interrupted", **times)
            _say(f"{slot.run.label}: interrupted after {seconds:.0f} s")
        else:
            said = log_tail(slot.path / OUTPUT)
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            reason = "it ended without a summary.json" if code == 0 else reason
            self._fail(slot, active.words, f"{reason}\n{said}".strip(), times)

    def _fail(self, slot: RunSlot, words: list[str], error: str, times: dict[str, Any]) -> None:
        slot.record(words, status="failed", error=error, **times)
        self.failed[slot.run.name] = error
        self._finish_line(slot, f"FAILED: {error.splitlines()[0]}")

    def _finish_line(self, slot: RunSlot, what: str) -> None:
        self._done += 1
        width = len(str(len(self.runs)))
        _say(f"[{self._done:>{width}}/{len(self.runs)}] {slot.run.label}: {what}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the runs to stop after their round; the second time, at once; the third time, kill them."""
        self._stop = number
        self._signals += 1
        for active in self._active:
            active.process.send_signal(signal.SIGTERM if self._signals < 3 else signal.SIGKILL)
        if self._signals == 1:
            _say(f"stopping: {len(self._active)} runs end their round; Ctrl-C again to end them at once")

    def _conclude(self) -> int:
        if self.failed:
            _say(f"{len(self.failed)} of {len(self.runs)} runs failed; what they said is in their {OUTPUT}:")
            for name, error in self.failed.items():
                _say(f"  {self.folder / name}\n" + "\n".join(f"    {line}" for line in error.splitlines()))
        if self._stop:
            _say("interrupted; the same command goes on from here")
            return 128 + self._stop
        return 1 if self.failed else 0


@contextmanager
def handling(handler: Any, *numbers: int) -> Iterator[None]:
    """Handle signals inside."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def main(args: list[str]) -> int:
    """Run a study; the exit code is 0 if every run is finished, 1 if one failed, 130 or 143 if it was stopped."""
    options = _parser().parse_args(args)
    study = load_study(options.study)
    runs = selected(plan(study, options.count, study_folder(options.root, study)), options.only)
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
        value: Any = text
        with suppress(yaml.YAMLError):
            value = yaml.safe_load(text)
        left = [run for run in left if run.parameters[key] in (text, value) or text == str(run.parameters[key])]
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
