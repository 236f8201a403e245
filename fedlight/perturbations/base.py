"""The point at which a local step takes its gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.module.parameters import ParameterLayout

State = dict[str, Tensor]
"""What an algorithm or perturbation keeps, for the server or for one client: named tensors."""


@dataclass(frozen=True)
class Sender:
    """The client that sent a message, in figures.

    Attributes:
        client: its index.
        num_samples: n_i.
        weight: p_i = n_i / mean(n) over all clients.
        num_steps: S, optimizer steps taken.
        lr_sum: Σ of the learning rate over the steps; S·η where it is constant in the round.
    """

    client: int
    num_samples: int
    weight: float
    num_steps: int
    lr_sum: float


class Perturbation:
    """Base of all perturbations: in each local step the gradient is taken at w + ε instead of w.

    A perturbation holds its settings and nothing else. Whatever changes is a :data:`State` that it is handed and
    returns, so every engine can run it: all methods are pure, use tensor operations only, never look at a tensor's
    value from Python and never touch a random generator.

    Attributes:
        needs_gradient: whether ε depends on the gradient at w, which costs a second pass per step.
        batches: which of the batches that ``trainer.accumulate_grad_batches`` gives to a step each pass of
            :meth:`gradient` sees, as ``(0, 1)``; all where a step has fewer. Empty if that is not overridden.
    """

    needs_gradient: bool = True
    batches: tuple[int, ...] = ()

    @property
    def passes(self) -> int:
        """Gradients of a step."""
        return len(self.batches) or 1 + self.needs_gradient

    def setup(self, layout: ParameterLayout) -> None:
        """Called once before training with the order of the parameters in the flat vector."""

    def init_server(self, params: Tensor) -> State:
        """The server's state before the first round."""
        return {}

    def init_client(self, params: Tensor) -> State:
        """The state of a client that trains for the first time. ``params`` are the server's, for shape and device."""
        return {}

    def broadcast(self, server: State) -> State:
        """What every client of the round receives besides what the algorithm sends; nothing by default."""
        return {}

    def begin(self, received: State, client: State, start: Tensor) -> State:
        """What the client's steps of this round read and update.

        Args:
            received: all that the client received, also from the algorithm; vectors are 0 at entries that are frozen.
            client: the client's own state, with what the algorithm keeps of it beside; it as well.
            start: where its training starts, ``[P]``.
        """
        return {}

    def epsilon(self, params: Tensor, gradient: Tensor | None, state: State) -> tuple[Tensor, State]:
        """ε ``[P]`` and the new state.

        Args:
            params: w, ``[P]``.
            gradient: ∇L(w) ``[P]`` on the step's batch; None where :attr:`needs_gradient` is false.
            state: what :meth:`begin` or the previous step returned.
        """
        raise NotImplementedError(f"{type(self).__name__} must define epsilon")

    def gradient(self, params: Tensor, at: Callable[[Tensor | None], Tensor], state: State) -> tuple[Tensor, State]:
        """What a step follows ``[P]`` in the place of the gradient at w, and the new state; by default that at w + ε.

        Args:
            params: w, ``[P]``.
            at: the gradient at w + ε, of ε ``[P]`` or None; called :attr:`passes` times, it may overwrite its results.
            state: as in :meth:`epsilon`.
        """
        epsilon, state = self.epsilon(params, at(None) if self.needs_gradient else None, state)
        return at(epsilon), state

    def client_update(self, client: State, state: State, start: Tensor) -> tuple[State, State]:
        """The client's own state after the round, and what it sends besides the algorithm's message.

        Args:
            client: its state before.
            state: what the last step returned.
            start: the model that it received, with its personal entries, ``[P]``.
        """
        return client, {}

    def contribution(self, message: State, sender: Sender) -> State:
        """What is added up over the clients of the round: by default what they sent."""
        return message

    def aggregate(self, server: State, total: State) -> State:
        """The server's state after the round, from the sums of :meth:`contribution` and ``clients``, their number."""
        return server


def unit(vector: Tensor) -> Tensor:
    """``vector/‖vector‖₂``, and 0 where the norm is 0. Usable in captured and batched programs."""
    norm = torch.linalg.vector_norm(vector)
    # A zero vector is divided by 1 and not by a tiny number: the norm of a nearly zero vector underflows before
    # its entries do, and those must not be blown up.
    return vector / torch.where(norm > 0, norm, 1.0)
