"""What happens at the clients, before and after their local training."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from fedlight.data.arrays import in_memory
from fedlight.engines.base import ClientTask, named
from fedlight.local import ClientResult, LocalObjective
from fedlight.personal.base import OwnTraining
from fedlight.perturbations.base import State
from fedlight.seeding import generator
from fedlight.server.client_states import NOTHING, ClientStates
from fedlight.server.client_states import BufferPolicy as BufferPolicy
from fedlight.server.rows import from_all
from fedlight.server.state import num_bytes, tensors
from fedlight.transforms.attack import attacks_by, chain_of
from fedlight.transforms.base import Packed, check_messages, pack, unpack

Receive = Callable[[ClientResult], None]
Training = tuple[Receive, Iterator[ClientTask]]


@dataclass(frozen=True)
class Reply:
    """What a client answers in a round."""

    message: State  # what the algorithm sends, as the server receives it
    beside: State  # what the perturbation sends
    rows: dict[str, State]  # the client's own state after the round, by part; void if the server cannot use the message
    steps_apart: int  # that the client took for itself
    part: Tensor  # the client's personal entries, which do not cross, [P_own]
    packed: Packed  # the algorithm's message as it crosses

    @property
    def num_bytes(self) -> int:
        """The size of what crosses."""
        return num_bytes(self.packed.tensors) + num_bytes(self.beside)


class ClientSide(ClientStates):
    """Makes tasks of what clients receive, and messages of what they have trained."""

    def trainings(self, clients: Sequence[int], lrs: tuple[float, ...] | None, receive: Receive) -> Iterator[Training]:
        """What clients of this process do, one training after the other, each with what takes its results."""
        if self.personal.trains_apart:
            yield self._keep, (self._before(client, lrs) for client in clients)
            self._drop_unsound()
        yield receive, (self.task(client, lrs) for client in clients)

    def _before(self, client: int, lrs: tuple[float, ...] | None) -> ClientTask:
        own = self._apart[client] = self.personal.before(self._model(client), self.own(client))
        return self._task_apart(client, own, lrs, "personal ")

    def adapting(self, client: int, lrs: tuple[float, ...] | None) -> ClientTask | None:
        """What a client trains before it is evaluated, and forgets afterwards; None where that is nothing."""
        own = self.personal.adapt(self._model(client), self.own(client))
        if own is None or not self._size(client) or not (self.personal.adapts_all or client >= len(self._sizes)):
            return None
        return self._task_apart(client, own, lrs, "evaluation ")

    def adapted(self, result: ClientResult) -> State:
        """Model and buffers of a client that has done so."""
        return {"": self.personal.adapted(self._model(result.client), result), **result.buffers}

    def _task_apart(self, client: int, own: OwnTraining, lrs: tuple[float, ...] | None, stage: str) -> ClientTask:
        task, start = self.task(client, lrs), own.objective.start
        held = {} if self.buffer_policy == "reset" else self.personal.held(self.own(client))
        references = {k: start if k == "start" else v for k, v in task.objective.references.items()}
        return replace(
            task,
            objective=replace(own.objective, references=references),
            perturbation=self._begin_perturbation(client, own.objective),
            buffers=task.buffers | held,
            stage=stage,
            length=own.length,
        )

    def _keep(self, result: ClientResult) -> None:
        client = result.client
        moved = result.buffers if self._apart.pop(client).continued else {}
        own = self.personal.trained(self.own(client), result, self._model(client))
        self._trained[client] = own, moved, result.num_steps

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
        weight = float(self._size(client)) / self.mean_size
        kept = self._own(client)
        objective = self.algorithm.objective(self._received, kept, weight)
        if unknown := objective.optimizer.keys() - {*self.algorithm.optimizer_state}:
            name = type(self.algorithm).__name__
            raise MisconfigurationException(f"algorithm: {name}.optimizer_state must name {sorted(unknown)}.")
        objective = self.personal.objective(self.split.objective(objective, self._part(client)))
        if self.compared or objective.references:
            models = {"start": objective.start, **objective.references}
            objective = replace(objective, references={k: v for k, v in models.items() if k in self.compared})
        with named(self._server.round, client):
            dataset = in_memory(self.data.client_dataset(client), self.data.collate_fn, self.read)
        for attack in [] if honest else attacks_by(self.transforms, client):
            dataset = attack.train_data(dataset)
        return ClientTask(
            client=client,
            objective=objective,
            dataset=dataset,
            weight=weight,
            buffers=self._buffers(client),
            perturbation=self._begin_perturbation(client, objective),
            lrs=lrs,
            loss_scale=self._server.loss_scale,
        )

    def reply(self, result: ClientResult) -> Reply:
        """The message of a client that has trained."""
        client, rows, beside, whole = result.client, dict[str, State](), State(), result
        result = self.split.result(whole if self.losses is None else replace(whole, loss=self.losses[client]))
        own, message = self.algorithm.client_update(self._received, self._own(client), result)
        rows["algorithm"] = tensors(own, self.algorithm, "client_update")
        message = tensors(message, self.algorithm, "client_update", {"params": result.start})
        packed = Packed(message)
        if self.transforms:
            rng = generator(self.seed, "transform", self._server.round, client)
            kept = self.store.get(client, "transforms") or {}
            with named(self._server.round, client):
                chain = chain_of(self.transforms, client)
                packed, rows["transforms"] = pack(chain, self._received, message, kept, rng)
                message = unpack(chain, self._received, packed)
        if self.perturbation is not None:
            own = self._own_perturbation(client)
            rows["perturbation"], beside = self.perturbation.client_update(own, whole.perturbation, self._model(client))
            beside = self.split.restricted(beside)
        rows["buffers"] = {k: v for k, v in result.buffers.items() if self.is_local(k)}
        rows["personal"] = self.personal.client_update(self.own(client), whole)
        part = self.personal.part(rows["personal"], self.initial)
        steps = self._trained.get(client, NOTHING)[2]
        return Reply(message, beside, rows, steps, part, packed)

    def holds(self, result: ClientResult) -> bool:
        """Whether a client waits with its message until attackers know one another's (:meth:`meet`)."""
        if waits := any(attack.colludes for attack in attacks_by(self.transforms, result.client)):
            self._held.append(result)
        return waits

    def meet(self, fabric: Fabric) -> list[ClientResult]:
        """Let the attackers of all processes know what they have trained; the results that waited in this one."""
        mine = dict[int, Tensor]()
        for result in self._held:
            shared, own = self.split.result(result), self._own(result.client)
            _, message = self.algorithm.client_update(self._received, own, shared)
            mine[result.client] = (message["params"] - self._received["params"]).cpu()
        attacks = [attack for attack in attacks_by(self.transforms) if attack.colludes]
        everyone = from_all(mine, fabric.world_size) if attacks else []
        updates = {client: update for part in everyone for client, update in part.items()}
        for attack in attacks:
            if trained := [updates[client] for client in sorted(updates.keys() & attack.attackers)]:
                attack.meet(torch.stack(trained).double())
        return self._held

    def check(self) -> None:
        """Refuse an algorithm that cannot do with personal parts, and transforms with what clients will send."""
        name = type(self.algorithm).__name__
        if "step" in self.algorithm.optimizer_state and len(self.initial):
            raise MisconfigurationException(
                f"trainer.personal: {name} lets all optimizers begin with the same count of steps, and so with moments"
                " that it does not have for personal parts. Use another algorithm, or FedAvg with the same optimizer."
            )
        for attack in attacks_by(self.transforms):
            self.task(min(attack.attackers), None)
        if self.transforms:
            check_messages(self.transforms, name, self._received, *self.example_message())

    def example_message(self) -> tuple[State, State]:
        """What any client will send of algorithm and perturbation, but for the values."""
        params = self._server.algorithm["params"]
        own = self.algorithm.init_client(params)
        start = self.algorithm.objective(self._received, own, 1.0).start
        # All but the number of steps are vectors.
        optimizer = {k: start.new_zeros(() if k == "step" else len(start)) for k in self.algorithm.optimizer_state}
        result = ClientResult(0, 1, 1.0, 1, 1.0, start=start, params=start, optimizer=optimizer)
        _, sent = self.algorithm.client_update(self._received, own, result)
        if self.perturbation is None:
            return sent, {}
        whole = self.split.model(start, self.initial)
        begun = self._begin_perturbation(-1, LocalObjective(whole))
        beside = self.perturbation.client_update(self._own_perturbation(-1), begun, whole)[1]
        return sent, self.split.restricted(beside)
