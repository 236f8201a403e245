"""How clients are corrected and how the server aggregates."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedlight.checks import Number as Number
from fedlight.checks import check_hyperparameter as check_hyperparameter
from fedlight.local import ClientResult, LocalObjective
from fedlight.module.parameters import ParameterLayout
from fedlight.penalties.base import Penalty
from fedlight.personal.base import Personalization
from fedlight.perturbations.base import Perturbation
from fedlight.perturbations.base import Sender as Sender
from fedlight.perturbations.base import State as State
from fedlight.written import Remembers

Message = dict[str, Tensor]
"""What a client sends: named tensors, and nothing else."""
Weighting = Literal["samples", "equal"]
"""Whether clients count by their samples, p_i = n_i / mean(n), or equally, p_i = 1."""


class Algorithm(Remembers):
    """Base of all federated algorithms; as it stands it is FedAvg with a server learning rate of 1.

    An algorithm holds its settings and nothing else. State is explicit: the server's and each client's are named
    tensors that the methods are handed and return. It owns no loop, device, logger or random generator.

    What a client receives and what it sends is all that crosses between it and the server, and ``comm/*_mb`` count it.
    In each round the server calls :meth:`broadcast`; each client :meth:`objective` and, after its training,
    :meth:`client_update`; the server :meth:`contribution` for each message, whose results it adds up, and
    :meth:`aggregate` with the sums. These are exact, so no result depends on the order of the clients.

    Attributes:
        perturbation: the perturbation that belongs to the method (FedSAM's SAM), or None where the user may choose.
        penalty: the penalty that belongs to the method, or None; others may come beside it.
        personal: what stays with each client, where that belongs to the method, or None.
        buffers: the buffer policy that the method requires, or None.
        needs_lr: whether the method divides by the local learning rate, so that an optimizer must have one.
        needs_loss: whether ``result.loss`` is to be that of the broadcast model on the client's data, which takes
            one more pass over them.
        lr_factors: a method that gives, from the number S of a client's local steps, a factor of the learning rate for
            each of them; None where the rate is the optimizer's.
        optimizer_state: names of what a client sends, or keeps, of its optimizer's state, as they are in torch
            (``exp_avg_sq``, ``momentum_buffer``): ``result.optimizer`` then has them, and ``LocalObjective.optimizer``
            says what they begin with. Only the eager engine can do this, and optimizers whose state begins with zeros.
        optimizers: classes of which the clients' optimizer must be one; empty for any.
        collects: whether :meth:`aggregate` needs all models at once (median, Krum): ``total`` then holds ``models``,
            ``[K, P]`` in the order of the clients. They are K·P numbers in every process.
        keeps_updates: whether the server keeps each client's last update: ``last_update`` in a :meth:`contribution`.
        min_clients: how many clients a round must have.
        mean_by: whether the mean of the clients' models weighs them by samples (McMahan et al. 2017) or equally.
        weighting: what p_i is in the method's corrections; None where they have no p_i.
        server_zeros: vectors ``[P]`` that the server keeps besides its model, by name; they begin with 0.
        client_zeros: vectors ``[P]`` that each client keeps, which begin with 0.
        num_clients: N; set by :meth:`setup`.
    """

    perturbation: Perturbation | None = None
    penalty: Penalty | None = None
    personal: Personalization | None = None
    buffers: Literal["average", "local", "reset"] | None = None
    needs_lr: bool = False
    needs_loss: bool = False
    lr_factors: Callable[[int], Sequence[float]] | None = None
    optimizer_state: tuple[str, ...] = ()
    optimizers: tuple[type[Optimizer], ...] = ()
    collects: bool = False
    keeps_updates: bool = False
    min_clients: int = 1
    mean_by: Weighting = "samples"
    weighting: Weighting | None = None
    server_zeros: tuple[str, ...] = ()
    client_zeros: tuple[str, ...] = ()
    num_clients: int = 0

    def setup(self, num_clients: int, layout: ParameterLayout) -> None:
        """Called once before training, with N and the order of the parameters in the flat vector."""
        if self.weighting not in (None, "samples", "equal"):
            raise ValueError(f"algorithm.weighting must be 'samples' or 'equal', found {self.weighting!r}.")
        self.num_clients = num_clients

    def init_server(self, params: Tensor) -> State:
        """The server's state before the first round; ``params`` ``[P]`` is always part of it."""
        return {"params": params, **{name: torch.zeros_like(params) for name in self.server_zeros}}

    def init_client(self, params: Tensor) -> State:
        """The state of a client that trains for the first time. ``params`` are the server's, for shape and device."""
        return {name: torch.zeros_like(params) for name in self.client_zeros}

    def broadcast(self, server: State) -> State:
        """What every client of the round receives; ``params`` ``[P]`` is what it starts from."""
        return {"params": server["params"]}

    def objective(self, received: State, client: State, weight: float) -> LocalObjective:
        """What is asked of a client whose share of the data is ``weight`` = p_i = n_i / mean(n)."""
        return LocalObjective(start=received["params"])

    def client_update(self, received: State, client: State, result: ClientResult) -> tuple[State, Message]:
        """The client's new state and its message; ``params``, the model that it ended with, is always part of that."""
        return client, {"params": result.params}

    def p(self, weight: float) -> float:
        """p_i of a client whose share of the data is ``weight``, as :attr:`weighting` asks for."""
        return 1.0 if self.weighting == "equal" else weight

    def mean_weight(self, num_samples: int) -> float:
        """What a client of n_i samples weighs in the method's mean, and so in every view."""
        return 1.0 if self.mean_by == "equal" else float(num_samples)

    def contribution(self, message: Message, sender: Sender) -> State:
        """What is added up over the clients of the round, besides ``update`` and ``weight`` (see :meth:`aggregate`).

        Args:
            message: what the client sent, and ``update``, Δ_i in float64: ``params`` less what the client received.
            sender: who sent it.
        """
        return {}

    def aggregate(self, server: State, total: State) -> State:
        """The server's state after the round.

        Args:
            server: its state before.
            total: the sums over the clients that trained, in float64: of each :meth:`contribution`, ``update``
                (Σ weight·Δ_i with :meth:`mean_weight`), ``weight`` (Σ weight), and ``clients``, their number; where
                the algorithm :attr:`collects`, ``models``.
        """
        return {**server, "params": server["params"] + mean_update(total)}

    @property
    def sums_updates(self) -> bool:
        """Whether the server makes use of nothing but Σ weight·Δ_i of what clients send."""
        return not self.collects and type(self).contribution is Algorithm.contribution

    def evaluated(self, server: State, received: State, total: State) -> dict[str, Tensor]:
        """The weights that are evaluated, by view: ``server`` after aggregation, and the ``selected`` clients' mean.

        The trainer adds ``all``, the mean over the latest model of every client, with the same weights.
        """
        return {"server": server["params"], "selected": received["params"] + mean_update(total)}


def mean_update(total: State) -> Tensor:
    """The mean of Δ_i over the clients that trained, with the algorithm's weights, ``[P]`` float64."""
    return total["update"] / total["weight"]


def mean_gradient(update: Tensor, lr_sum: float) -> Tensor:
    """−Δ_i/(S·η): the mean of the corrected gradients that a client followed with plain SGD, ``[P]``.

    With another optimizer it is the mean step per unit of learning rate. Where the learning rate of the round was 0
    nothing was learned about the gradient, and it is 0.
    """
    return torch.zeros_like(update) if lr_sum == 0 else -update / lr_sum
