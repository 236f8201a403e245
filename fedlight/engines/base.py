"""The interface of the engines: how the local trainings of a round are executed."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import Dataset

from fedlight.local import ClientResult, GradientClip, LocalObjective
from fedlight.module.state import ModuleState
from fedlight.perturbations.base import Perturbation, State
from fedlight.seeding import derive_seed, generator


@dataclass(frozen=True)
class LocalTraining:
    """What all local trainings of an experiment have in common.

    Attributes:
        module: the module that is trained; every engine may rebind its parameters while it is set up.
        fabric: device, precision and strategy.
        seed: seed of the experiment.
        batch_size: samples of a batch.
        epochs: local epochs of a round; None where ``steps`` is given.
        steps: local optimizer steps of a round; None where ``epochs`` is given.
        limit_batches: at most so many batches of an epoch; None for all.
        accumulate_grad_batches: batches of one optimizer step.
        clip: gradient clipping or None.
        perturbation: where gradients are taken, or None for w itself.
        num_workers: worker processes of the loader of a dataset that is read sample by sample.
        collate_fn: its collate function.
        call: calls a hook of the callbacks and of the module, as ``call("on_train_batch_start", batch, index)``.
        compile: whether the engine may compile what it runs.
        channels_last: whether images lie with their channels side by side.
        lr_factors: what the algorithm multiplies the learning rate of each local step with, or None.
        optimizer_state: what the algorithm wants to know of the optimizer's state, by name.
        clients: clients that this process trains in a round, usually at most.
        per_round: clients that all processes train in a round.
        sizes: how many clients there are of each size n_i above 0.
        example: a client's work, as in the first round, to try things out with.
        state: what clients may change of the module, to be put back after each; None where nothing is.
        findings: what steps were seen to do, on the module itself.
    """

    module: LightningModule
    fabric: Fabric
    seed: int
    batch_size: int
    epochs: int | None
    steps: int | None
    limit_batches: int | float | None = None
    accumulate_grad_batches: int = 1
    clip: GradientClip | None = None
    perturbation: Perturbation | None = None
    num_workers: int = 0
    collate_fn: Callable[[Any], Any] | None = None
    call: Callable[..., Any] = field(default=lambda name, *args: None)
    compile: bool = False
    channels_last: bool = False
    lr_factors: Callable[[int], Sequence[float]] | None = None
    optimizer_state: tuple[str, ...] = ()
    clients: int = 1
    per_round: int = 1
    sizes: Counter[int] = field(default_factory=Counter)
    example: "ClientTask | None" = None
    state: ModuleState | None = None
    findings: "Findings" = field(default_factory=lambda: Findings())

    def is_last(self, nth: int) -> bool:
        """Whether a pass of a step, counted from 0, is its last."""
        return nth + 1 == (1 if self.perturbation is None else self.perturbation.passes)

    def seen(self, batches: list[Any], nth: int) -> list[Any]:
        """Which of a step's batches a pass sees."""
        order = () if self.perturbation is None else self.perturbation.batches
        every = 1 + max(order, default=-1)
        return batches[order[nth] :: every] if 0 < every <= len(batches) else batches


@dataclass(frozen=True)
class Findings:
    """What local steps do besides changing parameters: names, or phrases."""

    moving: tuple[str, ...] = ()  # parameters without a gradient that change: they are treated as buffers
    replaced: tuple[str, ...] = ()  # buffers in whose place another tensor is put
    changed: tuple[str, ...] = ()  # attributes that change
    drawn: tuple[str, ...] = ()  # global random generators that are drawn from, apart from the device's
    read: tuple[str, ...] = ()  # what is read that differs from step to step or round to round
    outside: tuple[str, ...] = ()  # what they do outside of the module: print, log, change globals
    idle: tuple[str, ...] = ()  # trained parameters that have no gradient in some steps
    waking: tuple[str, ...] = ()  # those that have one in others
    written: tuple[str, ...] = ()  # those that a forward or backward pass writes to
    unlike: tuple[str, ...] = ()  # what is another where a step is a function of tensors


@dataclass(frozen=True)
class ClientTask:
    """One client's work in one round.

    Attributes:
        client: its index.
        objective: what the algorithm asks of it.
        dataset: its data.
        weight: p_i = n_i / mean(n).
        buffers: the buffers that it starts from, by name.
        perturbation: the perturbation's state at the start of the round.
        lrs: the learning rate of each parameter group in this round, where a schedule per round sets it.
        loss_scale: the scale that 16-bit mixed precision starts from.
        stage: what the training is called where a client trains more than once in a round; its draws depend on it.
        length: local epochs and steps of this training, one of them None, in the place of what all have in common.
    """

    client: int
    objective: LocalObjective
    dataset: Dataset[Any]
    weight: float
    buffers: dict[str, Tensor] = field(default_factory=dict)
    perturbation: State = field(default_factory=dict)
    lrs: tuple[float, ...] | None = None
    loss_scale: float = 65536.0
    stage: str = ""
    length: tuple[int | None, int | None] | None = None

    def generator(self, seed: int, purpose: str, round: int) -> torch.Generator:
        """The generator of what is drawn for a purpose in this training."""
        return generator(seed, self.stage + purpose, round, self.client)

    def local_seed(self, seed: int, round: int) -> int:
        """What the generators that the module's own code draws from are seeded with."""
        return derive_seed(seed, f"{self.stage}local", round, self.client)


@contextmanager
def named(round: int, *clients: int) -> Iterator[None]:
    """Let an exception say which round (0-based here, from 1 in the message) and clients it comes from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This happened in round {round + 1}, client {', '.join(map(str, clients))}.")
        if "out of bounds" in str(error):
            error.add_note("Labels are checked before training where the dataset has `.targets`, or data.targets does.")
        raise


class Engine(ABC):
    """Executes local trainings. All engines give the same results; they differ in how fast.

    :meth:`setup` is called once, before the first round, and must find out there whether the engine can do the work.

    Attributes:
        reason: why it is this one, in words.
        together: whether a step of it is one of all clients.
    """

    reason = "as trainer.engine says"
    together = False

    @abstractmethod
    def setup(self, training: LocalTraining) -> None:
        """Prepare for rounds.

        Raises:
            MisconfigurationException: if the engine cannot train this module, saying why.
        """

    @abstractmethod
    def train(self, round: int, tasks: Iterable[ClientTask]) -> Iterable[ClientResult]:
        """Train the clients of one round, and hand out each result as soon as may be."""

    def teardown(self) -> None:  # noqa: B027  (an engine that takes nothing gives nothing back)
        """Give back what :meth:`setup` took; the module's parameters get storage of their own."""
