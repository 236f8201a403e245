"""The flat vector in two parts."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedlight.local import ClientResult, LocalObjective
from fedlight.module.parameters import ParameterLayout
from fedlight.perturbations.base import State


class Split:
    """The two parts of the flat vector: what is shared, ``[P_shared]``, and what each client keeps, ``[P_own]``.

    ``entries`` are true where entries are the client's own, ``[P]``; ``layout`` becomes that of the shared ones.
    """

    def __init__(self, layout: ParameterLayout, entries: Tensor) -> None:
        self.layout = layout.where(~entries)
        self._entries = (~entries).nonzero().flatten(), entries.nonzero().flatten()
        self._is_own, self._whole = entries, not bool(entries.any())

    def to(self, device: torch.device) -> None:
        """Work on a device."""
        self._is_own = self._is_own.to(device)
        self._entries = self._entries[0].to(device), self._entries[1].to(device)

    def shared(self, vector: Tensor) -> Tensor:
        """``[P_shared]`` of ``[P]``."""
        return vector if self._whole else vector[self._entries[0]]

    def own(self, vector: Tensor) -> Tensor:
        """``[P_own]`` of ``[P]``."""
        return vector[self._entries[1]]

    def model(self, shared: Tensor, own: Tensor | float) -> Tensor:
        """``[P]`` of both parts."""
        if self._whole:
            return shared
        model = shared.new_empty(len(self._is_own))
        model[self._entries[0]] = shared
        model[self._entries[1]] = own.to(shared) if isinstance(own, Tensor) else shared.new_tensor(own)
        return model

    def padded(self, state: State) -> State:
        """Vectors of the shared entries as vectors of all, 0 at a client's own; other tensors as they are."""
        size = self._entries[0].shape
        return state if self._whole else {k: self.model(v, 0.0) if v.shape == size else v for k, v in state.items()}

    def restricted(self, state: State) -> State:
        """Vectors of all entries as vectors of those that are shared; other tensors as they are."""
        size = self._is_own.shape
        return state if self._whole else {k: self.shared(v) if v.shape == size else v for k, v in state.items()}

    def objective(self, objective: LocalObjective, own: Tensor) -> LocalObjective:
        """That of the whole model: nothing but the gradient moves a client's own entries."""
        if self._whole:
            return objective
        given = {name: getattr(objective, name) for name in ("anchor", "linear", "drift", "frozen")}
        parts: dict[str, Any] = self.padded({name: vector for name, vector in given.items() if vector is not None})
        for name, neutral in (("proximal", 0.0), ("gradient_scale", 1.0)):
            if isinstance(value := getattr(objective, name), Tensor) or value != neutral:
                parts[name] = self.model(torch.ones_like(objective.start) * value, neutral)
        models = {name: self.model(vector, own) for name, vector in objective.references.items()}
        parts |= {"optimizer": self.padded(objective.optimizer), "references": models}
        return replace(objective, start=self.model(objective.start, own), **parts)

    def result(self, result: ClientResult) -> ClientResult:
        """What the algorithm gets to see of it."""
        if self._whole:
            return result
        start, params = self.shared(result.start), self.shared(result.params)
        return replace(result, start=start, params=params, optimizer=self.restricted(result.optimizer))
