"""The state of a client's optimizer as named vectors, for algorithms that have it sent."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from fedlight.local import LocalObjective
from fedlight.module.optimizers import configure_optimizers
from fedlight.module.parameters import FlatParameters
from fedlight.perturbations.base import State


class OptimizerState:
    """Writes and reads what an algorithm asks for of the optimizer's state, by torch's names; nothing without any.

    Raises:
        MisconfigurationException: if the module's optimizer does not have it, or has a state that begins otherwise.
    """

    def __init__(self, module: LightningModule, flat: FlatParameters, names: Sequence[str]) -> None:
        self._flat, self._names = flat, names
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        if names:
            self._make_state(configure_optimizers(module).optimizer)

    @torch.no_grad()
    def begin(self, optimizer: Optimizer, objective: LocalObjective) -> None:
        """Let a new optimizer begin with what is given, and with zeros where nothing is; it may drift from its way."""
        if self._names:
            self._make_state(optimizer)
        if (drift := objective.drift) is not None:
            optimizer.register_step_post_hook(lambda stepped, *_: self._move(stepped, drift))
        for name, value in objective.optimizer.items():
            views = self._flat.layout.views(value).values() if value.ndim else ()
            parts = list(views) or [value] * len(self._parameters)
            for parameter, part in zip(self._parameters, parts, strict=True):
                if name in (state := optimizer.state.get(parameter, {})):
                    state[name] = state[name].copy_(part) if isinstance(state[name], Tensor) else part.item()

    def _move(self, optimizer: Any, drift: Tensor) -> None:
        taken = 1 - getattr(optimizer, "found_inf", 0)  # a fused optimizer leaves out a step that overflows by itself
        self._flat.params.sub_(drift * (optimizer.param_groups[0]["lr"] * taken))

    def read(self, optimizer: Optimizer) -> State:
        """What is asked for, ``[P]`` each, or a scalar that all parameters share; 0 for parameters without state."""
        return {name: self._joined(optimizer, name) for name in self._names}

    def _joined(self, optimizer: Optimizer, name: str) -> Tensor:
        values = [optimizer.state.get(p, {}).get(name) for p in self._parameters]
        found = [torch.as_tensor(v) for v in values if v is not None]
        if all(v.ndim == 0 for v in found) and any(p.ndim for p in self._parameters):
            return found[0].detach().clone()
        both = zip(self._parameters, values, strict=True)
        return torch.cat([(torch.zeros_like(p) if v is None else v).detach().reshape(-1) for p, v in both])

    def _make_state(self, optimizer: Optimizer) -> None:
        """Torch makes the state in the first step: take one that changes nothing, and look at what there is then."""
        flat, before = self._flat, self._flat.params.clone()
        decays = [(group, group["weight_decay"]) for group in optimizer.param_groups if "weight_decay" in group]
        for group, _ in decays:
            group["weight_decay"] = 0.0
        flat.grad.zero_()
        flat.params.fill_(1.0)  # where the state is made of the parameters it shows
        optimizer.step()
        for group, decay in decays:
            group["weight_decay"] = decay
        flat.params.copy_(before)
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if name == "step":
                    state[name] = value * 0
                elif value is not None and not _is_zero(value, parameter):
                    raise _refused(optimizer, f"keeps {name}, which does not begin with zeros of the parameter's shape")
        held = sorted({name for state in optimizer.state.values() for name in state})
        if not {*self._names} <= {*held}:
            raise _refused(optimizer, f"keeps {held or 'none'}, and not {' and '.join(self._names)}")


def _is_zero(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and not bool(value.any())


def _refused(optimizer: Optimizer, found: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"algorithm: it asks for the optimizer's state, and {type(optimizer).__name__} of model.configure_optimizers"
        f" {found}. Use another optimizer, or another algorithm."
    )
