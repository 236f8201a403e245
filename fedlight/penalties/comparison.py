"""Penalties on how far a model goes from others, seen in what they put out on the same batch."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from fedlight.penalties.base import Penalty
from fedlight.penalties.layers import check_selectors, find_layers, named_submodules
from fedlight.penalties.observation import Observation, Source


class Outputs(Observation):
    """What a step puts out: of the model that trains, and of the others in passes before it."""

    def __init__(self, penalty: "Comparison", observed: dict[str, nn.Module], module: nn.Module) -> None:
        super().__init__(penalty, observed, module)
        self.looking = True
        self._others: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and keep what it takes."""
        name, given = getattr(func, "__name__", ""), (*args, *(kwargs or {}).values())
        if name == "linear" and not self.names:
            self._keep(features=given[0])
        elif name in ("cross_entropy", "nll_loss"):
            targets, ignored = given[1], (kwargs or {}).get("ignore_index", -100)
            if ignored != -100 and not targets.is_floating_point():
                targets = targets.masked_fill(targets == ignored, -100)
            self._keep(given[0].requires_grad, logits=given[0], targets=targets)
        return func(*args, **(kwargs or {}))

    def _keep(self, learns: bool = True, **values: Tensor) -> None:
        """Keep what the last call takes, or nothing where that has no gradient: it is a teacher's, or for the log."""
        hidden = self._with_grad and not (learns and torch.is_grad_enabled())
        self.measured = {k: v for k, v in self.measured.items() if k not in values} | ({} if hidden else values)

    def take(self, name: str, output: Any, source: Source) -> None:
        """Keep what the named layer has put out."""
        if self._recording:
            self.measured["features"] = output

    def stop(self, model: str | None) -> None:
        """Keep what another model has put out for the step of the one that trains."""
        super().stop(model)
        if model is not None:
            self._others |= {f"{model}/{name}": value.detach() for name, value in self.measured.items()}

    def term(self, module: nn.Module) -> Tensor:
        """The penalty of the step."""
        measured, self._others = self.measured | self._others, {}
        try:
            return self.penalty.penalty(module, measured)
        except KeyError as error:
            raise MisconfigurationException(
                f"{type(self.penalty).__name__} found no {error} in {type(module).__name__}: 'features' are what the"
                " last linear layer takes, or what the submodule puts out that `layer` names, one of"
                f" {[name for name, _ in named_submodules(module)][:30]}; 'logits' and 'targets' are what the last"
                " cross_entropy takes. These calls must have a gradient. Other models are there in FederatedTrainer"
                " only: 'start', and those that an algorithm has in LocalObjective.references."
            ) from error


class Comparison(Penalty):
    """A penalty that sees what other models put out on the batch: the one that was broadcast, and more.

    They run ``training_step`` before the model that trains does: without logs, in evaluation mode but for BatchNorm,
    which takes the batch's statistics, and with no trace in the module; no gradient reaches them. :meth:`penalty` finds
    ``features``, ``logits`` and ``targets`` of the step in ``measured``, and those of the other models::

        class Distillation(Comparison):
            def penalty(self, module, measured):
                return (measured["logits"] - measured["start/logits"]).square().mean()

    Features are what the last linear layer takes; logits and targets what ``cross_entropy`` or ``nll_loss`` took last,
    with -100 for a target that is ignored.

    Args:
        layer: the submodule whose output the features are instead, as an entry of MAN's ``layers``.

    Attributes:
        compares: the other models: ``start``, where the client starts, and any of ``LocalObjective.references``.
    """

    compares: tuple[str, ...] = ("start",)
    watch = Outputs

    def __init__(self, layer: str | None = None) -> None:
        self.layer = layer
        check_selectors(None if layer is None else [layer], type(self).__name__)

    def observe(self, module: nn.Module) -> dict[str, nn.Module]:
        """The layer whose output the features are, if one is named."""
        found = {} if self.layer is None else find_layers(module, [self.layer])
        if len(found) > 1:
            raise MisconfigurationException(f"`layer`: {self.layer!r} stands for {', '.join(found)}; name one of them.")
        return found
