"""What stands between what a client would send and what the server receives."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight.perturbations.base import State


@dataclass(frozen=True)
class Packed:
    """A client's message as it crosses.

    Attributes:
        tensors: by name; of a vector that a chain has changed, what it handed on and what lies beside that.
        lengths: of such vectors, the entries that each link was handed.
    """

    tensors: dict[str, Tensor]
    lengths: dict[str, list[int]] = field(default_factory=dict)


class Transform:
    """Base of all transforms: as it stands it changes nothing.

    Transforms are links of a chain. Each one takes a vector, hands a vector on to the next (of another length or data
    type, if it likes), and puts tensors beside it that the server needs to undo it; what the last one hands on and all
    that lies beside it is what crosses, and ``comm/up_mb`` counts it. Of a client's model its update Δ_i goes through
    the chain, and of what an algorithm sends besides, each tensor by itself.

    A transform holds its settings and nothing else: its methods are handed what a client keeps for it, and return it.

    Attributes:
        stage: where in a chain it may stand, smaller numbers first: -1 attacks, 0 bounds, 1 leaves out, 2 rounds, 3
            bounds and noises the sum at the server.
        update_only: whether it makes no sense for anything but a model's update.
    """

    stage: int = 0
    update_only: bool = False

    def init_client(self, vector: Tensor) -> State:
        """What a client keeps for a vector before it sends it for the first time."""
        return {}

    def encode(self, vector: Tensor, own: State, rng: torch.Generator) -> tuple[Tensor, State, State]:
        """On the client.

        Args:
            vector: what the link before hands on, ``[n]``.
            own: what the client keeps for this vector.
            rng: where random numbers come from, on the CPU.

        Returns:
            What is handed on, what lies beside it, and what the client keeps if the server uses the message.
        """
        return vector, {}, own

    def decode(self, vector: Tensor, beside: State, length: int) -> Tensor:
        """On the server: ``[length]`` of what :meth:`encode` handed on and put beside it."""
        return vector


def check_chain(transforms: Sequence[Transform]) -> None:
    """Refuse an order that makes no sense, by the right one, and what is no transform."""
    for transform in transforms:
        if not isinstance(transform, Transform):
            raise MisconfigurationException(f"trainer.transforms holds {transform!r}, which is no Transform.")
    if any(after.stage < before.stage for before, after in pairwise(transforms)):
        right = sorted(transforms, key=lambda t: t.stage)
        found, names = ([type(t).__name__ for t in chain] for chain in (transforms, right))
        raise MisconfigurationException(
            f"trainer.transforms={found}: attacks come first, what bounds an update before what leaves out entries,"
            f" then what rounds, and last what noises the sum. Write {names}."
        )


def check_messages(
    transforms: Sequence[Transform], who: str, received: State, sent: State, beside: Iterable[str]
) -> None:
    """Refuse what a chain cannot be applied to: its names are looked at, and each tensor is sent once.

    ``sent`` is what a client of the algorithm ``who`` sends, and ``beside`` are names of what its perturbation does.
    """
    extra = sorted(set(sent) - {"params"})
    for transform in transforms:
        name = type(transform).__name__
        if beside:
            raise MisconfigurationException(
                f"trainer.transforms: {name} works on updates, and the perturbation of {who} sends"
                f" {', '.join(sorted(beside))}, which is none. Use another perturbation, or no transforms."
            )
        if transform.update_only and extra:
            raise MisconfigurationException(
                f"trainer.transforms: {name} is for a model's update, and {who} sends {', '.join(extra)} as well, whose"
                " size is another. Use an algorithm that sends its model alone (FedAvg, FedDyn), or leave it out."
            )
    for name, value in sent.items():
        try:
            packed, _ = pack(transforms, received, {name: value}, {}, torch.Generator())
            unpack(transforms, received, packed)
        except Exception as error:
            raise MisconfigurationException(
                f"trainer.transforms: {[type(t).__name__ for t in transforms]} cannot take {name} of {who}, which is"
                f" {value.dtype} {list(value.shape)}. Use others, or none. {type(error).__name__}: {error}"
            ) from error


def pack(
    transforms: Sequence[Transform], received: State, message: State, own: Mapping[str, Tensor], rng: torch.Generator
) -> tuple[Packed, State]:
    """On the client: a message as it crosses, and what the client keeps for the chain, which ``own`` was before.

    ``received`` has the ``params`` that it started from, and the ``message`` those that it ended with.
    """
    packed, kept = Packed({}), State()
    for name in sorted(message):
        vector = message[name] - received["params"] if name == "params" else message[name]
        sent, tensors, lengths = vector, State(), []
        for position, transform in enumerate(transforms):
            key = f"{name}/{position}/"
            lengths.append(sent.numel())
            state = {k.removeprefix(key): v for k, v in own.items() if k.startswith(key)}
            sent, beside, state = transform.encode(sent, state or transform.init_client(sent), rng)
            kept |= {key + k: v for k, v in state.items()}
            tensors |= {key + k: v for k, v in beside.items()}
        if sent is vector and not tensors:
            packed.tensors[name] = message[name]
        else:
            packed.tensors.update({**tensors, name: sent})
            packed.lengths[name] = lengths
    return packed, kept


def unpack(transforms: Sequence[Transform], received: State, packed: Packed) -> State:
    """On the server: the message that crossed so."""
    message, beside = State(), State()
    for name, value in packed.tensors.items():
        (beside if any(name.startswith(f"{changed}/") for changed in packed.lengths) else message)[name] = value
    for name, lengths in packed.lengths.items():
        for position, transform in reversed(list(enumerate(transforms))):
            key = f"{name}/{position}/"
            own = {k.removeprefix(key): v for k, v in beside.items() if k.startswith(key)}
            message[name] = transform.decode(message[name], own, lengths[position])
        if (found := list(message[name].shape)) not in ([lengths[0]], [] if lengths[0] == 1 else None):
            raise ValueError(f"{name}, {[lengths[0]]}, arrives as {found}")
        if name == "params":
            message[name] = received["params"] + message[name].to(received["params"])
    return message
