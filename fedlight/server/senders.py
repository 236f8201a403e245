"""What a client answers in a round, and what the server knows of it besides."""

from dataclasses import dataclass, field

from torch import Tensor


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


@dataclass(frozen=True)
class Packed:
    """A client's message as it crosses.

    Attributes:
        tensors: by name; of a vector that a chain has changed, what it handed on and what lies beside that.
        lengths: of such vectors, the entries that each link was handed.
    """

    tensors: dict[str, Tensor]
    lengths: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a client answers in a round.

    Attributes:
        message: what the algorithm sends, as the server receives it.
        beside: what the perturbation sends.
        rows: the client's own state after the round, by part; it counts only if the server uses the message.
        steps_apart: steps that the client took for itself.
        part: the client's personal entries, which do not cross, ``[P_own]``.
        packed: the algorithm's message as it crosses.
    """

    message: dict[str, Tensor]
    beside: dict[str, Tensor]
    rows: dict[str, dict[str, Tensor]]
    steps_apart: int
    part: Tensor
    packed: Packed

    @property
    def num_bytes(self) -> int:
        """The size of what crosses."""
        return sum(v.nbytes for tensors in (self.packed.tensors, self.beside) for v in tensors.values())
