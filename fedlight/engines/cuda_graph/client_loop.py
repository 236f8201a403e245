"""A slot whose local steps are recorded, and replayed on other batches."""

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fedlight.data.arrays import ArrayDataset
from fedlight.engines.base import ClientTask, LocalTraining
from fedlight.engines.batch_order import batch_order, draws_of, same_storage
from fedlight.engines.client_loop import ClientLoop
from fedlight.engines.compiled import CompiledStep
from fedlight.engines.cuda_graph.recorder import Recorder, Segment, Work, segments
from fedlight.engines.hyperparameters import Values, lr_sum, set_values
from fedlight.engines.optimizers import fuse
from fedlight.local import ClientResult, LocalObjective
from fedlight.module.logs import collecting_logs
from fedlight.module.optimizers import Optimization, about, configure_optimizers
from fedlight.module.step import IndexedBatch
from fedlight.perturbations.base import State

_WORTH = 8
"""So many steps are done anew before a piece is recorded: to record one takes as long as replays of it save."""
_MOST = 64
"""A slot keeps at most so many recordings; other pieces are done anew."""


@dataclass(frozen=True)
class _Recording:
    """Recorded steps and what they read."""

    replay: Work  # does the steps
    rows: Tensor  # the samples to take from the storage, [steps, n]
    draws: dict[str, Tensor]  # their augmentation, [steps, n] each


class RecordedLoop(ClientLoop):
    """Trains one client at a time by replaying recorded steps. What is recorded is :meth:`ClientLoop._step` itself.

    Everything that differs between clients, rounds and steps is copied into tensors that stay where they are: model,
    buffers, optimizer state, learning rate, objective, perturbation state, samples, augmentation, and sums of what is
    logged. The slot has a copy of the module. Its ``pool`` holds all clients' samples, or has room for those of one.
    """

    def __init__(
        self,
        training: LocalTraining,
        module: LightningModule,
        pool: ArrayDataset,
        recorder: Recorder,
        compiled: CompiledStep | None,
    ) -> None:
        super().__init__(training, module, compiled)
        self.pool, self.recorder, self._show.recorded, self.log.numbers = pool, recorder, True, False
        self.optimizer = configure_optimizers(module).optimizer
        fuse(self.optimizer, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=self.device)
        if getattr(self._precision, "scaler", None) is not None:
            self._scaler = torch.amp.GradScaler(self.device.type)
            self._scaler.scale(torch.zeros((), device=self.device))  # the first call makes the tensors of its state
            self._scaler_state = self._scaler.state_dict()
        self._objective: dict[str, Tensor] = {}
        self._state: State = {}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._prepared = False
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._asked: Counter[tuple[Any, ...]] = Counter()

    def takes(self, dataset: ArrayDataset) -> bool:
        """Whether a client's samples are in the pool, or there is room for them."""
        if dataset.fits(self.device):
            return same_storage(dataset.to(self.device), self.pool)
        return dataset.storage.kind == self.pool.storage.kind and len(dataset) <= len(self.pool)

    def prepare(self, round: int, task: ClientTask, fresh: Optimization | None = None) -> "Job":
        """Plan a client's round, and record what has not been recorded yet.

        It disturbs whatever the slot is training: call it for all clients of a round before the first :meth:`Job.run`.
        ``fresh`` is what ``configure_optimizers`` gives in this round, which saves asking for every client.
        """
        job = Job(self, round, task, fresh)
        job.recordings = [self._recording(task, piece, not self._prepared) for piece in job.pieces]
        self._prepared = True
        return job

    def rehearse(self, task: ClientTask) -> None:
        """Run a step as it will be recorded, the second time with an error where it waits for the device.

        All of the process gets that error, threads that write checkpoints included: only before training.
        """
        piece = replace(Job(self, 0, task).pieces[0], steps=1)
        work, *_ = self._work(task, piece)
        self.recorder.begin()
        with self.recorder.ordered():
            self.load(task)
            work()
            with self.recorder.strict():
                work()
        self.recorder.end()

    def _recording(self, task: ClientTask, piece: Segment, first: bool) -> "_Recording":
        """The steps for a piece of a client's round: recorded, where that is worth it or comes first."""
        parts = task.objective.parts()
        fixed = [{name: value for name, value in group.items() if name != "lr"} for group in piece.values]
        key = (tuple(parts), tuple(task.perturbation), piece.sizes, piece.steps, repr(fixed))
        if key in self._recordings:
            return self._recordings[key]
        self._asked[key] += piece.steps
        work, rows, draws = self._work(task, piece)
        if not first and (self._asked[key] < _WORTH or len(self._recordings) >= _MOST):
            return _Recording(self.recorder.anew(work), rows, draws)
        # All steps of a piece are alike: to warm up, one is as good as many.
        self._recordings[key] = _Recording(self.recorder.record(work, partial(work, 1)), rows, draws)
        return self._recordings[key]

    def _make_room(self, task: ClientTask) -> LocalObjective:
        """Tensors for what differs between clients; the objective that steps read."""
        parts = task.objective.parts()
        for name, value in (parts | {f"state/{k}": v for k, v in task.perturbation.items()}).items():
            held, key = (self._state, name[6:]) if name.startswith("state/") else (self._objective, name)
            if key not in held:
                like = value if isinstance(value, Tensor) else self.flat.params.new_full((), value)
                held[key] = like.to(self.device, copy=True)
        return LocalObjective.of(self.flat.params, {name: self._objective[name] for name in parts})

    def _work(self, task: ClientTask, piece: Segment) -> tuple[Callable[..., None], Tensor, dict[str, Tensor]]:
        """Some local steps as a function of what is in the slot's tensors, and the samples that they read.

        The function does all steps of the piece, or as many of the first ones as it is told.
        """
        objective, sizes = self._make_room(task), piece.sizes
        set_values(self.optimizer, piece.values)
        shape = (piece.steps, sum(sizes))
        rows = torch.zeros(shape, dtype=torch.long, device=self.device)
        drawn = self.pool.draw(rows.numel(), torch.Generator())
        draws = {name: value.view(shape).to(self.device) for name, value in drawn.items()}

        def work(steps: int = piece.steps) -> None:
            with collecting_logs(self.module, self.log):
                self.log.reset()
                for name, (value, weight) in self._sums.items():
                    self.log.merge(name, value, weight, self.log.reduction(name))
                state = self._state
                for i in range(steps):
                    batches = self._read(sizes, rows[i], {name: value[i] for name, value in draws.items()})
                    state, _ = self._step(objective, batches, state)
                self._keep(state)

        return work, rows, draws

    def _read(self, sizes: tuple[int, ...], rows: Tensor, draws: dict[str, Tensor]) -> list[IndexedBatch]:
        parts = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        batches = [self.pool.batch(rows[part], {name: value[part] for name, value in draws.items()}) for part in parts]
        return [(self._precision.convert_input(self._transfer(batch)), 0) for batch in batches]

    def _keep(self, state: State) -> None:
        """Write what the steps have changed, besides model and optimizer, to where the next ones find it."""
        for name, value in state.items():
            if value is not self._state[name]:
                self._state[name].copy_(value)
        for name, sums in self.log.sums().items():
            held = self._sums.setdefault(name, (torch.empty_like(sums[0]), torch.empty_like(sums[1])))
            for old, new in zip(held, sums, strict=True):
                old.copy_(new)

    @torch.no_grad()
    def load(self, task: ClientTask) -> None:
        """Everything is as at the start of the client's round."""
        if isinstance(task.dataset, ArrayDataset) and not task.dataset.fits(self.device):
            own = task.dataset.near(self.device)
            for room, leaf in zip(self.pool.storage.leaves, own.storage.leaves, strict=True):
                room[: len(leaf)].copy_(leaf)
        self.flat.params.copy_(task.objective.start)
        given: tuple[Mapping[str, Tensor | float], ...] = task.buffers, task.objective.parts(), task.perturbation
        for held, values in zip((self.buffers, self._objective, self._state), given, strict=True):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    held[name].copy_(value)
                else:
                    held[name].fill_(value)
        if self._scaler is not None:
            self._scaler.load_state_dict({**self._scaler_state, "scale": task.loss_scale})
        # The optimizers that can be recorded all begin with zeros.
        for value in (v for state in self.optimizer.state.values() for v in state.values()):
            value.zero_()
        for name, (value, weight) in self._sums.items():
            value.fill_({"min": float("inf"), "max": -float("inf")}.get(self.log.reduction(name), 0.0))
            weight.zero_()

    def finish(self, job: "Job") -> ClientResult:
        """What the client's training gave: copies, as the next client overwrites the slot."""
        state = {name: self._state[name].clone() for name in job.task.perturbation}
        self.log.reset()
        for name, (value, weight) in self._sums.items():
            self.log.merge(name, value.clone(), weight.clone(), self.log.reduction(name))
        return self._result(job.task, state, job.plan.num_steps, lr_sum(job.values, job.plan.num_steps))


