"""What a run makes of the trainer's settings: processes, clock and profiler, local training that leaves no trace."""

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.profilers import AdvancedProfiler, PassThroughProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fedlight.engines import runs_functions, runs_python
from fedlight.engines.base import ClientTask, Findings, LocalTraining
from fedlight.engines.eager import Eager
from fedlight.engines.moving import say_changed
from fedlight.engines.trial import try_steps
from fedlight.local import GradientClip
from fedlight.module.parameters import ParameterLayout, flat_parameters, load_tensors
from fedlight.module.state import ModuleState
from fedlight.penalties.step import penalized_step
from fedlight.run.context import RunContext
from fedlight.run.folder import optional
from fedlight.server.sampling import expected_clients

PROFILERS: dict[str, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def make_fabric(settings: dict[str, Any]) -> Fabric:
    """Fabric with the trainer's devices, processes and precision.

    Raises:
        MisconfigurationException: if they are not to be had here.
    """
    keys = ("accelerator", "devices", "num_nodes", "strategy", "precision")
    try:
        fabric = Fabric(**{key: settings[key] for key in keys})
        main = sys.modules["__main__"]
        fixed = not (main.__spec__ or Path(getattr(main, "__file__", "")).is_file())
        if fixed and fabric.world_size > settings["num_nodes"] and getattr(fabric.strategy, "launcher", None):
            raise RuntimeError(
                "every further process runs the program again, and python -c, standard input and notebooks have no file"
                " to run. Put it into one, or set trainer.devices=1"
            )
        return fabric
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        given = ", ".join(f"trainer.{key}={settings[key]!r}" for key in keys)
        raise MisconfigurationException(f"{given} is not possible here: {error}") from error


def be_deterministic(device: torch.device, cleanup: ExitStack) -> None:
    """Make torch refuse kernels that are not deterministic, until the end."""
    cleanup.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
    torch.use_deterministic_algorithms(True)
    if device.type == "cuda":  # what cuBLAS asks for; read when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def is_changed(run: RunContext) -> bool:
    """Whether hooks of the start have frozen something, or set other parameters or buffers than the server has."""
    if ParameterLayout.of(run.module) != run.layout:
        return True
    server, held = run.federation.state, dict(run.module.named_buffers())
    same = all(k in server.buffers and torch.equal(v, server.buffers[k]) for k, v in held.items())
    changed = not (same and torch.equal(flat_parameters(run.module), server.views["server"]))
    if changed and run.resumed:
        rank_zero_info("model: on_fit_start or on_train_start set parameters or buffers: those of ckpt_path stay.")
    return changed


class Movers:
    """What clients and evaluations change of a run's module besides its trained parameters."""

    def __init__(self, run: RunContext) -> None:
        self._run = run

    @cached_property
    def state(self) -> ModuleState:
        """All of the module but the content of what the federation holds: what is trained or moves, and buffers."""
        return ModuleState({"self": self._run.module}, self._held)

    def _held(self) -> list[Tensor]:
        run = self._run
        names = {info.name for info in run.layout.parameters} | run.federation.state.buffers.keys()
        return [*(p for name, p in run.module.named_parameters() if name in names), *run.module.buffers()]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Whatever an evaluation in here changes in the module is undone on exit."""
        self.state.refresh()
        try:
            yield
        finally:
            self.state.restore()
            load_tensors(self._run.module, self._run.federation.state.buffers)

    def adopt(self, names: Iterable[str]) -> None:
        """Treat these parameters, which have not moved yet, as buffers."""
        federation = self._run.federation
        new = {n: self.unmoved(n).clone() for n in names if n not in federation.state.buffers}
        federation.clients.initial_buffers = {**federation.clients.initial_buffers, **new}
        federation.state.buffers = {**federation.state.buffers, **new}

    def unmoved(self, name: str) -> Tensor:
        """A parameter without a gradient as it is between two clients."""
        return self._run.module.get_parameter(name).detach()

    def join(self, late: list[str]) -> None:
        """Parameters without gradient that a client of the round was the first to move are buffers of all."""
        if late:
            rank_zero_info(f"model: from now on {', '.join(late)} change without a gradient, and count as buffers.")
            self.adopt(late)
            self.state.capture()


def make_profiler(wanted: Profiler | str | None) -> Profiler:
    """The profiler of ``trainer.profiler``.

    Raises:
        MisconfigurationException: if there is none of that name.
    """
    if isinstance(wanted, Profiler):
        return wanted
    if wanted is None:
        return PassThroughProfiler()
    if str(wanted).lower() not in PROFILERS:
        raise MisconfigurationException(
            f"trainer.profiler={wanted!r} must be one of {[*PROFILERS]}, a Profiler of Lightning, or null."
        )
    profiler: Profiler = PROFILERS[wanted.lower()]()
    return profiler


# Lightning's PyTorchProfiler counts actions of this name: its schedule (wait, warm up, record) is one of rounds here.
_ACTIONS = {"train": "clients.training_step"}


class RoundClock:
    """Seconds of a round's parts, each also an action of the profiler, which is told when it begins and ends.

    A part that trains or evaluates on a CUDA device ends when the device has done its work.
    """

    def __init__(self, profiler: Profiler, device: torch.device) -> None:
        self.profiler, self._cuda = profiler, device if device.type == "cuda" else None
        self._ended: float | None = None
        self.begin()

    def begin(self) -> None:
        """A round begins."""
        self._began = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure what is done inside as ``time/<part>_s``."""
        action = f"[FederatedTrainer]{_ACTIONS.get(part, part)}"
        self.profiler.start(action)
        began = time.perf_counter()
        try:
            yield
            if self._cuda is not None:
                torch.cuda.synchronize(self._cuda)
        finally:
            self._parts[part] = time.perf_counter() - began
            self.profiler.stop(action)

    def metrics(self) -> dict[str, float]:
        """Seconds of the parts, of the round until now, and of what came after the round before (``time/save_s``)."""
        before, self._ended = self._ended, time.perf_counter()
        out = {f"time/{part}_s": seconds for part, seconds in self._parts.items()}
        saving = 0.0 if before is None else self._began - before
        return {**out, "time/save_s": saving, "time/round_s": self._ended - self._began}


def start_profiler(profiler: Profiler, folder: Path | None, rank: int, cleanup: ExitStack) -> Profiler:
    """Begin to profile a fit; at its end the report goes to ``<folder>/fit-profile-<rank>.txt``, or to the log."""
    if isinstance(profiler, PassThroughProfiler):  # its report would be an empty file
        return profiler
    if profiler.filename is None and folder is not None:
        profiler.filename = "profile"
    profiler.setup("fit", rank, None if folder is None else str(folder))
    cleanup.enter_context(optional(profiler, "trainer.profiler's report"))
    cleanup.callback(profiler.teardown, "fit")
    cleanup.callback(profiler.describe)
    return profiler


def local_training(run: RunContext, movers: Movers) -> LocalTraining:
    """What all local trainings of the run have in common."""
    vars(movers).pop("state", None)  # clients find the module as it is now, not as an evaluation before has seen it
    trainer, settings, data, federation = run.trainer, run.settings, run.datamodule, run.federation
    clip, engine, per_round = settings["gradient_clip_val"], settings["engine"], expected_clients(trainer.sampler)
    federation.clients.read = settings["compile"] or not (engine in ("auto", "eager") or isinstance(engine, Eager))
    step = penalized_step(run.module)
    federation.clients.compared = [name for p in (step.penalties if step else ()) for name in p.compares]
    training = LocalTraining(
        module=run.module,
        fabric=run.fabric,
        seed=trainer.seed,
        batch_size=data.batch_size,
        epochs=trainer.local_epochs,
        steps=trainer.local_steps,
        limit_batches=settings["limit_train_batches"],
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        clip=None if clip is None else GradientClip(clip, settings["gradient_clip_algorithm"]),
        perturbation=trainer.perturbation,
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        call=run.hooks,
        compile=settings["compile"],
        channels_last=settings["channels_last"],
        lr_factors=trainer.algorithm.lr_factors,
        optimizer_state=trainer.algorithm.optimizer_state,
        clients=math.ceil(per_round / run.fabric.world_size),
        per_round=per_round,
        sizes=Counter(federation.sizes[federation.sizes > 0].tolist()),
        example=_example(run),
    )
    frozen = any(not p.requires_grad for p in run.module.parameters())
    # What steps change shows when it is put back; whether they give what penalties compare shows in a trial only.
    records = not runs_python(settings["engine"], training)
    if not frozen and not federation.clients.compared and not records:
        return replace(training, state=movers.state)
    findings = try_steps(training, run.hooks.module_only, records, runs_functions(settings["engine"], training))
    movers.adopt(findings.moving)
    _say(findings, federation.clients.buffer_policy)
    return replace(training, findings=findings, state=movers.state, example=_example(run))


def _example(run: RunContext) -> ClientTask:
    run.federation.begin()
    return run.federation.clients.task(int(run.federation.sizes.argmax()), run.schedule.lrs, honest=True)


def _say(findings: Findings, policy: str) -> None:
    if moving := findings.moving:
        some = ", ".join(moving[:3]) + (f" and {len(moving) - 3} more" if len(moving) > 3 else "")
        rank_zero_info(f"model: {some} change without a gradient: they follow trainer.buffers={policy}, as buffers.")
    say_changed(findings.changed)
