"""What takes the place of a module's ``training_step`` while penalties are attached."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache, reduce
from inspect import Parameter, signature
from typing import Any, cast

import torch
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.wrappers import is_wrapped
from torch import Tensor, nn

from fedlight.penalties.batches import batch_size
from fedlight.penalties.observation import Observation
from fedlight.penalties.term import Term


class PenalizedStep:
    """A module's ``training_step`` that returns task loss + penalties; it takes the place of the original.

    A deep copy of the module gets a copy that is bound to it and shares the penalties.

    Attributes:
        module: the module.
        task_loss: the latest step's loss without penalties, detached; None before the first step.
        penalty: the latest step's sum of penalties, detached; None before the first step.
        model: the model that runs where it is not the one that trains: penalties see it, and are not added.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.task_loss: Tensor | None = None
        self.penalty: Tensor | None = None
        self._observations: list[Observation] = []
        self.model: str | None = None
        self.totals: dict[str, tuple[Tensor, int]] | None = None  # of an epoch, with weights, to share with others
        # What to call and to give back: an attribute of the module (a compiled step, say), or None for the class's own.
        self._previous: Callable[..., Any] | None = vars(module).get("training_step")
        vars(module).update(training_step=self._bound(), _penalized_step=self)

    @property
    def penalties(self) -> list[Term]:
        """The attached penalties."""
        return [observation.penalty for observation in self._observations if not observation.findings.over]

    def measured(self, penalty: Term) -> dict[str, Tensor]:
        """What a penalty measured in the latest step, detached; empty before the first step."""
        found = [o.measured for o in self._observations if o.penalty is penalty]
        return {name: value.detach() for measured in found for name, value in measured.items()}

    def forget(self) -> None:
        """Let go of the latest step's tensors: inside ``torch.func`` transforms none may outlive the transform."""
        self.task_loss = self.penalty = None
        for observation in self._observations:
            observation.forget()

    def add(self, penalty: Term, observed: dict[str, nn.Module]) -> None:
        """Attach a penalty that observes these submodules; what ended with a fit, in a copy of its module, goes."""
        ended = [observation for observation in self._observations if observation.findings.over]
        self._observations.append((penalty.watch or Observation)(penalty, observed, self.module))
        for observation in ended:
            observation.remove(over=True)
            self._observations.remove(observation)

    def has_all(self, penalty: Term) -> bool:
        """Whether the module has the submodules that it had when the penalty was attached, and no others."""
        now = list(self.module.modules())
        return all([found() for found in o.modules] == now for o in self._observations if o.penalty is penalty)

    def gone(self, penalty: Term) -> list[str]:
        """The names of what is measured and exists no more."""
        frames = [frame for o in self._observations if o.penalty is penalty for frame in o.frames]
        return [f.label for f in frames if f.label and any(hook.hooks_dict_ref() is None for hook in f.handles)]

    def end_with_fit(self, penalty: Term) -> None:
        """Let what is read from a file of the module that is written meanwhile not be penalised."""
        for observation in self._observations:
            observation.findings.for_a_fit |= observation.penalty is penalty

    def remove(self, penalty: Term, over: bool = False) -> None:
        """Detach a penalty, with ``over`` from copies of the module, too.

        With the last one the module gets its own ``training_step`` back.
        """
        for observation in [o for o in self._observations if o.penalty is penalty]:
            observation.remove(over)
            self._observations.remove(observation)
        if not self._observations:
            self._restore()

    def _restore(self) -> None:
        attributes = vars(self.module)
        attributes.pop("_penalized_step", None)
        if getattr(attributes.get("training_step"), "__self__", None) is not self:
            return  # somebody has wrapped this step: it stays, and passes on what the original returns
        if self._previous is None:
            del attributes["training_step"]
        else:
            attributes["training_step"] = self._previous

    def _bound(self) -> Callable[..., Any]:
        """The method that has the signature of the module's step, from which trainers tell what to pass."""
        parameters = signature(cast(Callable[..., Any], self.module.training_step)).parameters
        if "dataloader_iter" in parameters:
            return self._step_of_iterator
        return self._run if takes_index(self.module.training_step) else self._step_of_batch

    def _step_of_batch(self, batch: Any) -> Any:
        return self._run(batch)

    def _step_of_iterator(self, dataloader_iter: Any) -> Any:
        return self._run(dataloader_iter)

    def _run(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        seeing = [o for o in self._observations if self.model in (None, *o.penalty.compares) and not o.findings.over]
        if not seeing or (self.model is None and _is_evaluating(self.module)):
            return self._call(batch, *args, **kwargs)
        for observation in seeing:
            observation.start()
        # The first step shows which functions there are: it runs as it is written, also where it is compiled.
        first = not torch.compiler.is_compiling() and any(o.choosing for o in seeing)
        try:
            with torch.compiler.set_stance("force_eager") if first else nullcontext():
                output = self._observed(seeing, batch, *args, **kwargs)
        finally:
            for observation in seeing:
                observation.stop(self.model)
        output = output if self.model else self._penalize(output, batch)
        layers = [f"{type(o.penalty).__name__}: {layer}" for o in seeing for layer in o.measured] if first else []
        if twice := [layer for layer in layers if layers.count(layer) > 1]:
            rank_zero_info(f"{twice[0]} is measured by two that are attached, and both are added to the loss.")
        return output

    def _observed(self, observations: list[Observation], *args: Any, **kwargs: Any) -> Any:
        if not observations:
            return self._call(*args, **kwargs)
        with observations[0] if observations[0].looking else nullcontext():
            return self._observed(observations[1:], *args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        # Not a bound method that is kept: a copy of the module must call its own.
        return type(self.module).training_step(self.module, *args, **kwargs)  # type: ignore[attr-defined]

    def _penalize(self, output: Any, batch: Any) -> Any:
        self.task_loss = self.penalty = None
        if output is None:
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"training_step of {type(self.module).__name__} returned {type(output).__name__}: penalties can be "
                "added to a Tensor, or to the Tensor under 'loss' of a dict."
            )
        wide = torch.promote_types(loss.dtype, torch.float32)  # what a schedule multiplies is float64
        added = [o for o in self._observations if not o.findings.over]
        penalty = reduce(torch.add, [_scalar(o, self.module).to(loss.device, wide) for o in added])
        self.task_loss, self.penalty = loss.detach(), penalty.detach()
        self._log(batch, {"train/penalty": self.penalty}, added)
        return {**output, "loss": loss + penalty} if isinstance(output, Mapping) else loss + penalty

    def _log(self, batch: Any, metrics: dict[str, Any], added: list[Observation]) -> None:
        if not _can_log(self.module):
            return
        for observation in added:
            metrics |= observation.penalty.metrics(observation.measured) or {}
        # Lightning infers the size of a batch too, and stops where it cannot.
        size = batch_size(batch)
        for name, found in metrics.items():
            value = found.detach() if isinstance(found, Tensor) else found
            if self.totals is None:
                self._log_one(name, value, size)
            else:
                total, weight = self.totals.get(name, (0.0, 0))
                self.totals[name] = total + value * size, weight + size

    def _log_one(self, name: str, value: Any, size: int) -> None:
        log = cast(Callable[..., None], self.module.log)
        log(name, value, on_step=False, on_epoch=True, sync_dist=True, batch_size=size)

    def log_totals(self) -> None:
        """Log the means of an epoch: processes may have measured others, or in another order, and wait for each."""
        if self.totals is None:
            return
        every: list[list[str]] = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(every, list(self.totals))
        for name in sorted({name for names in every for name in names}):
            total, weight = self.totals.pop(name, (0.0, 0))
            mean = torch.as_tensor(total / max(weight, 1), dtype=torch.float64)  # one type in all processes
            self._log_one(name, mean, weight)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "task_loss": None, "penalty": None}


