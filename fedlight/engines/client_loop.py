"""One place to train clients in: a module with flat buffers, and the local loop around the local step."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fedlight.engines.base import ClientTask, LocalTraining
from fedlight.engines.batch_order import BatchOrder, batch_order, batch_reader
from fedlight.engines.hyperparameters import LocalHyperparameters, Values, lr_sum, set_values
from fedlight.engines.moving import Moving
from fedlight.engines.optimizers import FlatStep, OptimizerState, begin_momentum, float32, fuse
from fedlight.local import ClientResult, LocalObjective, local_gradient
from fedlight.module.hooks import overrides
from fedlight.module.logs import LogCollector, collecting_logs
from fedlight.module.optimizers import Optimization, about, configure_optimizers
from fedlight.module.parameters import FlatParameters
from fedlight.module.step import IndexedBatch, OtherModels, OwnStep, step_loss, transfer_function
from fedlight.penalties.step import USED_UP, penalized_step
from fedlight.perturbations.base import State
from fedlight.seeding import seed_global_rng

if TYPE_CHECKING:
    from fedlight.engines.compiled import CompiledStep

_SHOWN = ("on_before_zero_grad", "on_before_optimizer_step")
"""Hooks that are shown the optimizer, and may look at its state."""


class ClientLoop:
    """Trains one client at a time on a module whose parameters and gradients are flat, until ``flat`` is released.

    Where something is ``compiled`` it gives the gradient of full batches.
    """

    def __init__(self, training: LocalTraining, module: LightningModule, compiled: "CompiledStep | None") -> None:
        self._compiled = compiled
        self.training, self.module = training, module
        self.device = training.fabric.device
        self.flat = FlatParameters(module)
        self.optimizer_state = OptimizerState(module, self.flat, training.optimizer_state)
        found = training.findings
        self.held = Moving(module, found.moving, training.state, bool(found.changed))
        self.buffers = self.held.tensors
        self.log = LogCollector(self.device)
        self.log.numbers = self.device.type == "cpu"
        self._precision = training.fabric.strategy.precision
        self._transfer = transfer_function(module, self.device)
        self._scaler: torch.amp.GradScaler | None = None
        self._output: dict[str, Tensor] | None = None
        self._show, self._models = OtherModels(module, self.flat.layout), State()
        self._frozen: Tensor | None = None
        self._idle: list[Parameter] = []
        self.schedule = LocalHyperparameters(module, training.lr_factors)
        self.fresh: Optimization
        self.plan: BatchOrder
        self.epoch = self.batch_idx = self.done = 0
        self._own_step = overrides(module, "optimizer_step")
        self.own: OwnStep
        self.optimizer: Optimizer
        self._fused = False
        self._flat_step: FlatStep | None = None
        watched = getattr(training.call, "overridden", lambda name: ())
        self._seen = bool(self._own_step or training.optimizer_state or any(map(watched, _SHOWN)))

    def train(self, round: int, task: ClientTask) -> ClientResult:
        """Train one client for one round, step by step."""
        with about(self.module, task.client, self):
            return self._train(round, task)

    def _train(self, round: int, task: ClientTask) -> ClientResult:
        training = self.training
        self.plan = plan = batch_order(round, task, training)
        seed_global_rng(task.local_seed(training.seed, round))
        self.epoch = self.batch_idx = self.done = 0
        self._begin(task)
        state, steps = dict(task.perturbation), list(plan.steps_per_epoch)
        values = self.schedule.values(task, steps, self.fresh)
        now = None
        with collecting_logs(self.module, self.log):
            training.call("on_client_start", task.client)
            read = batch_reader(round, task, plan, training, self._transfer, self._precision.convert_input)
            for epoch in range(len(plan.epochs)):
                self.epoch = epoch
                training.call("on_train_epoch_start")
                self.flat.check()
                for step in _groups(read(epoch), training.accumulate_grad_batches):
                    if values[self.done] is not now:
                        now = self._set_values(values[self.done])
                    state, skip = self._step(task.objective, step, state)
                    if skip:  # the schedules count the steps that were taken
                        steps[epoch] = self.done - sum(steps[:epoch])
                        values = self.schedule.values(task, steps)
                        break
                self.log.batch_size = sum(end - begin for begin, end in plan.epochs[epoch])
                training.call("on_train_epoch_end")
            training.call("on_client_end", task.client)
        self.flat.check()
        self.held.finish()
        lrs = sum(self.own.lrs) if self._own_step else lr_sum(values, self.done)
        result = self._result(task, state, self.done, lrs)
        self.held.forget()
        return result

    def _set_values(self, values: Values) -> Values:
        set_values(self.optimizer, values)
        if self._fused:
            for group in self.optimizer.param_groups:
                group["lr"] = float32(group["lr"])
        return values

    def _begin(self, task: ClientTask) -> None:
        self.log.reset()
        self.flat.params.copy_(task.objective.start)
        self.held.write(task.buffers)
        self.fresh = configure_optimizers(self.module)
        self.optimizer = self.fresh.optimizer
        self.optimizer.zero_grad = lambda set_to_none=True: self.flat.zero_grad()  # type: ignore[method-assign]
        # What can be recorded in a CUDA graph is what is run without one, too: that gives the same bits.
        self._fused = self.device.type == "cuda" and fuse(self.optimizer, self.device)
        self._flat_step = None if self._seen or self._fused else FlatStep(self.optimizer, self.flat)
        self.own = OwnStep(self.module, self.optimizer, self._update, self._flat_step and self._flat_step.release)
        if getattr(self._precision, "scaler", None) is not None:
            self._scaler = torch.amp.GradScaler(self.device.type, init_scale=task.loss_scale)
            begin_momentum(self.optimizer)
        self.optimizer_state.begin(self.optimizer, task.objective)

    def _result(self, task: ClientTask, state: State, num_steps: int, lr_sum: float) -> ClientResult:
        return ClientResult(
            client=task.client,
            start=task.objective.start,
            params=self.flat.params.clone(),
            num_samples=len(task.dataset),  # type: ignore[arg-type]
            weight=task.weight,
            num_steps=num_steps,
            lr_sum=lr_sum,
            buffers={name: value.detach().clone() for name, value in self.held.read().items()},
            perturbation=state,
            optimizer=self.optimizer_state.read(self.optimizer),
            metrics=(sums := self.log.sums()),
            reductions={name: self.log.reduction(name) for name in sums},
            loss_scale=None if self._scaler is None else self._scaler.scale(torch.ones((), device=self.device)),
        )

    def _step(self, objective: LocalObjective, batches: list[IndexedBatch], state: State) -> tuple[State, bool]:
        """One local step on the batches of one optimizer step; true where a hook asks to skip the epoch's rest."""
        call = self.training.call
        for batch, self.batch_idx in batches:
            if call("on_train_batch_start", batch, self.batch_idx):
                return state, True
        if self._own_step:
            states = [state]

            def gradient() -> Tensor | None:
                states.append(self._set_gradient(objective, batches, state))
                return (self._output or {}).get("loss")

            self.own(self.batch_idx, gradient)
            state = states[-1]
        else:
            state = self._set_gradient(objective, batches, state)
            self._update()
        self.done += 1
        for batch, index in batches:
            call("on_train_batch_end", self._output, batch, index)
        return state, False

    def _set_gradient(self, objective: LocalObjective, batches: list[IndexedBatch], state: State) -> State:
        call, optimizer, self._models = self.training.call, self.optimizer, objective.references
        self._frozen, self._idle = objective.frozen, []
        call("on_before_zero_grad", optimizer)
        if self._compiled is not None and self._compiled.takes(batches):
            gradient, state = self._compiled(self.flat.params, self.held.read(), self.log, objective, batches, state)
        else:
            gradient, state = local_gradient(
                self.flat.params,
                lambda point, nth: self._gradient(self.training.seen(batches, nth), point, nth),
                objective,
                self.training.perturbation,
                state,
                self.training.clip,
            )
            self._idle = [] if objective.pulls else self.flat.idle
        if gradient is not self.flat.grad:
            self.flat.grad.copy_(gradient)
        call("on_before_optimizer_step", optimizer)
        return state

    def _update(self) -> None:
        before = None if self._frozen is None else self.flat.params.clone()
        if self._idle and self._flat_step is not None:
            self._flat_step.release()
        for parameter in self._idle:  # as in torch, neither decay nor momentum moves what no gradient came to
            parameter.grad = None
        if self._scaler is None:
            (self._flat_step or self.optimizer.step)()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        if self._idle:
            self.flat.bind_grad()
        if before is not None and self._frozen is not None:  # weight decay and momentum move them as well
            torch.where(self._frozen, before, self.flat.params, out=self.flat.params)

    def _gradient(self, batches: list[IndexedBatch], point: Tensor, nth: int) -> Tensor:
        """∇(loss + penalties) at a point ``[P]``, the mean over these batches."""
        here = self.flat.params
        backup = None if point is here else here.clone()
        if backup is not None:
            here.copy_(point)
        self.flat.zero_grad()
        kept = None if nth == 0 else {name: value.detach().clone() for name, value in self.held.read().items()}
        attributes = None if kept is None else self.held.attributes()
        for batch, index in batches:
            self._backward(batch, index, 1 / len(batches), nth)
        self.flat.gather_grad()
        if attributes is not None:
            attributes.restore()
        if kept is not None:  # running statistics move in the first pass only
            self.held.write(kept)
        if backup is not None:
            here.copy_(backup)
        self._unscale(last=self.training.is_last(nth))
        return self.flat.grad

    def _unscale(self, last: bool) -> None:
        if self._scaler is None:
            return
        if last:  # the scaler looks for overflow here, once per optimizer step
            self._scaler.unscale_(self.optimizer)
        else:
            self.flat.grad.div_(self._scaler.scale(torch.ones((), device=self.device)))

    def _backward(self, batch: Any, index: int, share: float, nth: int) -> None:
        call = self.training.call
        with self._precision.forward_context():
            self._show(self._models, self.log, batch, index)
            loss = step_loss(self.module, self.log, batch, index, nth == 0, self.training.is_last(nth))
        if loss is None:
            self._output = self._output if nth else {}  # as in Lightning, and not that of a step before
            return
        if nth == 0:
            self._output = {"loss": loss.detach()}
        if share != 1:
            loss = loss * share
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        call("on_before_backward", loss)
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if "a second time" not in str(error) or (step := penalized_step(self.module)) is None:
                raise
            what = USED_UP.format(type(step.penalties[0]).__name__)
            raise MisconfigurationException(f"trainer.callbacks: {what}") from error
        call("on_after_backward")


def _groups(batches: Iterator[IndexedBatch], size: int) -> Iterator[list[IndexedBatch]]:
    while group := list(islice(batches, size)):
        yield group
