"""The task loss of a LightningModule as a function that can be differentiated twice, on a copy of the module."""

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import isfunction, ismethod
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlight.analysis.layers import differentiable_once, explain, nodes
from fedlight.module.logs import LogCollector, collecting_logs
from fedlight.module.looking import watched
from fedlight.module.state import ModuleState
from fedlight.penalties.step import call_step, penalized_step, unwrapped
from fedlight.run.device import float32_products
from fedlight.seeding import preserved_global_rng, seed_global_rng


def task_loss(module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """The scalar that ``training_step`` returns, or has under ``"loss"``.

    Raises:
        TypeError: if there is none.
    """
    output = call_step(module, "training_step", batch, batch_idx)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = "the loss, a scalar tensor (or a dict with it under 'loss'), to be analysed"
        raise TypeError(f"training_step of {type(module).__name__} must return {what}; found {type(output).__name__}.")
    return loss.reshape(())


class TaskLoss:
    """``(batch, index) -> loss`` of a module without penalties, in eval mode, for an analysis.

    It works on a deep copy: the module itself, its gradients, hooks, mode, logs and metrics are not touched, nor is any
    global random number generator. What ``training_step`` draws at random is the same in every call for a batch.

    Args:
        module: what to analyse. Penalties that are attached stay out of the loss.
        dtype: of parameters, buffers and floating-point inputs: float32 or float64.
        device: where to compute; where the module is by default.

    Attributes:
        module: the copy.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        self._original = module
        # Under inference mode, where Lightning evaluates, parameters could not be differentiated.
        with torch.inference_mode(False):
            self.module = _copied(module).to(dtype=dtype, device=device)
        for part in self.module.modules():  # whose `train` may do more: LoRA merges what is to be differentiated
            part.training = False
        self.dtype = dtype
        self._checked = False
        self._state: ModuleState | None = None
        self._log = LogCollector()
        self._log.enabled = False

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The copy's trainable parameters, in the order of flat vectors; tied ones once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def __call__(self, batch: Any, index: int) -> Tensor:
        """The mean loss of a batch; inside :meth:`settings`.

        Raises:
            NoSecondDerivativeError: if a part of it can be differentiated once only.
            ValueError: if it uses parameters of the module itself, as a closure in it may.
        """
        seed_global_rng(index)
        if self._state is None:
            self._state = ModuleState({"self": self.module}, self.parameters.values)
        self._state.refresh()
        loss = task_loss(self.module, apply_to_collection(batch, Tensor, self._convert), index)
        self._state.restore()  # it is a function: no call changes the next
        if not self._checked and loss.requires_grad:
            self._checked = True
            used = {id(getattr(node, "variable", None)) for node in nodes(loss)}
            if names := [name for name, p in self._original.named_parameters() if id(p) in used]:
                raise ValueError(
                    f"A function in {type(self.module).__name__} uses its parameter {names[0]}, also in a copy of the"
                    " module, on which the analysis runs. Make a lambda or closure of it a method."
                )
            if names := differentiable_once(loss):
                error = RuntimeError(f"autograd function {', '.join(names)} is marked once_differentiable")
                raise self.explain(error, batch, index)
        return loss

    def denominators(self, batches: Iterable[Any]) -> list[float] | None:
        """What the loss of each batch divides by, if the module says so by ``loss_denominator(batch)``."""
        if (denominator := getattr(self.module, "loss_denominator", None)) is None:
            return None
        with torch.no_grad():
            return [float(denominator(apply_to_collection(batch, Tensor, self._convert))) for batch in batches]

    def explain(self, error: RuntimeError, batch: Any, index: int) -> Exception:
        """An error that names the layers at fault."""
        converted = apply_to_collection(batch, Tensor, self._convert)
        return explain(error, self.module, lambda: task_loss(self.module, converted, index))

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Full precision, kernels with second derivatives, no logging, and the program's random numbers kept."""
        device = next(self.module.parameters()).device.type
        with ExitStack() as stack:
            for context in (
                preserved_global_rng(),
                torch.inference_mode(False),
                torch.autocast(device, enabled=False),
                sdpa_kernel(SDPBackend.MATH),
                collecting_logs(self.module, self._log),
                watched(self.module, set()),  # loggers receive nothing
                float32_products("ieee"),
            ):
                stack.enter_context(context)
            if "torch._dynamo" in sys.modules:  # what is compiled cannot be differentiated twice
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if device == "cuda" and any(isinstance(m, nn.RNNBase) for m in self.module.modules()):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield

    def _convert(self, leaf: Tensor) -> Tensor:
        return leaf.to(self.dtype) if leaf.is_floating_point() else leaf


def _copied(module: nn.Module) -> LightningModule:
    module = cast(LightningModule, unwrapped(module))
    if not any(cls.__name__ == "LightningModule" for cls in type(module).__mro__):  # also pytorch_lightning's
        raise TypeError(f"Only a LightningModule can be analysed, found {type(module).__name__}.")
    if not module.automatic_optimization:
        name = type(module).__name__
        raise TypeError(f"{name} optimises manually: its training_step takes steps, and is no loss to be analysed.")
    clone = copy.deepcopy(module, memo := _shared_attributes(module))
    clone._trainer, clone._fabric = module._trainer, module._fabric  # what training_step may ask for
    step = penalized_step(clone)
    if step is not None:
        for penalty in step.penalties:
            step.remove(penalty)
    for attributes in map(vars, clone.modules()):
        for name, value in attributes.items():  # a compiled method, which would be that of the module itself
            compiled = getattr(value, "_torchdynamo_orig_callable", None) if isfunction(value) else None
            attributes[name] = copy.deepcopy(compiled, memo) if ismethod(compiled) else value
    return clone


def _shared_attributes(module: nn.Module) -> dict[int, Any]:
    """The memo of a deep copy that leaves alone what a command line hands over to make an optimizer.

    Such an object knows the parser that made it, and with it open files, which cannot be copied.
    """
    memo = {}
    for value in (value for child in module.modules() for value in vars(child).values()):
        if isinstance(value, partial):
            try:
                copy.deepcopy(value)
            except TypeError:
                memo[id(value)] = value
    return memo