def _scalar(observation: Observation, module: nn.Module) -> Tensor:
    term: Any = observation.term(module)
    if isinstance(term, int | float):  # a sum over no layers
        return torch.tensor(float(term))
    if not isinstance(term, Tensor) or term.numel() != 1:
        found = f"shape {list(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
        raise TypeError(f"{type(observation.penalty).__name__}.penalty must return a scalar Tensor, not {found}.")
    return term


USED_UP = (
    "{} measures layers of a graph that training_step or a hook takes a gradient of. Name in `layers` those outside of"
    " it, take it with retain_graph=True, and let what a hook of a tensor differentiates be computed in it, under"
    " torch.enable_grad()."
)
"""What autograd means by "a second time"."""
_EVALUATIONS = {"sanity_check", "validate", "test", "predict"}
"""Values of Lightning's ``RunningStage``."""


def takes_index(step: Any) -> bool:
    """Whether Lightning hands the number of the batch to a step: it takes two arguments by position, or any number."""
    return _takes_two(getattr(step, "__func__", step), hasattr(step, "__func__"))


def call_step(module: nn.Module, name: str, batch: Any, index: int) -> Any:
    """Call ``training_step`` and its like with as many arguments as it takes."""
    step = getattr(module, name)
    return step(batch, index) if takes_index(step) else step(batch)


@lru_cache
def _takes_two(function: Callable[..., Any], bound: bool) -> bool:
    kinds = [parameter.kind for parameter in signature(function).parameters.values()]
    positional = sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    return positional > 1 + bound or Parameter.VAR_POSITIONAL in kinds


def penalized_step(module: nn.Module) -> PenalizedStep | None:
    """The wrapper around ``module.training_step`` while a penalty is attached, else None."""
    step = vars(module).get("_penalized_step") or vars(unwrapped(module)).get("_penalized_step")
    return step if isinstance(step, PenalizedStep) else None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module without what ``torch.compile`` and ``Fabric.setup`` put around it."""
    while True:
        if isinstance(module, torch._dynamo.OptimizedModule):
            module = module._orig_mod
        elif is_wrapped(module):
            module = cast(nn.Module, module.module)
        else:
            return module


def _is_evaluating(module: nn.Module) -> bool:
    # A validation_step may well call training_step.
    if not module.training and not torch.is_grad_enabled():
        return True
    stage = getattr(getattr(getattr(module, "_trainer", None), "state", None), "stage", None)
    return getattr(stage, "value", None) in _EVALUATIONS  # trainer.validating and its like take as long as a layer


def _can_log(module: nn.Module) -> bool:
    if "log" in vars(module):
        return True
    trainer = getattr(module, "_trainer", None)
    in_a_hook = getattr(module, "_current_fx_name", None) is not None
    return trainer is not None and in_a_hook and not getattr(trainer, "barebones", False)
