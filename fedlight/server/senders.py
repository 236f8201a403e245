"""What the server knows of a client besides its message."""

from dataclasses import dataclass


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
