"""How a run shares the cores of a CPU: processes, and threads of each."""

import os
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from fedlight.engines.batch_order import num_batches
from fedlight.penalties.batches import batch_size
from fedlight.run.context import RunContext
from fedlight.run.evaluation import evaluating
from fedlight.run.preflight import first_samples, trial_step

LARGE_STEP = 5e8
"""FLOP of a local step from which on a second thread makes it faster: ten milliseconds of one core."""
_STEP_S, _FLOP_PER_S = 4e-4, 3e10
"""What a local step takes on one core: so much in Python, and its arithmetic."""
_WORTH_S = 60.0
"""Seconds of training on one core from which on starting more processes, some seconds, is worth it."""


def num_processes(step_flop: float, steps: float, clients: int, rounds: int, cores: int) -> int:
    """How many processes are fastest for a workload.

    A process a core is faster than a thread a core, as clients need not wait for each other. Where steps are large the
    choice does not depend on how many there are, and where they are small every process has one thread: so a run that
    is continued for more rounds, or cut into several, gives the same bits.

    Args:
        step_flop: floating-point operations of a local step, forward and backward.
        steps: local steps of a round, of all clients.
        clients: K.
        rounds: T.
        cores: of the machine.
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
    torch.set_num_threads(1 if flop < LARGE_STEP else cores)


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
