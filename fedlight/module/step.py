"""What a batch, a step function and a loss are: the part of the local step that touches the module, and its own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fedlight.module.hooks import overrides
from fedlight.module.logs import LOSS, LogCollector, with_attributes
from fedlight.module.parameters import ParameterLayout
from fedlight.module.state import ModuleState, attributes_of
from fedlight.penalties.batches import batch_size, cloned
from fedlight.penalties.step import PenalizedStep, call_step, penalized_step
from fedlight.seeding import preserved_global_rng

IndexedBatch = tuple[Any, int]
"""A batch on the device and its index in the epoch."""

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def step_loss(
    module: LightningModule, log: LogCollector, batch: Any, index: int, first: bool, last: bool
) -> Tensor | None:
    """The loss (penalties included) of one batch on its device; None where ``training_step`` skips it.

    The module's own logging must be directed to the log, where the task loss goes. Only the ``first`` pass of a step is
    logged, and only the ``last`` one gets the batch itself.
    """
    log.enabled = first
    if first:
        log.batch_size = batch_size(batch)
    output = call_step(module, "training_step", batch if last else cloned(batch), index)
    loss: Tensor | None = output["loss"] if isinstance(output, Mapping) else output
    if first and loss is not None and not log.own_loss:
        wrapper = penalized_step(module)
        task_loss = loss if wrapper is None or wrapper.task_loss is None else wrapper.task_loss
        log.add(LOSS, log.scalar(LOSS, task_loss), log.batch_size)
    return loss


class Reach(nn.Module):
    """Lets ``functional_call`` run any function of a module."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module
        first = {id(t): name for name, t in [*self.named_parameters(), *self.named_buffers()]}
        both = [(name, [*m._parameters.items(), *m._buffers.items()]) for name, m in self.named_modules()]
        places = [(f"{name}.{key}", t) for name, held in both for key, t in held if t is not None]
        self._places = {place: first[id(t)] for place, t in places}
        self._own = dict(places)
        self._of_parameters = {place for place, t in places if isinstance(t, nn.Parameter)}

    def forward(self, watch: AbstractContextManager[Any], function: Callable[..., Any], *args: Any) -> Any:
        """Run it."""
        with watch:
            return function(self.module, *args)

    def call(self, values: dict[str, Tensor], *args: Any) -> Any:
        """Run a function with these values, by first names, which are brought up to date.

        Each place has its value once: torch would leave its own in a submodule that has two names.
        """
        placed = {place: values[name] for place, name in self._places.items() if name in values}
        for place in self._of_parameters & placed.keys():
            placed[place]._is_param = True  # what isinstance(..., nn.Parameter) asks for
        own = {id(t): (place, t) for place, t in self._own.items() if place in placed}
        out = functional_call(self, placed, (_Bypass(own) if own else nullcontext(), *args), tie_weights=False)
        self._own = {}  # one call shows it
        values.update((name, placed[name]) for name in values)
        return out


class _Bypass(TorchFunctionMode):
    """Refuses a module that reaches its tensors past their places, where others are now."""

    def __init__(self, own: dict[int, tuple[str, Tensor]]) -> None:
        super().__init__()
        self._own = own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [self._own[id(t)][0] for t in tree_leaves((args, kwargs)) if id(t) in self._own]
        if found and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            raise MisconfigurationException(
                f"model: a list, closure or object in it holds {found[0].removeprefix('module.')}, and a step takes it"
                " from there, also where another model's has its place. Take it from the module, by its name"
            )
        return out


