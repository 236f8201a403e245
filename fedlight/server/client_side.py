"""What happens at the clients, before and after their local training."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from fedlight.personal.base import OwnTraining, Personalization
from fedlight.personal.split import Split
from fedlight.perturbations.base import Perturbation, State
from fedlight.seeding import generator
from fedlight.server.clients import ClientStore
from fedlight.server.senders import Reply
from fedlight.server.state import ServerState, num_bytes
from fedlight.transforms.attack import attacks_by, chain_of
from fedlight.transforms.base import Transform, check_messages, send

Receive = Callable[[ClientResult], None]
Training = tuple[Receive, Iterator[ClientTask]]
BufferPolicy = Literal["average", "local", "reset"]
_NOTHING: tuple[State, State, int] = {}, {}, 0


class ClientSide:
    """Makes tasks of what clients receive, and messages of what they have trained.

    Args:
        algorithm: how clients are corrected; set up.
        perturbation: where gradients are taken, or None; set up.
        personal: what clients have for themselves; set up.
        split: which part of the model they share: all that the algorithm sees.
        datamodule: the clients' data.
        store: the clients' rows.
        buffer_policy: what happens to the module's buffers.
        transforms: what a message goes through before it is sent.
        seed: of the transforms' random draws.
        sizes: samples of every client, ``[N]``.

    Attributes:
        initial_buffers: the buffers before the first round.
        initial: the personal entries before the first round, ``[P_own]``.
        read: whether datasets are read into memory, for an engine that takes no others.
        compared: names of the models that penalties compare the clients' with.
        losses: of the models that clients start from in this round, if the algorithm needs them.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        perturbation: Perturbation | None,
        personal: Personalization,
        split: Split,
        datamodule: FederatedDataModule,
        store: ClientStore,
        buffer_policy: BufferPolicy,
        transforms: Sequence[Transform],
        seed: int,
        sizes: Tensor,
    ) -> None:
        self._algorithm, self._perturbation = algorithm, perturbation
        self._personal, self._split = personal, split
        self._data, self._store, self._policy = datamodule, store, buffer_policy
        self._transforms, self._seed = transforms, seed
        self._sizes = sizes.numpy()  # reads one entry in a fraction of the time
        self._mean_size = float(sizes.double().mean())
        self.initial_buffers: State = {}
        self.initial: Tensor
        self.read = False
        counts = datamodule.partition_counts()
        for attack in attacks_by(transforms):
            attack.setup(len(sizes), seed, None if counts is None else counts.shape[1])
        self.compared: Sequence[str] = ()
        self.losses: dict[int, float] | None = None

    def begin(self, server: ServerState) -> State:
        """Begin a round, or an evaluation: what every client receives of this server, besides its buffers."""
        beside = {} if self._perturbation is None else self._perturbation.broadcast(server.perturbation)
        self._server, self._received = server, {**self._algorithm.broadcast(server.algorithm), **beside}
        self._held: list[ClientResult] = []
        self._apart: dict[int, OwnTraining] = {}
        self._trained: dict[int, tuple[State, State, int]] = {}
        return self._received

    def trainings(self, clients: Sequence[int], lrs: tuple[float, ...] | None, receive: Receive) -> Iterator[Training]:
        """What clients do in this round, one training after the other, each with what takes its results.

        Args:
            clients: those of this process.
            lrs: learning rates of the round.
            receive: takes the results of the shared training.
        """
        if self._personal.trains_apart:
            yield self._keep, (self._before(client, lrs) for client in clients)
            self._drop_unsound()
        yield receive, (self.task(client, lrs) for client in clients)

    def _before(self, client: int, lrs: tuple[float, ...] | None) -> ClientTask:
        own = self._apart[client] = self._personal.before(self._model(client), self.own(client))
        return self._task_apart(client, own, lrs, "personal ")

    def adapting(self, client: int, lrs: tuple[float, ...] | None) -> ClientTask | None:
        """What a client trains before it is evaluated, and forgets afterwards; None where that is nothing."""
        own = self._personal.adapt(self._model(client), self.own(client))
        if own is None or not self._size(client) or not (self._personal.adapts_all or client >= len(self._sizes)):
            return None
        return self._task_apart(client, own, lrs, "evaluation ")

    def adapted(self, result: ClientResult) -> State:
        """Model and buffers of a client that has done so."""
        return {"": self._personal.adapted(self._model(result.client), result), **result.buffers}

    def personal_model(self, client: int, server: Tensor) -> State:
        """A client's own model, under the name "", and its buffers, where the server's model is this one ``[P]``."""
        own = self.own(client)
        model = self._personal.model(self._split.model(self._split.shared(server), self._part(client)), own)
        return {"": model, **self._buffers(client), **self._personal.held(own)}

    def _model(self, client: int) -> Tensor:
        """What a client has received, with its own entries, ``[P]``."""
        return self._split.model(self._received["params"], self._part(client))

    def _size(self, client: int) -> int:
        return int(self._sizes[client]) if client < len(self._sizes) else self._data.client_size(client)

    def _task_apart(self, client: int, own: OwnTraining, lrs: tuple[float, ...] | None, stage: str) -> ClientTask:
        task, start = self.task(client, lrs), own.objective.start
        references = {k: start if k == "start" else v for k, v in task.objective.references.items()}
        return replace(
            task,
            objective=replace(own.objective, references=references),
            perturbation=self._begin_perturbation(client, start),
            buffers=task.buffers if self._policy == "reset" else task.buffers | self._personal.held(self.own(client)),
            stage=stage,
            length=own.length,
        )

    def _keep(self, result: ClientResult) -> None:
        client = result.client
        moved = result.buffers if self._apart.pop(client).continued else {}
        self._trained[client] = self._personal.trained(self.own(client), result), moved, result.num_steps

    def _drop_unsound(self) -> None:
        """Let clients keep what they had where a model of their own is not finite; one look at all of them.

        What the shared training goes on from is looked at when that is over.
        """
        apart = {c: list(own.values()) for c, (own, moved, _) in self._trained.items() if own and not moved}
        sound = [torch.stack([value.isfinite().all() for value in values]).all() for values in apart.values()]
        for client, good in zip(apart, torch.stack(sound).tolist() if sound else (), strict=True):
            if not good:
                where = f"round {self._server.round + 1}, client {client}"
                warnings.warn(f"{where}: its own model is not finite, and it keeps the one before.", stacklevel=2)
                _, moved, steps = self._trained.pop(client)
                self._trained[client] = self.own(client), moved, steps

    def task(self, client: int, lrs: tuple[float, ...] | None, honest: bool = False) -> ClientTask:
        """What a client has to do in this round; ``honest`` if there were no attack."""
        weight = float(self._size(client)) / self._mean_size
        kept = self._own(client)
        objective = self._algorithm.objective(self._received, kept, weight)
        if unknown := objective.optimizer.keys() - {*self._algorithm.optimizer_state}:
            name = type(self._algorithm).__name__
            raise MisconfigurationException(f"algorithm: {name}.optimizer_state must name {sorted(unknown)}.")
        objective = self._personal.objective(self._split.objective(objective, self._part(client)))
        models = {"start": objective.start, **objective.references}
        objective = replace(objective, references={k: v for k, v in models.items() if k in self.compared})
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
            perturbation=self._begin_perturbation(client, objective.start),
            lrs=lrs,
            loss_scale=self._server.loss_scale,
        )

    def reply(self, result: ClientResult) -> Reply:
        """The message of a client that has trained."""
        client, rows, beside, whole = result.client, dict[str, State](), State(), result
        result = self._split.result(whole if self.losses is None else replace(whole, loss=self.losses[client]))
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
            rows["perturbation"], beside = self._perturbation.client_update(own, whole.perturbation, whole.start)
            beside = self._split.restricted(beside)
        rows["buffers"] = {k: v for k, v in result.buffers.items() if self.is_local(k)}
        rows["personal"] = self._personal.client_update(self.own(client), whole)
        part = self._personal.part(rows["personal"], self.initial)
        steps = self._trained.get(client, _NOTHING)[2]
        return Reply(message, beside, rows, crossed + num_bytes(beside), steps, part)

    def holds(self, result: ClientResult) -> bool:
        """Whether a client waits with its message until attackers know one another's (:meth:`meet`)."""
        if waits := any(attack.colludes for attack in attacks_by(self._transforms, result.client)):
            self._held.append(result)
        return waits

    def meet(self, fabric: Fabric) -> list[ClientResult]:
        """Let the attackers of all processes know what they have trained; the results that waited in this one."""
        mine = dict[int, Tensor]()
        everyone: list[dict[int, Tensor]] = [{}] * fabric.world_size
        for result in self._held:
            shared, own = self._split.result(result), self._own(result.client)
            _, message = self._algorithm.client_update(self._received, own, shared)
            mine[result.client] = (message["params"] - self._received["params"]).cpu()
        attacks = [attack for attack in attacks_by(self._transforms) if attack.colludes]
        if attacks and fabric.world_size > 1:
            torch.distributed.all_gather_object(everyone, mine)
        updates = {client: update for part in (mine, *everyone) for client, update in part.items()}
        for attack in attacks:
            if trained := [updates[client] for client in sorted(updates.keys() & attack.attackers)]:
                attack.meet(torch.stack(trained).double())
        return self._held

    def check(self) -> None:
        """Refuse an algorithm that cannot do with personal parts, and transforms with what clients will send."""
        name = type(self._algorithm).__name__
        if "step" in self._algorithm.optimizer_state and len(self.initial):
            raise MisconfigurationException(
                f"trainer.personal: {name} lets all optimizers begin with the same count of steps, and so with moments"
                " that it does not have for personal parts. Use another algorithm, or FedAvg with the same optimizer."
            )
        for attack in attacks_by(self._transforms):
            self.task(min(attack.attackers), None)
        if not self._transforms:
            return
        params = self._server.algorithm["params"]
        own = self._algorithm.init_client(params)
        start = self._algorithm.objective(self._received, own, 1.0).start
        optimizer = dict.fromkeys(self._algorithm.optimizer_state, torch.zeros_like(start))
        result = ClientResult(0, start, start, 1, 1.0, 1, 1.0, optimizer=optimizer)
        _, sent = self._algorithm.client_update(self._received, own, result)
        beside: State = {}
        if self._perturbation is not None:
            own |= self._perturbation.init_client(params)
            _, beside = self._perturbation.client_update(
                own, self._perturbation.begin(self._received, own, start), start
            )
        check_messages(self._transforms, name, self._received, sent, beside)

    @property
    def buffer_bytes(self) -> int:
        """What buffers add to a message in either direction."""
        if self._policy != "average":
            return 0
        return num_bytes({k: v for k, v in self._server.buffers.items() if not self.is_local(k)})

    def is_local(self, buffer: str) -> bool:
        """Whether a buffer stays with each client."""
        return self._policy == "local" or buffer in self._personal.buffers

    def own(self, client: int) -> State:
        """What a client has for itself."""
        if client in self._trained:
            return self._trained[client][0]
        state = self._store.get(client, "personal")
        return self._personal.init_client(self._first) if state is None else state

    @property
    def _first(self) -> Tensor:
        """The server's model with the personal entries that a client begins with, ``[P]``."""
        return self._split.model(self._server.algorithm["params"], self.initial)

    def _part(self, client: int) -> Tensor:
        return self._personal.part(self.own(client), self.initial)

    def _own(self, client: int) -> State:
        state = self._store.get(client, "algorithm")
        return self._algorithm.init_client(self._server.algorithm["params"]) if state is None else state

    def _own_perturbation(self, client: int) -> State:
        assert self._perturbation is not None
        state = self._store.get(client, "perturbation")
        return self._perturbation.init_client(self._first) if state is None else state

    def _begin_perturbation(self, client: int, start: Tensor) -> State:
        """Its state at the start of a training; it sees the whole model, and of the server's 0 at personal entries."""
        if self._perturbation is None:
            return {}
        received = {**self._split.padded(self._received), "params": self._model(client)}
        own = {**self._split.padded(self._own(client)), **self._own_perturbation(client)}
        return self._perturbation.begin(received, own, start)

    def _buffers(self, client: int) -> State:
        local = (self._store.get(client, "buffers") or {}) | self._trained.get(client, _NOTHING)[1]
        if self._policy == "average":
            initial = {k: v for k, v in self.initial_buffers.items() if self.is_local(k)}
            return {**self._server.buffers, **initial, **local}
        return {**self.initial_buffers, **local}