class Job:
    """One client's round in a slot: the ``plan`` of its samples, ``values`` of each step, and recordable ``pieces``.

    ``fresh`` is what ``configure_optimizers`` gives, where the caller has just asked.
    """

    def __init__(self, slot: RecordedLoop, round: int, task: ClientTask, fresh: Optimization | None = None) -> None:
        training, dataset = slot.training, task.dataset
        assert isinstance(dataset, ArrayDataset)
        self.task = task
        self.plan = batch_order(round, task, training)
        with about(slot.module, task.client):
            self.values = slot.schedule.values(task, self.plan.steps_per_epoch, fresh)
        self.pieces = segments(self.plan.steps(training.accumulate_grad_batches), self.values)
        self.recordings: list[_Recording] = []
        self._slot = slot
        self._seed = task.local_seed(training.seed, round)
        # Copied to the device here, before the slot is busy: such a copy waits for what its stream has to do.
        self._draws = draws_of(round, task, self.plan, training)
        order = self.plan.order.to(slot.device)
        self._rows = dataset.to(slot.device).positions(order) if dataset.fits(slot.device) else order

    def run(self) -> Generator[None, None, ClientResult]:
        """Train, in pieces: a step of the generator hands the next piece to the device, and waits for nothing."""
        slot = self._slot
        with slot.recorder.ordered():
            slot.load(self.task)
            slot.recorder.seed(self._seed)
        now: Values | None = None
        for piece, recording in zip(self.pieces, self.recordings, strict=True):
            with slot.recorder.ordered():
                if piece.values is not now:
                    now = piece.values
                    set_values(slot.optimizer, now)
                part = slice(piece.begin, piece.begin + piece.samples)
                recording.rows.copy_(self._rows[part].view_as(recording.rows))
                for name, value in recording.draws.items():
                    value.copy_(self._draws[name][part].view_as(value))
                recording.replay()
            yield
        with slot.recorder.ordered():
            return slot.finish(self)
