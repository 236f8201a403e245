"""What each client has for itself: parts of the model, or a model beside the shared one."""

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fedlight.local import ClientResult, LocalObjective
from fedlight.module.parameters import ParameterLayout
from fedlight.perturbations.base import Perturbation, State
from fedlight.written import Remembers


@dataclass(frozen=True)
class OwnTraining:
    """A training of a client for itself, before that of the shared model; nothing of it is sent.

    Attributes:
        objective: what is trained; the perturbation and penalties of the run act as well.
        length: local epochs and steps, one of them None; None for as many as the shared training has.
        continued: whether the shared training starts from the buffers that this one ends with.
    """

    objective: LocalObjective
    length: tuple[int | None, int | None] | None = None
    continued: bool = False


class Personalization(Remembers):
    """Base of all ways to have a personal model; as it stands it does nothing.

    It holds settings; what a client keeps is explicit, as that of an algorithm: named tensors, its own, that methods
    are handed and return. A client's state counts only if the server uses its message of the round.

    Attributes:
        entries: which entries of the model stay with each client, ``[P]`` bool; set by :meth:`setup`. The algorithm,
            the server, transforms and messages see the vector of all others, ``[P_shared]``.
        buffers: names of the buffers that do.
        trains_apart: whether clients train for themselves before the shared training, as :meth:`before` says.
        adapts_all: whether every client that is evaluated trains before, as :meth:`adapt` says, and not new ones alone.
        perturbation: the perturbation that belongs to the method, or None where the user may choose.
    """

    entries: Tensor
    trains_apart: bool = False
    adapts_all: bool = False
    perturbation: Perturbation | None = None
    buffers: frozenset[str] = frozenset()

    def setup(self, module: LightningModule, layout: ParameterLayout) -> None:
        """Called once before training, with the module and the order of its parameters in the flat vector ``[P]``."""
        self.entries = torch.zeros(layout.numel, dtype=torch.bool)

    def init_client(self, params: Tensor) -> State:
        """The state of a client that trains for the first time.

        Args:
            params: the server's model ``[P]``, with the personal entries that the module was initialised with.
        """
        return {}

    def part(self, own: State, initial: Tensor) -> Tensor:
        """The client's personal entries, ``[P_own]``; those of before the first round by default."""
        return initial

    def before(self, start: Tensor, own: State) -> OwnTraining:
        """What a client trains for itself before the shared training.

        Args:
            start: the model that it received, with its personal entries, ``[P]``.
            own: its state.
        """
        raise NotImplementedError(f"{type(self).__name__} must define before")

    def trained(self, own: State, result: ClientResult, start: Tensor) -> State:
        """The client's state after the training of :meth:`before`, which had the same ``start``."""
        return own

    def objective(self, objective: LocalObjective) -> LocalObjective:
        """What is asked of the client in the shared training, of the whole model ``[P]``."""
        return objective

    def client_update(self, own: State, result: ClientResult) -> State:
        """The client's state after the shared training; its result is of the whole model."""
        return own

    def model(self, model: Tensor, own: State) -> Tensor:
        """The client's personal model ``[P]``; ``model`` is the server's with the client's personal entries."""
        return model

    def held(self, own: State) -> State:
        """The buffers of the client's personal model, where they are others than those of its shared training."""
        return {}

    def adapt(self, start: Tensor, own: State) -> OwnTraining | None:
        """What makes the personal model of a client that has never trained where it is evaluated; None for nothing.

        It is forgotten afterwards. The arguments are those of :meth:`before`.
        """
        return None

    def adapted(self, start: Tensor, result: ClientResult) -> Tensor:
        """The personal model ``[P]`` that came of that, with the model ``start`` that was received."""
        return result.params

    def phrase(self, layout: ParameterLayout) -> str:
        """What it comes to, for the lines at the start of a run; empty for nothing."""
        return ""
