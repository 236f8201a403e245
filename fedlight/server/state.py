"""All that the server knows between two rounds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlight.perturbations.base import State


@dataclass
class ServerState:
    """All that the server knows after some rounds, besides the clients' rows.

    Attributes:
        round: rounds that are complete.
        global_step: local steps of all clients so far.
        algorithm: the algorithm's state; ``params`` is the server's model.
        perturbation: the perturbation's state.
        buffers: the model's buffers.
        views: the weights that are evaluated, by name, ``[P]`` each.
        latest_mean: ``params``, the mean over every client's latest model, ``[P]`` float64, and ``initial``, the model
            before the first round, ``[P]``; empty unless view ``all`` is kept.
        loss_scale: where 16-bit mixed precision starts in the next round.
    """

    round: int = 0
    global_step: int = 0
    algorithm: State = field(default_factory=dict)
    perturbation: State = field(default_factory=dict)
    buffers: State = field(default_factory=dict)
    views: State = field(default_factory=dict)
    latest_mean: State = field(default_factory=dict)
    loss_scale: float = 65536.0


def like(state: State, old: State) -> State:
    """A state in the data types that it had, on its device."""
    return {k: v.to(old[k]) if k in old else v for k, v in state.items()}


def moved(state: State, device: torch.device | str) -> State:
    """A state on another device."""
    return {k: v.detach().to(device) for k, v in state.items()}


def num_bytes(tensors: Mapping[Any, Tensor]) -> int:
    """The size of some tensors."""
    return sum(v.numel() * v.element_size() for v in tensors.values())