class OtherModels:
    """Runs a module's ``training_step`` as other models would, for penalties that compare; it leaves no trace.

    A step that is ``recorded`` has no Python state, and draws its random numbers on the device: these are not put back.
    """

    def __init__(self, module: LightningModule, layout: ParameterLayout, recorded: bool = False) -> None:
        self._module, self._reach, self._layout, self.recorded = module, Reach(module), layout, recorded
        self._attributes: ModuleState | None = None
        self._with_grad = False

    def __call__(self, models: Mapping[str, Tensor], log: LogCollector, batch: Any, index: int) -> None:
        """Let penalties see what the models ``[P]`` put out on a batch."""
        step = penalized_step(self._module)
        if not models or step is None:
            return
        log.enabled = False
        try:
            self._run(step, models, batch, index)
        except RuntimeError as error:
            if self.recorded or self._with_grad or "grad" not in str(error):
                raise
            self._with_grad = True  # the step takes gradients by itself, as in a gradient penalty
            self._run(step, models, batch, index)

    def _run(self, step: PenalizedStep, models: Mapping[str, Tensor], batch: Any, index: int) -> None:
        module, grad = self._module, self._with_grad
        own = [*module.named_parameters(), *module.named_buffers()]
        # BatchNorm takes the batch's statistics: those that it keeps are of the model that trains.
        quiet = [m for m in module.modules() if not isinstance(m, _BatchNorm)]
        undone = nullcontext() if self.recorded else self._undone()
        with undone, torch.set_grad_enabled(grad), with_attributes(quiet, {"training": False}):
            for name, params in models.items():
                values = {k: v.detach().requires_grad_() if grad else v for k, v in self._layout.views(params).items()}
                values |= {key: value.clone() for key, value in own if key not in values}
                inner = {f"module.{key}": value for key, value in values.items()}
                with with_attributes([step], {"model": name}):
                    self._reach.call(inner, call_step, "training_step", cloned(batch), index)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        self._attributes = self._attributes or attributes_of(self._module)
        self._attributes.refresh()
        try:
            with preserved_global_rng():
                yield
        finally:
            self._attributes.restore()


def transfer_function(module: LightningModule, device: torch.device) -> Callable[[Any], Any]:
    """What moves a batch to the device, with the module's transfer hooks where it overrides them."""
    if any(overrides(module, name) for name in TRANSFER_HOOKS):

        def with_hooks(batch: Any) -> Any:
            batch = module.on_before_batch_transfer(batch, 0)
            return module.on_after_batch_transfer(module.transfer_batch_to_device(batch, device, 0), 0)

        return with_hooks

    def moved(batch: Any) -> Any:
        if type(batch) in (tuple, list) and all(type(part) is Tensor and part.device == device for part in batch):
            return batch  # Lightning's own look at it takes as long as a small layer
        return module.transfer_batch_to_device(batch, device, 0)

    return moved


class OwnStep:
    """Calls a module's ``optimizer_step``, which has to end in ``optimizer.step(closure)``, for one client.

    ``update`` lets the optimizer take a step; ``show`` is called before somebody gets to see it. ``lrs`` are the
    learning rates of the steps that were taken.
    """

    def __init__(
        self, module: LightningModule, optimizer: Optimizer, update: Callable[[], None], show: Callable[[], None] | None
    ) -> None:
        self._module, self._optimizer, self._update, self._show = module, optimizer, update, show
        self._closure: Callable[[], Any] | None = None
        self.lrs: list[float] = []

    @cached_property
    def optimizer(self) -> LightningOptimizer:
        """What ``self.optimizers()`` gives, and ``optimizer_step`` gets."""
        if self._show is not None:
            self._show()
        wrapped: Any = LightningOptimizer(self._optimizer)
        wrapped.zero_grad = self._optimizer.zero_grad  # it has one of its own, by its class
        wrapped._strategy = self
        return cast(LightningOptimizer, wrapped)

    def __call__(self, batch_idx: int, gradient: Callable[[], Any]) -> None:
        """Let the module take a step; ``gradient`` gives the parameters their gradient.

        Raises:
            MisconfigurationException: if there was not one gradient and one step.
        """
        module, before, gradients = self._module, len(self.lrs), list[Any]()

        def closure() -> Any:
            gradients.append(gradient())
            return gradients[-1]

        self._closure = closure
        module.optimizer_step(module.current_epoch, batch_idx, self.optimizer, closure)
        self._closure = None
        if (steps := len(self.lrs) - before) != 1 or len(gradients) != 1:
            raise MisconfigurationException(
                f"model: {type(module).__name__}.optimizer_step must call optimizer.step(closure=optimizer_closure)"
                f" once in each step; step {before} of a client took {steps} steps and {len(gradients)} gradients."
            )

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], **_: Any) -> Any:
        """What a strategy of Lightning's does when ``step`` of :attr:`optimizer` is called."""
        if self._closure is None:
            raise MisconfigurationException(
                f"model: {type(self._module).__name__} calls step of self.optimizers(); with automatic optimization the"
                " trainer does. Only optimizer_step may, with optimizer.step(closure=optimizer_closure)."
            )
        loss = closure()
        self.lrs.append(float(optimizer.param_groups[0].get("lr", float("nan"))))
        self._update()
        return loss
