"""Processes: how many share the cores of a CPU, with how many threads, and what ends them, signals or each other."""

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule

from fedlight.data.datamodule import first_samples
from fedlight.engines import make_engine
from fedlight.engines.batch_order import num_batches
from fedlight.penalties.batches import batch_size
from fedlight.run.attempt import evaluating, trial_step
from fedlight.run.context import RunContext
from fedlight.server.sampling import expected_clients

LARGE_STEP = 5e8
"""FLOP of a local step from which on a second thread makes it faster: ten milliseconds of one core."""
LARGE_BATCHED_STEP = 1e8
"""FLOP of a step of clients side by side from which on it does: its operations are as many, and longer each."""
_STEP_S, _FLOP_PER_S = 4e-4, 3e10
"""What a local step takes on one core: so much in Python, and its arithmetic."""
_WORTH_S = 60.0
"""Seconds of training on one core from which on starting more processes, some seconds, is worth it."""
_PATIENCE_S = 5.0
_children: list["subprocess.Popen[bytes]"] = []  # of the program: a second fit goes on with those of the first


def num_processes(step_flop: float, steps: float, clients: int, rounds: int, cores: int) -> int:
    """How many processes are fastest for local steps of so many FLOP, so many in a round of all its clients.

    A process a core is faster than a thread a core, as clients need not wait for each other. Where steps are large the
    choice does not depend on how many there are, and where they are small every process has one thread: so a run that
    is continued for more rounds, or cut into several, gives the same bits.
    """
    seconds = rounds * steps * (_STEP_S + step_flop / _FLOP_PER_S)  # on one core
    return max(1, min(cores, clients)) if step_flop >= LARGE_STEP or seconds >= _WORTH_S else 1


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_devices(run: RunContext) -> Any:
    """``trainer.devices``, where ``auto`` means a CPU: the number of processes.

    More than one is chosen for the ``fedlight`` command only: each further process runs the program again from its
    start, which a script has to be written for.
    """
    settings, given, kind = run.settings, run.settings["devices"], run.settings["accelerator"]
    if given != "auto" or not (kind == "cpu" or (kind == "auto" and not torch.accelerator.is_available())):
        return given
    if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ:  # a launcher, or this process's first one, has chosen
        here = os.environ.get("LOCAL_WORLD_SIZE")
        return int(here) if here else int(os.environ["WORLD_SIZE"]) // settings["num_nodes"]
    alone = settings["num_nodes"] == 1 and settings["strategy"] == "auto" and not settings["fast_dev_run"]
    if run.command != "fit" or not alone or "OMP_NUM_THREADS" in os.environ or not started_as_command():
        return given
    work = estimate(run)
    return given if work is None else num_processes(*work, available_cores())


def use_threads(run: RunContext, cleanup: ExitStack) -> None:
    """Choose threads for a fit in one process on a CPU, until the end, where that is fedlight's choice.

    Operations of a few microseconds only wait for a second thread, above all when another program has its core.
    """
    cores = available_cores()
    chosen = "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() != cores  # by the user, or by Fabric
    if run.fabric.device.type != "cpu" or run.fabric.world_size > 1 or chosen:
        return
    batch = first_samples(run.datamodule, int(run.federation.sizes.argmax()), run.datamodule.batch_size)
    flop = step_flop(run.module, run.evaluator.prepare(batch), run.fabric.strategy.precision.forward_context())
    cleanup.callback(torch.set_num_threads, torch.get_num_threads())
    large, engine = LARGE_STEP, run.settings["engine"]
    if engine != "auto" and make_engine(engine).together:
        flop, large = flop * expected_clients(run.trainer.sampler), LARGE_BATCHED_STEP
    torch.set_num_threads(1 if flop < large else cores)


