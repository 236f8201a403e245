"""The server between two rounds: its state, its clients' state, and what a round does to them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from fedlight.algorithms.base import mean_update
from fedlight.local import ClientResult
from fedlight.perturbations.base import State
from fedlight.server.aggregators import Aggregator, in_place_of_sums
from fedlight.server.client_side import BufferPolicy as BufferPolicy
from fedlight.server.client_side import ClientSide
from fedlight.server.clients import reweighed
from fedlight.server.incoming import Entry, Incoming, Report, check_enough, round_costs, round_metrics
from fedlight.server.privacy import Privacy
from fedlight.server.rows import ClientRows
from fedlight.server.state import (
    BUFFERS,
    begun_by_enough,
    buffer_moves,
    like,
    moved,
    moved_buffers,
    num_bytes,
    summed_rounds,
    tensors,
)
from fedlight.server.state import ServerState as ServerState

View = Literal["server", "selected", "all", "swa"]
_PERTURBATION = "perturbation/"


class Federation:
    """Turns clients into tasks, and their results into the next server state.

    Every process holds the same federation: it computes the same from the same results. ``unmoved`` gives a parameter
    without a gradient as it was when the round began; ``swa`` is ``begin`` and ``every`` of view ``swa``.
    """

    privacy: Privacy | None = None  # bounds what is summed, and adds noise to it
    aggregator: Aggregator | None = None  # takes the place of the mean

    def __init__(
        self,
        clients: ClientSide,
        rows: ClientRows,
        views: Sequence[View],
        unmoved: Callable[[str], Tensor],
        swa: tuple[int, int],
    ) -> None:
        self.clients, self.rows, self.store, self.views = clients, rows, rows.store, views
        self.algorithm, self.perturbation, self.split = clients.algorithm, clients.perturbation, clients.split
        self.sizes, self.num_clients = clients.sizes, len(clients.sizes)
        self._unmoved, self._swa = unmoved, swa
        weights = [self.algorithm.mean_weight(n) for n in self.sizes.tolist()] if "all" in views else [1.0]
        self._total_weight = math.fsum(weights)
        self._shares = torch.tensor(weights, dtype=torch.float64) / self._total_weight
        self.state = ServerState()

    def initialise(self, params: Tensor, buffers: State) -> None:
        """Begin with a model: its flat parameters ``[P]`` and its buffers."""
        self.clients.initial_buffers = {k: v.detach().clone() for k, v in buffers.items()}
        self._infinite = [k for k, v in buffers.items() if v.is_floating_point() and bool(v.isinf().any())]
        self.split.to(params.device)
        self.clients.initial, shared = self.split.own(params), self.split.shared(params)
        first = {"params": shared}
        latest = {"params": params.double(), "initial": params, "shares": self._shares}
        self.state = ServerState(
            algorithm=like(tensors(self.algorithm.init_server(shared), self.algorithm, "init_server", first), first),
            perturbation={} if self.perturbation is None else self.perturbation.init_server(shared),
            personal={"initial": self.clients.initial, "mean": self.clients.initial},
            buffers=self.clients.initial_buffers,
            views={view: params for view in self.views if view != "swa"},
            latest_mean=latest if "all" in self.views else {},
        )
        self.begin()
        self.clients.check()

    @property
    def params(self) -> Tensor:
        """The server's model, ``[P]``, with the mean of the clients' personal entries."""
        return self.split.model(self.state.algorithm["params"], self.state.personal["mean"])

    def begin(self) -> None:
        """Begin a round: what the clients will receive."""
        self._received, self.incoming = self.clients.begin(self.state), Incoming(self.store.put_row)
        self._start = self._received["params"].double()

    def receive(self, result: ClientResult, waits: bool = True) -> None:
        """Let a client make its message of what it trained, and add that up, unless it ``waits`` for others."""
        if waits and self.clients.holds(result):
            return
        reply, algorithm = self.clients.reply(result), self.algorithm
        rows, private = reply.rows, self.privacy
        weight = 1.0 if private else algorithm.mean_weight(result.num_samples)
        update = reply.message["params"].to(torch.float64, copy=True).sub_(self._start)
        message, square = {**reply.message, "update": update}, torch.dot(update, update)
        bounded = {}
        if private:
            changed = [k for k, v in result.buffers.items() if not torch.equal(v, self._buffer(k))]
            bounded = private.bound(update, changed)
        if algorithm.keeps_updates:
            row = self.store.get(result.client, "last_update")
            message["last_update"] = torch.zeros_like(update) if row is None else row["params"].double()
            rows["last_update"] = {"params": update.to(self.state.algorithm["params"].dtype)}
        terms = tensors(algorithm.contribution(message, result), algorithm, "contribution") | bounded
        alone = not terms and self.aggregator is None
        terms["update"] = update.mul_(weight) if alone else weight * update  # another long vector costs page faults
        if self.perturbation is not None:
            beside = self.perturbation.contribution(reply.beside, result)
            terms |= {_PERTURBATION + k: v for k, v in beside.items()}
        if "all" in self.views:
            latest = self.split.model(reply.message["params"], reply.part)
            before = self.store.get(result.client, "latest") or {"params": self.state.latest_mean["initial"]}
            terms["latest"], rows["latest"] = weight * (latest.double() - before["params"]), {"params": latest}
        moves, counters = buffer_moves(result.buffers, self._buffer, self._infinite)
        moves |= {"personal": reply.part.double()} if len(reply.part) and not private else {}
        terms |= {k: weight * v for k, v in moves.items()}
        counts = result.num_samples, result.num_steps, reply.steps_apart, reply.num_bytes
        logged = result.loss_scale, result.metrics, result.reductions
        report = Report(result.client, True, weight, square, *counts, *logged)
        kept = {"params": reply.message["params"]} if algorithm.collects else None
        kept = kept if self.aggregator is None else {"update": update, **moves}
        self.incoming.add(Entry(report, terms, counters, rows, kept))

    def _buffer(self, name: str) -> Tensor:
        """What a buffer was when the round began; also of a parameter that has not moved without a gradient before."""
        return self.state.buffers[name] if name in self.state.buffers else self._unmoved(name)

    def keep_buffers(self, found: State) -> None:
        """Let the server have what an evaluation of its model has set in buffers, such as a threshold.

        Raises:
            MisconfigurationException: if one has another shape now.
        """
        for name, old in self.state.buffers.items():
            if name in found and not torch.equal(value := found[name], old):
                if value.shape != old.shape:
                    raise MisconfigurationException(
                        f"model: buffer {name!r} was {list(old.shape)} and is {list(value.shape)} after validation; the"
                        " server keeps its shape. Allocate the whole of it, or keep it as a plain attribute."
                    )
                self.state.buffers = {**self.state.buffers, name: value.detach().clone()}

    def late(self) -> list[str]:
        """What clients have moved in this round, and none before."""
        names = [name.removeprefix(BUFFERS) for name in self.incoming.sums.parts if name.startswith(BUFFERS)]
        return sorted({*names, *self.incoming.maxima} - self.state.buffers.keys())

    def exchange(self, fabric: Fabric, stop: int = 0) -> int:
        """Add up what all processes have received; the largest ``stop``, a request that any of them may raise."""
        for result in self.clients.meet(fabric):
            self.receive(result, waits=False)
        if self.privacy and fabric.global_rank == 0:  # once, and exact as all terms are
            self.incoming.flush()
            noise = self.privacy.draw(self.state.round, self.state.algorithm["params"])
            self.incoming.sums.add({name: values[None] for name, values in noise.items()})
        return self.incoming.finish(fabric, stop)

    def aggregate(self) -> dict[str, Tensor | float]:
        """Make the server's next state; what the clients logged, reduced over them, and the figures of the round.

        Raises:
            FloatingPointError: if no client's message could be used.
            MisconfigurationException: if fewer could than the algorithm needs.
        """
        incoming, old, beside = self.incoming, self.state, self.clients.buffer_bytes
        # Now it is known what clients have moved for the first time, and with it how large the messages were.
        if beside:
            incoming.reports = [replace(report, up_bytes=report.up_bytes + beside) for report in incoming.reports]
        used = [report for report in incoming.reports if report.used]
        incoming.name_left_out(old.round + 1)
        if not self.privacy:
            check_enough(len(used), self.algorithm, self.aggregator, f"round {old.round + 1} has {{}} that can be used")
        total = incoming.sums.totals()
        # With privacy what sums are divided by does not depend on who was there.
        sizes = 2 * (self.privacy.clients,) if self.privacy else (math.fsum(r.weight for r in used), len(used))
        total["weight"], total["clients"] = total["update"].new_tensor(sizes).unbind()
        metrics = round_metrics(incoming.reports, None if self.privacy else mean_update(total))
        kept = list(incoming.kept.values())
        if self.algorithm.collects:
            total["models"] = torch.stack([state["params"] for state in kept])
        if self.aggregator is not None:
            kept = list(begun_by_enough(kept, self.aggregator.tolerates(len(kept))))
            total |= in_place_of_sums(self.aggregator, kept, [report.weight for report in used])
        found = self.algorithm.aggregate(old.algorithm, total)
        algorithm = like(tensors(found, self.algorithm, "aggregate", old.algorithm, exact=True), old.algorithm)
        perturbation = old.perturbation
        if self.perturbation is not None:
            sums = {k.removeprefix(_PERTURBATION): v for k, v in total.items() if k.startswith(_PERTURBATION)}
            sums["clients"] = total["clients"]
            perturbation = like(self.perturbation.aggregate(old.perturbation, sums), old.perturbation)
        if self.privacy:
            metrics |= self.privacy.finish(old.round + 1, total)
        down = num_bytes(self._received) + beside
        passes = 1 if self.perturbation is None else self.perturbation.passes
        metrics |= round_costs(incoming.reports, down, passes)
        part = total["personal"] / total["weight"] if "personal" in total else old.personal["mean"]
        personal = old.personal | {"mean": part.to(old.algorithm["params"].dtype)}
        views, latest, swa = self._evaluated(algorithm, personal["mean"], total)
        self.state = ServerState(
            round=old.round + 1,
            global_step=old.global_step + sum(report.num_steps for report in used),
            algorithm=algorithm,
            perturbation=perturbation,
            buffers=like({**moved_buffers(old.buffers, total), **incoming.maxima}, old.buffers),
            views=views,
            latest_mean=latest,
            swa=swa,
            personal=personal,
            loss_scale=min((r.loss_scale for r in used if r.loss_scale is not None), default=old.loss_scale),
        )
        return metrics

    def _evaluated(self, algorithm: State, part: Tensor, total: State) -> tuple[State, State, State]:
        """The views of the next state, of which these are parts; the mean of all latest models, and swa's sum."""
        old, dtype, latest = self.state, part.dtype, State()
        found = self.algorithm.evaluated(algorithm, self._received, total)
        views = {view: self.split.model(params.to(dtype), part) for view, params in found.items()}
        if torch.equal(views["server"], views["selected"]):
            views["selected"] = views["server"]  # one vector, one evaluation
        if "all" in self.views:
            step = total.get("latest", 0.0) / self._total_weight
            latest = old.latest_mean | {"params": old.latest_mean["params"] + step}
            views["all"] = latest["params"].to(dtype)
        swa = summed_rounds(old.swa, views["server"], old.round + 1, *self._swa) if "swa" in self.views else {}
        views |= {"swa": (swa["sum"] / swa["count"]).to(dtype)} if swa else {}
        return {view: views[view] for view in self.views if view in views}, latest, swa

    @property
    def spent(self) -> bool:
        """Whether another round would exceed the privacy budget."""
        return bool(self.privacy and self.privacy.spent(self.state.round))

    def num_bytes(self) -> int:
        """Size of what a checkpoint holds at least."""
        parts = (part for part in vars(self.state).values() if isinstance(part, dict))
        return num_bytes({id(v): v for part in parts for v in part.values()})

    def state_dict(self) -> dict[str, Any]:
        """Server state and client rows, in plain tensors and Python values."""
        return {
            "server": {k: dict(v) if isinstance(v, dict) else v for k, v in vars(self.state).items()},
            "initial_buffers": dict(self.clients.initial_buffers),
            "clients": self.rows.state_dict(),
            **({"privacy": self.privacy.state_dict(self.state.round)} if self.privacy else {}),
        }

    def load_state_dict(self, saved: dict[str, Any], clients: bool = True, anew: bool = False) -> None:
        """Continue from :meth:`state_dict`, without the rows of ``clients`` in an evaluation.

        If ``anew``, rounds and steps count from there, and the rest stays as it has been initialised.

        Raises:
            MisconfigurationException: if the algorithm keeps something else.
        """
        if anew:
            self.state.round, self.state.global_step = saved["server"]["round"], saved["server"]["global_step"]
            return
        device = self.params.device
        expected = {k: v.shape for k, v in self.state.algorithm.items()}
        found = {k: v.shape for k, v in saved["server"]["algorithm"].items()}
        if clients and expected != found:
            raise MisconfigurationException(f"ckpt_path: the algorithm keeps {expected}, the checkpoint has {found}.")
        self.clients.initial_buffers = moved(saved["initial_buffers"], device)
        server: dict[str, Any] = {k: moved(v, device) if isinstance(v, dict) else v for k, v in saved["server"].items()}
        self.state = ServerState(**{"personal": self.state.personal, **server})
        self.clients.initial = self.state.personal["initial"]
        if clients:
            self.rows.load(saved["clients"])
            mean = self.state.latest_mean
            if mean and not ("shares" in mean and torch.equal(mean["shares"].cpu(), self._shares)):
                rank_zero_info("ckpt_path: its view `all` weighs clients otherwise than here, and is summed up anew.")
                self.state.latest_mean = mean = reweighed(mean, self._shares, self.store)
                self.state.views["all"] = mean["params"].to(self.params.dtype)
