"""The sites of a federation as the server sees them: who lives where, who answered, who did not."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from fedlight.flower.messages import Parcel, Transport

_EVERY_S = 1.0


class Sites:
    """Finds the clients' nodes, asks them, and names those that do not answer.

    Args:
        transport: the way to the nodes.
        options: the run's: ``timeout`` of a round and ``wait`` for the sites in seconds, ``min-results``.

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
        self.homes: dict[int, int] = {}
        self.found: dict[int, dict[str, Any]] = {}
        self.missing: dict[int, str] = {}
        self.down_bytes = self.up_bytes = 0

    @property
    def _passed_on(self) -> dict[str, Any]:
        """What sites follow of the options as well."""
        options = {key: self._options[key] for key in ("rounds", "seed") if key in self._options}
        return {"options": options, "num_clients": int(self._options.get("clients") or 0)}

    def gather(self) -> None:
        """Wait until every client has a home.

        Raises:
            ConnectionError: if some have none in time.
            MisconfigurationException: if two nodes have the same client, or a node cannot take part.
        """
        wait, began, said = float(self._options.get("wait") or 600), time.monotonic(), False
        while not (self.look(strict=True) and len(self.homes) == (total := self._num_clients())):
            if not said:
                rank_zero_info("sites: waiting until all of them are there.")
                said = True
            if time.monotonic() - began > wait:
                absent = sorted(set(range(total)) - self.homes.keys()) if self.homes else "all"
                raise ConnectionError(
                    f"after {wait:g} s these clients have no node: {absent}. Start their SuperNodes with their"
                    " partition-ids, or raise `wait`."
                )
            time.sleep(min(_EVERY_S, wait / 10))

    def _num_clients(self) -> int:
        given = int(self._options.get("clients") or 0)
        return given or max((found["num_clients"] for found in self.found.values()), default=0)

    def look(self, strict: bool = False) -> bool:
        """Find out who has come and gone; False if nobody is there.

        Args:
            strict: whether it is an error that a client has two nodes, or a node an answer that is of no use.
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
        """Ask the nodes of some clients, and hand out each answer as it comes.

        Args:
            kind: what is asked for.
            clients: whose nodes are asked.
            info: figures for all of them.
            tensors: tensors for all of them.
            own: figures for the clients of one node.
        """
        self.look()
        self.missing = {client: "it has no node" for client in clients if client not in self.homes}
        jobs: dict[int, list[int]] = {}
        for client in clients:
            if client in self.homes:
                jobs.setdefault(self.homes[client], []).append(client)
        given = {**info, **self._passed_on}
        parcels = {n: Parcel(kind, {**given, "clients": some, **own(some)}, dict(tensors)) for n, some in jobs.items()}
        self.down_bytes += sum(parcel.num_bytes for parcel in parcels.values())
        for node, found in self._transport.exchange(parcels, self._timeout) if parcels else ():
            if isinstance(found, str) or found.kind != kind:
                why = found if isinstance(found, str) else str(found.info.get("why", found.kind))
                self.missing |= dict.fromkeys(jobs[node], why)
                continue
            self.up_bytes += found.num_bytes
            yield found

    def name_missing(self, round: int, asked: int = 0, required: bool = False) -> None:
        """Warn of clients that did not answer.

        Args:
            round: in which round.
            asked: how many were asked.
            required: whether ``min-results`` of them are needed.

        Raises:
            ConnectionError: if fewer answered than are needed.
        """
        reasons: dict[str, list[int]] = {}
        for client, why in sorted(self.missing.items()):
            reasons.setdefault(why, []).append(client)
        text = "; ".join(f"clients {clients}: {why}" for why, clients in reasons.items())
        least, there = int(self._options.get("min-results") or 1), asked - len(self.missing)
        if required and asked and there < least:
            raise ConnectionError(f"round {round}: {there} of {asked} answered, and min-results={least}. {text}")
        if reasons:
            rank_zero_warn(f"round {round}: goes on without {text}")
