"""The engine that records local steps once, and replays them for several clients side by side."""

import copy
import gc
from collections.abc import Callable, Generator, Iterable, Sequence

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule

from fedlight.data.arrays import ArrayDataset
from fedlight.engines.base import ClientTask, Engine, LocalTraining, named
from fedlight.engines.client_loop import ClientLoop
from fedlight.engines.compiled import CompiledStep
from fedlight.engines.cuda_graph.client_loop import Job, RecordedLoop
from fedlight.engines.cuda_graph.recorder import Recorder
from fedlight.engines.optimizers import FUSED, fuse
from fedlight.engines.recordable import Unrecordable, check_recordable, explain, is_outdated, values_of_step
from fedlight.local import ClientResult
from fedlight.module.optimizers import configure_optimizers
from fedlight.seeding import preserved_global_rng
from fedlight.server.sampling import share

MOST_SLOTS = 16
"""More clients side by side than this do not use a device better."""
_MEMORY = 0.8


def plan_slots(clients: int, free: int, each: int) -> int:
    """How many slots there should be besides the first one, which took ``each`` bytes and left so many ``free``."""
    return max(0, min(clients, MOST_SLOTS, 1 + int(_MEMORY * free / max(1, each))) - 1)


class CudaGraph(Engine):
    """Records the local step as CUDA graphs, in slots that are replayed side by side.

    A slot is a copy of the module with buffers of its own. The recorded code is the eager engine's, so the results are
    the same to the bit. A step that cannot be recorded (because it synchronises, branches on data, or runs Python code
    that matters) is found out before the first round.

    Args:
        slots: clients that are trained side by side; by default as many as a round has and memory allows.
        recorder: what records; by default CUDA graphs.
    """

    def __init__(self, slots: int | None = None, recorder: Callable[[torch.device], Recorder] | None = None) -> None:
        if slots is not None and slots < 1:
            raise ValueError(f"CudaGraph.slots={slots} must be at least 1.")
        self._wanted, self._recorder = slots, recorder or Recorder
        self._slots: list[RecordedLoop] = []
        self._plain: ClientLoop | None = None
        self._compiled: CompiledStep | None = None

    def setup(self, training: LocalTraining) -> None:
        """Record the first client's steps, in as many slots as fit.

        Raises:
            MisconfigurationException: if they cannot be recorded, saying why.
        """
        self._training, self._device = training, training.fabric.device
        if self._recorder is Recorder and self._device.type != "cuda":
            raise Unrecordable("cuda_graph", f"it needs a CUDA device, and trainer.accelerator gives {self._device}")
        check_recordable(training, "cuda_graph")
        _check_optimizer(training.module, self._device)
        assert training.example is not None
        self._values = values_of_step(training)
        with preserved_global_rng():
            self._make_slots(training.example)

    def train(self, round: int, tasks: Iterable[ClientTask]) -> list[ClientResult]:
        """Train the clients, in all slots side by side."""
        tasks = list(tasks)
        with preserved_global_rng():
            if is_outdated(self._training, self._values) and self._slots:
                self._drop_slots()
                assert self._training.example is not None
                self._make_slots(self._training.example, rehearse=False)
            jobs = self._jobs(round, tasks)
            results: dict[int, ClientResult] = {}
            for slot in self._slots:
                slot.recorder.begin()
            running = [self._run(round, queue, results) for queue in jobs]
            while running:
                running = [r for r in running if next(r, "done") is None]
            for slot in self._slots:
                slot.recorder.end()
            for task in tasks:
                if task.client not in results:
                    with named(round, task.client):
                        results[task.client] = self._train_plainly(round, task)
        return [results[task.client] for task in tasks]

    def teardown(self) -> None:
        """Let go of slots and graphs."""
        self._slots.clear()
        if self._plain is not None:
            self._plain.flat.release()
            self._plain = None

    def _drop_slots(self) -> None:
        """Give the memory of all slots back, which Python's cycles (a module and its penalized step) would keep."""
        self._slots.clear()
        gc.collect()
        torch.cuda.empty_cache()  # which does nothing where there is no device

    def _make_slots(self, example: ClientTask, rehearse: bool = True) -> None:
        self._compiled = CompiledStep(self._training) if self._training.compile else None
        _pool(example, self._device)  # all slots share the data: no part of what one takes
        before = _free(self._device)
        self._slots = [self._first_slot(example, rehearse)]
        after = _free(self._device)
        more = plan_slots(self._training.clients, after, before - after)
        if self._wanted is not None:
            more = self._wanted - 1
        for _ in range(more):
            try:
                slot = self._new_slot(example)
                slot.prepare(0, example)
                self._slots.append(slot)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                rank_zero_warn(f"trainer.engine=cuda_graph: device memory suffices for {len(self._slots)} slots.")
                break

    def _first_slot(self, example: ClientTask, rehearse: bool) -> RecordedLoop:
        """A slot in which a step has been run as it will be recorded, and recorded: so what is in the way is found."""
        module = self._training.module
        try:
            slot = self._new_slot(example)
            if rehearse:
                module.zero_grad()
                slot.rehearse(example)
                for name in (name for name, parameter in module.named_parameters() if parameter.grad is not None):
                    what = f"a function in the module uses its parameter {name}, also in a copy of the module"
                    raise Unrecordable("cuda_graph", f"{what}. Make a lambda or closure of it a method")
            slot.prepare(0, example)
            return slot
        except MisconfigurationException:
            raise
        except torch.OutOfMemoryError as error:
            raise Unrecordable("cuda_graph", f"device memory does not suffice for one slot ({error})") from error
        except Exception as error:
            raise Unrecordable("cuda_graph", explain(error, module, "cannot be recorded")) from error

    def _new_slot(self, example: ClientTask) -> RecordedLoop:
        module = copy.deepcopy(self._training.module)
        for parameter, own in zip(self._training.module.parameters(), module.parameters(), strict=True):
            vars(own).update(vars(parameter))  # what configure_optimizers may go by; a copy has lost it
        module.trainer = self._training.module._trainer
        pool = _pool(example, self._device)
        return RecordedLoop(self._training, module, pool, self._recorder(self._device), self._compiled)

    def _jobs(self, round: int, tasks: Sequence[ClientTask]) -> list[list[Job]]:
        """Each slot's clients, with all that they need recorded. Those that cannot be recorded are left out."""
        if not self._slots:  # memory has run out before
            return []
        takes = self._slots[0].takes
        fitting = [t for t in tasks if isinstance(t.dataset, ArrayDataset) and takes(t.dataset)]
        sizes = [len(t.dataset) for t in fitting]  # type: ignore[arg-type]
        fresh = configure_optimizers(self._training.module)
        jobs: list[list[Job]] = []
        for slot, mine in zip(self._slots, share(sizes, len(self._slots)), strict=True):
            jobs.append([])
            for i in mine:
                try:
                    jobs[-1].append(slot.prepare(round, fitting[i], fresh))
                except (RuntimeError, MisconfigurationException) as error:  # out of memory is one of them
                    torch.cuda.empty_cache()
                    what = explain(error, self._training.module, "could not be recorded")
                    rank_zero_warn(
                        f"trainer.engine=cuda_graph: client {fitting[i].client} is trained without a graph: {what}"
                    )
        return jobs

    def _run(self, round: int, jobs: list[Job], results: dict[int, ClientResult]) -> Generator[None, None, None]:
        for job in jobs:
            with named(round, job.task.client):
                results[job.task.client] = yield from job.run()

    def _train_plainly(self, round: int, task: ClientTask) -> ClientResult:
        if self._plain is None:
            self._plain = ClientLoop(self._training, self._training.module, None)
        try:
            return self._plain.train(round, task)
        except torch.OutOfMemoryError:
            if not self._slots:
                raise
        rank_zero_warn(
            f"trainer.engine=cuda_graph: device memory ran out in round {round + 1} while client {task.client} trained"
            " without a graph. From here on all clients do, as with trainer.engine=eager."
        )
        self._drop_slots()
        return self._plain.train(round, task)


def _check_optimizer(module: LightningModule, device: torch.device) -> None:
    optimizer = configure_optimizers(module).optimizer
    if not fuse(optimizer, device):
        name, names = type(optimizer).__name__, ", ".join(cls.__name__ for cls in FUSED)
        raise Unrecordable("cuda_graph", f"a step of {name} cannot be recorded; those of {names} can")
    if any(group.get("momentum") and group.get("dampening") for group in optimizer.param_groups):
        raise Unrecordable("cuda_graph", "SGD with dampening treats its first step differently")


def _pool(example: ClientTask, device: torch.device) -> ArrayDataset:
    """All data; where it does not fit on the device, room for the largest client, which the example is."""
    data = example.dataset
    assert isinstance(data, ArrayDataset)
    return data.to(device).pooled() if data.fits(device) else data.near(device)


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
