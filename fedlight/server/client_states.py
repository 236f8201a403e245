"""What clients have: a model, buffers, and state of their own."""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedlight.algorithms.base import Algorithm
from fedlight.data.datamodule import FederatedDataModule, class_counts
from fedlight.local import ClientResult, LocalObjective
from fedlight.module.parameters import ParameterLayout
from fedlight.personal.base import OwnTraining, Personalization
from fedlight.personal.split import Split
from fedlight.perturbations.base import Perturbation, State
from fedlight.server.clients import ClientStore
from fedlight.server.state import ServerState, num_bytes, tensors
from fedlight.transforms.attack import attacks_by
from fedlight.transforms.base import Transform

BufferPolicy = Literal["average", "local", "reset"]
NOTHING: tuple[State, State, int] = {}, {}, 0


@dataclass(eq=False)
class ClientStates:
    """What each client has in a round, which :class:`ClientSide` works with. Data and ``personal`` are set up."""

    algorithm: Algorithm
    perturbation: Perturbation | None
    personal: Personalization
    layout: InitVar[ParameterLayout]
    data: FederatedDataModule
    store: ClientStore
    buffer_policy: BufferPolicy
    transforms: Sequence[Transform]
    seed: int  # of the transforms' random draws

    shows_parts: ClassVar[bool] = True  # whether the mean of what stays with clients is known, for evaluation alone
    initial: Tensor = field(init=False)  # the personal entries before the first round, [P_own]
    initial_buffers: State = field(default_factory=dict, init=False)  # before the first round
    read: bool = field(default=False, init=False)  # whether datasets are read into memory, as an engine may need
    compared: Sequence[str] = field(default=(), init=False)  # the models that penalties compare the clients' with
    losses: dict[int, float] | None = field(default=None, init=False)  # of the models that clients start from

    def __post_init__(self, layout: ParameterLayout) -> None:
        # The samples of every client, [N], their mean, and the part of the model that all share: what algorithms see.
        self.sizes = torch.tensor([self.data.client_size(i) for i in range(self.data.num_clients)])
        self._sizes = self.sizes.numpy()  # reads one entry in a fraction of the time
        self.mean_size = float(self.sizes.double().mean())
        self.split = Split(layout, self.personal.entries)
        self.algorithm.setup(len(self.sizes), self.split.layout)
        if self.perturbation is not None:
            self.perturbation.setup(layout)
        counts = class_counts(self.data)
        for attack in attacks_by(self.transforms):
            attack.setup(len(self.sizes), self.seed, None if counts is None else counts.shape[1])

    def begin(self, server: ServerState) -> State:
        """Begin a round, or an evaluation: what every client receives of this server, besides its buffers."""
        self._server, self._received = server, self.broadcast(server)
        self._held: list[ClientResult] = []
        self._apart: dict[int, OwnTraining] = {}
        self._trained: dict[int, tuple[State, State, int]] = {}
        return self._received

    def broadcast(self, server: ServerState) -> State:
        """What algorithm and perturbation send to every client."""
        beside = {} if self.perturbation is None else self.perturbation.broadcast(server.perturbation)
        sent, shape = self.algorithm.broadcast(server.algorithm), {"params": server.algorithm["params"]}
        return tensors(sent, self.algorithm, "broadcast", shape) | beside

    @property
    def sends_buffers(self) -> bool:
        """Whether buffers cross, but for those of personal parts."""
        return self.buffer_policy == "average"

    @property
    def buffer_bytes(self) -> int:
        """What buffers add to a message in either direction."""
        if not self.sends_buffers:
            return 0
        return num_bytes({k: v for k, v in self._server.buffers.items() if not self.is_local(k)})

    def is_local(self, buffer: str) -> bool:
        """Whether a buffer stays with each client."""
        return self.buffer_policy == "local" or buffer in self.personal.buffers

    def own(self, client: int) -> State:
        """What a client has for itself."""
        if client in self._trained:
            return self._trained[client][0]
        state = self.store.get(client, "personal")
        return self.personal.init_client(self._first) if state is None else state

    @property
    def _first(self) -> Tensor:
        """The server's model with the personal entries that a client begins with, ``[P]``."""
        return self.split.model(self._server.algorithm["params"], self.initial)

    def _part(self, client: int) -> Tensor:
        return self.personal.part(self.own(client), self.initial)

    def _own(self, client: int) -> State:
        state = self.store.get(client, "algorithm")
        found = self.algorithm.init_client(self._server.algorithm["params"]) if state is None else state
        return tensors(found, self.algorithm, "init_client")

    def _own_perturbation(self, client: int) -> State:
        assert self.perturbation is not None
        state = self.store.get(client, "perturbation")
        return self.perturbation.init_client(self._first) if state is None else state

    def _begin_perturbation(self, client: int, objective: LocalObjective) -> State:
        """Its state at the start of a training; it sees 0 at frozen entries, and of the server's at personal ones."""
        if self.perturbation is None:
            return {}
        received = {**self.split.padded(self._received), "params": self._model(client)}
        own = {**self.split.padded(self._own(client)), **self._own_perturbation(client)}
        start = objective.start

        def seen(state: State) -> State:
            return {k: objective.moving(v) if v.shape == start.shape else v for k, v in state.items()}

        return self.perturbation.begin(seen(received), seen(own), start)

    def _buffers(self, client: int) -> State:
        local = (self.store.get(client, "buffers") or {}) | self._trained.get(client, NOTHING)[1]
        if self.buffer_policy == "average":
            initial = {k: v for k, v in self.initial_buffers.items() if self.is_local(k)}
            return {**self._server.buffers, **initial, **local}
        return {**self.initial_buffers, **local}

    def personal_model(self, client: int, server: Tensor) -> State:
        """A client's own model, under the name "", and its buffers, where the server's model is this one ``[P]``."""
        own = self.own(client)
        model = self.personal.model(self.split.model(self.split.shared(server), self._part(client)), own)
        return {"": model, **self._buffers(client), **self.personal.held(own)}

    def _model(self, client: int) -> Tensor:
        """What a client has received, with its own entries, ``[P]``."""
        return self.split.model(self._received["params"], self._part(client))

    def _size(self, client: int) -> int:
        return int(self._sizes[client]) if client < len(self._sizes) else self.data.client_size(client)
