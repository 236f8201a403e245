"""How clients are corrected and how the server aggregates."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedlight._checks import check_hyperparameter as check_hyperparameter
from fedlight.aggregation import weighted_mean
from fedlight.local import ClientResult, LocalObjective
from fedlight.parameters import ParameterLayout
from fedlight.perturbations.base import Perturbation
from fedlight.perturbations.base import State as State

Message = dict[str, Tensor]
"""What a client sends besides its model."""
Weighting = Literal["samples", "equal"]
"""Whether clients count by their samples, p_i = n_i / mean(n), or equally, p_i = 1."""


class Algorithm:
    """Base of all federated algorithms; as it stands it is FedAvg with a server learning rate of 1.

    An algorithm holds its settings and nothing else. State is explicit: the server's and each client's are named
    tensors that the methods are handed and return. It owns no loop, device, logger or random generator; sums run
    over clients in the order given.

    The trainer calls, in each round: :meth:`broadcast`, :meth:`objective` per client, :meth:`client_update` per
    client, :meth:`aggregate`, :meth:`evaluated`.

    Attributes:
        perturbation: the perturbation that belongs to the method (FedSAM's SAM), or None where the user may choose.
        buffers: the buffer policy that the method requires, or None.
        needs_lr: whether the method divides by the local learning rate, so that an optimizer must have one.
        down_vectors: vectors ``[P]`` that the server sends to each client in a round; a fraction where a part of the
            model stays with the client.
        up_vectors: vectors ``[P]`` that each client sends to the server in a round.
        mean_by: whether the mean of the clients' models weighs them by samples (McMahan et al. 2017) or equally.
        weighting: what p_i is in the method's corrections; None where they have no p_i.
        num_clients: N; set by :meth:`setup`.
    """

    perturbation: Perturbation | None = None
    buffers: Literal["average", "local", "reset"] | None = None
    needs_lr: bool = False
    down_vectors: float = 1
    up_vectors: float = 1
    mean_by: Weighting = "samples"
    weighting: Weighting | None = None
    num_clients: int = 0

    def setup(self, num_clients: int, layout: ParameterLayout) -> None:
        """Called once before training, with N and the order of the parameters in the flat vector."""
        if self.weighting not in (None, "samples", "equal"):
            raise ValueError(f"algorithm.weighting must be 'samples' or 'equal', found {self.weighting!r}.")
        self.num_clients = num_clients

    def init_server(self, params: Tensor) -> State:
        """The server's state before the first round; ``params`` ``[P]`` is always part of it."""
        return {"params": params}

    def init_client(self, params: Tensor) -> State:
        """The state of a client that trains for the first time. ``params`` are the server's, for shape and device."""
        return {}

    def broadcast(self, server: State) -> Tensor:
        """What clients start from, ``[P]``."""
        return server["params"]

    def objective(self, server: State, client: State, weight: float) -> LocalObjective:
        """What is asked of a client whose share of the data is ``weight`` = p_i = n_i / mean(n)."""
        return LocalObjective(start=self.broadcast(server))

    def client_update(self, server: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The client's new state and what it sends besides its model. ``server`` is the state of the round's start."""
        return client, {}

    def p(self, weight: float) -> float:
        """p_i of a client whose share of the data is ``weight``, as :attr:`weighting` asks for."""
        return 1.0 if self.weighting == "equal" else weight

    def mean_weight(self, num_samples: int) -> float:
        """What a client of n_i samples weighs in the method's mean, and so in every view."""
        return 1.0 if self.mean_by == "equal" else float(num_samples)

    def average(self, results: Sequence[ClientResult]) -> Tensor:
        """The mean of the models that trained in the round, ``[P]``, weighted by :meth:`mean_weight`."""
        return weighted_mean([r.params for r in results], [self.mean_weight(r.num_samples) for r in results])

    def mean_update(self, results: Sequence[ClientResult]) -> Tensor:
        """The mean of Δ_i over the clients that trained, ``[P]``, weighted by :meth:`mean_weight`."""
        return weighted_mean([r.update for r in results], [self.mean_weight(r.num_samples) for r in results])

    def step(self, params: Tensor, results: Sequence[ClientResult], length: float) -> Tensor:
        """``params`` moved towards the mean of the models; a length of 1 takes the mean itself, to the bit."""
        average = self.average(results)
        return average if length == 1.0 else params + length * (average - params)

    def aggregate(self, server: State, results: Sequence[ClientResult], messages: Sequence[Message]) -> State:
        """The server's state after the round, from the trained clients' results and messages, in client order."""
        return {**server, "params": self.average(results)}

    def evaluated(self, server: State, results: Sequence[ClientResult]) -> dict[str, Tensor]:
        """The weights that are evaluated, by view: ``server`` after aggregation, and the ``selected`` clients' mean.

        The trainer adds ``all``, the mean over the latest model of every client, with the same weights.
        """
        return {"server": server["params"], "selected": self.average(results)}


def mean_gradient(result: ClientResult) -> Tensor:
    """−Δ_i/(S·η): the mean of the corrected gradients that a client followed with plain SGD, ``[P]``.

    With another optimizer it is the mean step per unit of learning rate. Where the learning rate of the round was 0
    nothing was learned about the gradient, and it is 0.
    """
    if result.lr_sum == 0:
        return torch.zeros_like(result.params)
    return -result.update / result.lr_sum
