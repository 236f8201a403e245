"""The sites of a federation as the server sees them: who lives where and answered, and clients by what they send."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from fedlight.flower.messages import Parcel, Transport, part
from fedlight.local import ClientResult
from fedlight.perturbations.base import State
from fedlight.server.client_side import ClientSide, Receive, Reply
from fedlight.server.state import moved
from fedlight.transforms.attack import chain_of
from fedlight.transforms.base import Packed, unpack

_EVERY_S = 1.0
_PART = "site"


class Sites:
    """Finds the clients' nodes, asks them, and names those that do not answer.

    Of the run's ``options`` it follows ``timeout`` of a round and ``wait`` for the sites, in seconds, ``min-results``.

    Attributes:
        homes: the node of each client.
        found: what each client's node said of itself.
        missing: why clients did not answer what was asked last, by client.
        down_bytes, up_bytes: what crossed since the round began.
    """

    def __init__(self, transport: Transport, options: Mapping[str, Any]) -> None:
        self._transport, self._options = transport, options
        self._timeout = float(options.get("timeout") or 3600)
        self._known: dict[int, list[int]] = {}
        followed = {key: options[key] for key in ("rounds", "seed") if key in options}  # by the sites as well
        self._passed_on: dict[str, Any] = {"options": followed, "num_clients": int(options.get("clients") or 0)}
        self.homes: dict[int, int] = {}
        self.found: dict[int, dict[str, Any]] = {}
        self.missing: dict[int, str] = {}
        self.down_bytes = self.up_bytes = 0

    def gather(self) -> None:
        """Wait until every client has a home; an error if some have none in time, or two."""
        wait, began, said = float(self._options.get("wait") or 600), time.monotonic(), False
        given = self._passed_on["num_clients"]
        while True:
            complete = self.look(strict=True)
            total = given or max((found["num_clients"] for found in self.found.values()), default=0)
            if complete and len(self.homes) == total:
                return
            if not said:
                rank_zero_info("sites: waiting until all of them are there.")
                said = True
            if time.monotonic() - began > wait:
                absent = sorted(set(range(total)) - self.homes.keys()) if self.homes else "all"
                way_out = "Start their SuperNodes with their partition-ids, or raise `wait`."
                raise ConnectionError(f"after {wait:g} s these clients have no node: {absent}. {way_out}")
            time.sleep(min(_EVERY_S, wait / 10))

    def look(self, strict: bool = False) -> bool:
        """Find out who has come and gone; False if nobody is there.

        With ``strict`` it is an error that a client has two nodes, or a node an answer that is of no use.
        """
        present = set(self._transport.nodes())
        for node in self._known.keys() - present:
            for client in self._known.pop(node):
                if self.homes.get(client) == node:
                    del self.homes[client]
        new = sorted(present - self._known.keys())
        query = Parcel("query", self._passed_on)
        for node, found in self._transport.exchange(dict.fromkeys(new, query), self._timeout) if new else ():
            if isinstance(found, str) or found.kind == "refused":
                why = found if isinstance(found, str) else found.info["why"]
                if strict and not isinstance(found, str):
                    raise MisconfigurationException(f"node {node} cannot take part: {why}")
                rank_zero_warn(f"node {node} does not take part: {why}")
                continue
            clients = [int(client) for client in found.info["sizes"]]
            for client in clients:
                if strict and client in self.homes:
                    both = self.found[client].get("host"), found.info.get("host")
                    raise MisconfigurationException(
                        f"client {client} has two nodes, {self.homes[client]} and {node} (on {both[0]} and {both[1]})."
                        " Give every node partition-ids of its own; after a restart wait until the old one is gone."
                    )
                self.homes[client], self.found[client] = node, found.info
            self._known[node] = clients
        return bool(self.homes)

    def ask(
        self,
        kind: str,
        clients: Sequence[int],
        info: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        own: Callable[[list[int]], dict[str, Any]] = lambda clients: {},
    ) -> Iterator[Parcel]:
        """Ask the nodes of some clients, and hand out each answer as it comes; ``own`` gives a node's own figures."""
        self.look()
        self.missing = {client: "it has no node" for client in clients if client not in self.homes}
        jobs: dict[int, list[int]] = {}
        for client in (client for client in clients if client in self.homes):
            jobs.setdefault(self.homes[client], []).append(client)
        given = {**info, **self._passed_on}
        parcels = {n: Parcel(kind, {**given, "clients": some, **own(some)}, dict(tensors)) for n, some in jobs.items()}
        self.down_bytes += sum(parcel.num_bytes for parcel in parcels.values())
        for node, found in self._transport.exchange(parcels, self._timeout) if parcels else ():
            if isinstance(found, str) or (why := _why_not(found, kind, jobs[node])):
                self.missing |= dict.fromkeys(jobs[node], found if isinstance(found, str) else why)
                continue
            self.up_bytes += found.num_bytes
            yield found

    def name_missing(self, round: int, asked: int = 0, required: bool = False) -> None:
        """Warn of clients that did not answer; an error if ``min-results`` of so many are ``required``, and did not."""
        reasons: dict[str, list[int]] = {}
        for client, why in sorted(self.missing.items()):
            reasons.setdefault(why, []).append(client)
        text = "; ".join(f"clients {clients}: {why}" for why, clients in reasons.items())
        least, there = int(self._options.get("min-results") or 1), asked - len(self.missing)
        if required and asked and there < least:
            raise ConnectionError(f"round {round}: {there} of {asked} answered, and min-results={least}. {text}")
        if reasons:
            rank_zero_warn(f"round {round}: goes on without {text}")


