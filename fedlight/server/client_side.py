"""What happens at the clients, before and after their local training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight.algorithms.base import Algorithm
from fedlight.data.arrays import in_memory
from fedlight.data.datamodule import FederatedDataModule
from fedlight.engines.base import ClientTask, named
from fedlight.local import ClientResult
from fedlight.perturbations.base import Perturbation, State
from fedlight.seeding import generator
from fedlight.server.clients import ClientStore
from fedlight.server.state import ServerState, num_bytes
from fedlight.transforms.attack import attacks_by, chain_of
from fedlight.transforms.base import Transform, check_messages, send

BufferPolicy = Literal["average", "local", "reset"]


@dataclass(frozen=True)
class Reply:
    """What a client answers in a round.

    Attributes:
        message: what the algorithm sends, as the server receives it.
        beside: what the perturbation sends.
        rows: the client's own state after the round, by part; it counts only if the server uses the message.
        num_bytes: size of what crosses.
    """

    message: State
    beside: State
    rows: dict[str, State]
    num_bytes: int


class ClientSide:
    """Makes tasks of what clients receive, and messages of what they have trained.

    Args:
        algorithm: how clients are corrected; set up.
        perturbation: where gradients are taken, or None; set up.
        datamodule: the clients' data.
        store: the clients' rows.
        buffer_policy: what happens to the module's buffers.
        transforms: what a message goes through before it is sent.
        seed: of the transforms' random draws.
        sizes: samples of every client, ``[N]``.

    Attributes:
        initial_buffers: the buffers before the first round.
        read: whether datasets are read into memory, for an engine that takes no others.
        compared: names of the models that penalties compare the clients' with.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        perturbation: Perturbation | None,
        datamodule: FederatedDataModule,
        store: ClientStore,
        buffer_policy: BufferPolicy,
        transforms: Sequence[Transform],
        seed: int,
        sizes: Tensor,
    ) -> None:
        self._algorithm, self._perturbation = algorithm, perturbation
        self._data, self._store, self._policy = datamodule, store, buffer_policy
        self._transforms, self._seed = transforms, seed
        self._sizes = sizes.numpy()  # reads one entry in a fraction of the time
        self._mean_size = float(sizes.double().mean())
        self.initial_buffers: State = {}
        self.read = False
        counts = datamodule.partition_counts()
        for attack in attacks_by(transforms):
            attack.setup(len(sizes), seed, None if counts is None else counts.shape[1])
        self.compared: Sequence[str] = ()

    def begin(self, server: ServerState, received: State) -> None:
        """Begin a round in which every client receives these tensors, and the server's buffers."""
        self._server, self._received = server, received
        self._held: list[ClientResult] = []

    def task(self, client: int, lrs: tuple[float, ...] | None, honest: bool = False) -> ClientTask:
        """What a client has to do in this round; ``honest`` if there were no attack."""
        weight = float(self._sizes[client]) / self._mean_size
        kept = self._own(client)
        objective = self._algorithm.objective(self._received, kept, weight)
        if unknown := objective.optimizer.keys() - {*self._algorithm.optimizer_state}:
            name = type(self._algorithm).__name__
            raise MisconfigurationException(f"algorithm: {name}.optimizer_state must name {sorted(unknown)}.")
        models = {"start": objective.start, **objective.references}
        objective = replace(objective, references={k: v for k, v in models.items() if k in self.compared})
        perturbation: State = {}
        if self._perturbation is not None:
            own = {**kept, **self._own_perturbation(client)}
            perturbation = self._perturbation.begin(self._received, own, objective.start)
        with named(self._server.round, client):
            dataset = in_memory(self._data.client_dataset(client), self._data.collate_fn, self.read)
        for attack in [] if honest else attacks_by(self._transforms, client):
            dataset = attack.train_data(dataset)
        return ClientTask(
            client=client,
            objective=objective,
            dataset=dataset,
            weight=weight,
            buffers=self._buffers(client),
            perturbation=perturbation,
            lrs=lrs,
            loss_scale=self._server.loss_scale,
        )

    def reply(self, result: ClientResult) -> Reply:
        """The message of a client that has trained."""
        client, rows, beside = result.client, dict[str, State](), State()
        rows["algorithm"], message = self._algorithm.client_update(self._received, self._own(client), result)
        crossed = num_bytes(message)
        if self._transforms:
            rng = generator(self._seed, "transform", self._server.round, client)
            kept = self._store.get(client, "transforms") or {}
            with named(self._server.round, client):
                chain = chain_of(self._transforms, client)
                message, crossed, rows["transforms"] = send(chain, self._received, message, kept, rng)
        if self._perturbation is not None:
            own = self._own_perturbation(client)
            rows["perturbation"], beside = self._perturbation.client_update(own, result.perturbation, result.start)
        if self._policy == "local":
            rows["buffers"] = result.buffers
        return Reply(message, beside, rows, crossed + num_bytes(beside))

    def holds(self, result: ClientResult) -> bool:
        """Whether a client waits with its message until attackers know one another's (:meth:`meet`)."""
        if waits := bool(attacks_by(self._transforms, result.client)):
            self._held.append(result)
        return waits

    def meet(self, fabric: Fabric) -> list[ClientResult]:
        """Let the attackers of all processes know what they have trained; the results that waited in this one."""
        mine = dict[int, Tensor]()
        everyone: list[dict[int, Tensor]] = [{}] * fabric.world_size
        for result in self._held:
            _, message = self._algorithm.client_update(self._received, self._own(result.client), result)
            mine[result.client] = (message["params"] - self._received["params"]).cpu()
        if (attacks := attacks_by(self._transforms)) and fabric.world_size > 1:
            torch.distributed.all_gather_object(everyone, mine)
        updates = {client: update for part in (mine, *everyone) for client, update in part.items()}
        for attack in attacks:
            if trained := [updates[client] for client in sorted(updates.keys() & attack.attackers)]:
                attack.meet(torch.stack(trained).double())
        return self._held

    def check_transforms(self) -> None:
        """Refuse transforms that cannot handle what clients will send."""
        for attack in attacks_by(self._transforms):
            self.task(min(attack.attackers), None)
        if not self._transforms:
            return
        own = self._algorithm.init_client(self._params)
        start = self._algorithm.objective(self._received, own, 1.0).start
        optimizer = dict.fromkeys(self._algorithm.optimizer_state, torch.zeros_like(start))
        result = ClientResult(0, start, start, 1, 1.0, 1, 1.0, optimizer=optimizer)
        _, sent = self._algorithm.client_update(self._received, own, result)
        beside: State = {}
        if self._perturbation is not None:
            own |= self._perturbation.init_client(self._params)
            _, beside = self._perturbation.client_update(
                own, self._perturbation.begin(self._received, own, start), start
            )
        check_messages(self._transforms, type(self._algorithm).__name__, self._received, sent, beside)

    @property
    def _params(self) -> Tensor:
        return self._server.algorithm["params"]

    def _own(self, client: int) -> State:
        state = self._store.get(client, "algorithm")
        return self._algorithm.init_client(self._params) if state is None else state

    def _own_perturbation(self, client: int) -> State:
        assert self._perturbation is not None
        state = self._store.get(client, "perturbation")
        return self._perturbation.init_client(self._params) if state is None else state

    def _buffers(self, client: int) -> State:
        if self._policy == "reset":
            return self.initial_buffers
        if self._policy == "local":
            own = self._store.get(client, "buffers")
            return self.initial_buffers if own is None else {**self.initial_buffers, **own}
        return self._server.buffers