def started_as_command() -> bool:
    """Whether this program is ``fedlight`` or ``python -m fedlight``, which may be started once more."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name == "fedlight.__main__" if spec is not None else Path(sys.argv[0]).name == "fedlight"


def estimate(run: RunContext) -> tuple[float, float, int, int] | None:
    """FLOP of a step, steps and clients of a round, and rounds; None where the model cannot be tried out yet."""
    settings, data = run.settings, run.datamodule
    try:
        data.prepare_data()
        data.setup("fit")
        sizes = [data.client_size(i) for i in range(data.num_clients)]
        batch = first_samples(data, max(range(len(sizes)), key=sizes.__getitem__), data.batch_size)
        flop = step_flop(run.module, batch)
    except Exception:  # whatever it is, it comes again where it can be explained
        return None
    wanted = settings["clients_per_round"]
    clients = wanted if isinstance(wanted, int) else max(1, round(wanted * len(sizes)))
    batches = num_batches(round(sum(sizes) / len(sizes)), data.batch_size, settings["limit_train_batches"])
    per_client = settings["local_steps"] or settings["local_epochs"] * batches
    return flop, clients * per_client, clients, settings["max_rounds"]


def step_flop(module: LightningModule, batch: Any, context: AbstractContextManager[Any] | None = None) -> float:
    """FLOP of one local step on a batch: three times the forward pass's.

    Those of matrix products, convolutions and attention are counted; for what is not (recurrent layers, say) every
    parameter counts as one multiplication and addition per sample.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads slowly

    with evaluating(module), FlopCounterMode(display=False) as counter:
        trial_step(module, batch, context)
    dense = 2 * batch_size(batch) * sum(p.numel() for p in module.parameters())
    return 3.0 * max(int(counter.get_total_flops()), dense)


def watch_children(run: RunContext) -> Callable[[], None]:
    """Watch the processes that Fabric has started, in its place: it would kill this one and not say how to go on.

    What is returned ends the watch.
    """
    started = getattr(getattr(run.fabric.strategy, "launcher", None), "procs", [])
    _children.extend(started)
    started.clear()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            # The main thread finds out by itself when it next waits for the others, unless it waits for ever.
            if any(child.poll() for child in _children) and not ended.wait(_PATIENCE_S):
                print(f"fedlight: error: {_what_died(run)}", file=sys.stderr, flush=True)
                for child in _children:
                    child.kill()
                os._exit(1)

    if _children:
        threading.Thread(target=look, daemon=True).start()
    return ended.set


def lost_process(run: RunContext, error: BaseException) -> str | None:
    """What is to be said in place of an error that torch.distributed raised; None for any other error."""
    if not isinstance(error, RuntimeError) or not raised_in(error).startswith("torch.distributed"):
        return None
    end = time.monotonic() + 2
    while _children and not any(child.poll() for child in _children) and time.monotonic() < end:
        time.sleep(0.05)
    return _what_died(run)


def raised_in(error: BaseException) -> str:
    """The module that an error was raised in."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def _what_died(run: RunContext) -> str:
    fabric, last = run.fabric, None if run.folder is None else run.folder.checkpoint("last")
    who, how = f"another of the {fabric.world_size} processes", "has ended; if it said why, that is above"
    for rank, child in enumerate(_children, 1):
        if code := child.poll():
            who = f"process {rank} of {fabric.world_size} (pid {child.pid})"
            how = f"has ended with exit code {code}; what it said is above"
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}" + (", perhaps for its memory" if code == -9 else "")
            break
    go_on = f"continue with ckpt_path={last}" if last is not None and last.exists() else "there is no checkpoint yet"
    return f"{who} {how}. This one, process {fabric.global_rank}, cannot go on without it: {go_on}."


class Signals:
    """Remembers a request to stop; a second one interrupts at once."""

    def __init__(self) -> None:
        self.received = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.received:
            self.raise_received(number)
        self.received = number

    def raise_received(self, number: int) -> None:
        """Raise what an unhandled signal would have raised: KeyboardInterrupt, or SystemExit with its exit code."""
        if number:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def deferred_signals(active: bool = True) -> Iterator[Signals]:
    """Catch SIGINT and SIGTERM inside (in the main thread), restore the handlers outside."""
    signals = Signals()
    if not active or threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before: dict[int, Any] = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_by_signal(number: int) -> None:
    """Let the process die by a signal instead of leaving with a code: whoever waits for it sees that it was stopped."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown(exit_code=0)  # a run that was stopped on purpose has not failed
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