@dataclass(frozen=True, kw_only=True)
class SiteResult(ClientResult):
    """A client's result, of which the server has no more than what was sent."""

    reply: Reply


class RemoteClients(ClientSide):
    """Clients that live at sites: they make their messages themselves."""

    shows_parts = False

    def trainings(self, clients: Sequence[int], lrs: Any, receive: Receive) -> Iterator[Any]:
        """One training: what its sites do for it is theirs."""
        yield receive, iter(clients)

    def reply(self, result: ClientResult) -> Reply:
        """What was sent."""
        assert isinstance(result, SiteResult)
        return result.reply

    def check(self) -> None:
        """Refuse what the chain of transforms cannot take, and know what clients will send."""
        super().check()
        self.expected = self.example_message()

    def round_of(self, client: int) -> int:
        """The last round in which a client's message was used, -1 for none; its state after that counts."""
        row = self.store.get(client, _PART)
        return -1 if row is None else int(row["round"])

    def model(self, view: str) -> dict[str, Tensor]:
        """What a site receives that looks at a model, and trains nothing."""
        params, model = self._server.algorithm["params"], self._server.views[view]
        other = {} if torch.equal(params, model) else {"model": model}
        return part("received", {"params": params}) | part("server", other) | part("buffers", self._server.buffers)

    def tensors(self) -> dict[str, Tensor]:
        """What every site receives that trains."""
        server = {"params": self._server.algorithm["params"]}
        if torch.equal(server["params"], self._received["params"]):
            server = {}
        buffers = {k: v for k, v in self._server.buffers.items() if self.sends_buffers and not self.is_local(k)}
        return part("received", self._received) | part("server", server) | part("buffers", buffers)

    def result(self, client: int, figures: Mapping[str, Any], parcel: Parcel, device: torch.device) -> SiteResult:
        """What a site has sent of a client; an error if it is not what this server expects."""
        n = int(self._sizes[client])
        tensors = {name: moved(parcel.part(f"{client}/{name}"), device) for name in ("message", "beside", "buffers")}
        packed = Packed(tensors["message"], dict(figures["lengths"]))
        message = unpack(chain_of(self.transforms, client), self._received, packed)
        for found, expected in zip((message, tensors["beside"]), self.expected, strict=True):
            _check_alike(found, expected)
        known = self._server.buffers
        _check_alike({k: v for k, v in tensors["buffers"].items() if k in known}, known, some=True)
        numbers = figures["num_steps"], figures["steps_apart"], figures["lr_sum"]
        if figures["num_samples"] != n or not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise ValueError(f"it counts {figures['num_samples']} samples, and steps {numbers}; {n} samples are known")
        reply = Reply(
            message=message,
            beside=tensors["beside"],
            rows={_PART: {"round": torch.tensor(self._server.round)}},
            steps_apart=int(figures["steps_apart"]),
            part=self.initial,
            packed=packed,
        )
        return SiteResult(
            client=client,
            start=self._received["params"],
            params=message["params"],
            num_samples=n,
            weight=n / self.mean_size,
            num_steps=int(figures["num_steps"]),
            lr_sum=float(figures["lr_sum"]),
            buffers=tensors["buffers"],
            metrics={name: (float(v), float(w)) for name, (v, w) in figures["metrics"].items()},  # type: ignore[misc]
            reductions=dict(figures["reductions"]),
            loss_scale=figures["loss_scale"],
            reply=reply,
        )


def _why_not(found: Parcel, kind: str, clients: Sequence[int]) -> str:
    """Why an answer for these clients is of no use; nothing where it is."""
    if found.kind != kind:
        return str(found.info.get("why", found.kind))
    named, asked = {*map(str, found.info.get("clients", ()))}, {*map(str, clients)}
    fits = named <= asked if kind == "evaluate" else named == asked  # validation may log nothing of some
    return "" if fits else f"it answers for clients {sorted(named)}, and not {sorted(asked)}"


def _check_alike(found: State, expected: State, some: bool = False) -> None:
    if found.keys() != expected.keys() and not some:
        raise ValueError(f"it has {sorted(found)}, and not {sorted(expected)}")
    for name, value in found.items():
        if (value.shape, value.dtype) != (expected[name].shape, expected[name].dtype):
            here = f"{expected[name].dtype} {list(expected[name].shape)}"
            raise ValueError(f"its {name} is {value.dtype} {list(value.shape)}, and not {here}")
