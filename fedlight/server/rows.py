"""Clients' rows on their way: between processes, and into a checkpoint and back."""

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from lightning.fabric import Fabric
from torch import distributed

from fedlight.server.clients import ClientStore, Row

Rows = Iterable[tuple[int, Row]]
T = TypeVar("T")
_BLOCK_BYTES = 2**24
_ENTRIES = "archive/rows/"  # torch wants all entries of its files below archive/


class ClientRows:
    """Keeps each client's row once among all processes: where the client trained last.

    Every process knows who keeps what without being told, as every process knows who trains where. A row whose client
    trains elsewhere goes there before the round, from one process to the other. Rows are never all in memory twice:
    they travel some megabytes at a time.
    """

    def __init__(self, store: ClientStore, num_clients: int, fabric: Fabric) -> None:
        self.store = store
        self._rank, self._world = fabric.global_rank, fabric.world_size
        self.owners = [client % self._world for client in range(num_clients)]  # who keeps each row, or would
        # Made by all processes at once, here. Rows are in main memory, for which those of GPUs may have no way; the
        # messages of threads that write checkpoints must not meet those of the rounds.
        self._group: Any = distributed.new_group(backend="gloo") if self._world > 1 else None
        self._background: Any = distributed.new_group(backend="gloo") if self._world > 1 else None

    def bring(self, shares: Sequence[list[int]]) -> list[int]:
        """Let the rows of those that train in each process be there, and return this one's; every process calls."""
        moves: dict[tuple[int, int], list[int]] = {}
        for rank, clients in enumerate(shares):
            for client in clients:
                if self.owners[client] != rank:
                    moves.setdefault((self.owners[client], rank), []).append(client)
                    self.owners[client] = rank
        for (source, target), clients in sorted(moves.items()):  # in one order everywhere, so that none waits for ever
            if source == self._rank:
                _send(((client, self.store.take(client)) for client in clients), target, self._group)
            elif target == self._rank:
                self.store.load_state_dict({"where": "memory", "rows": _receive(source, self._group)})
        return shares[self._rank]

    def state_dict(self) -> dict[str, Any]:
        """What this process keeps; :meth:`gathered` makes of it what belongs into a checkpoint."""
        return {**self.store.state_dict(), "alone": self._world > 1}

    def gathered(self, own: dict[str, Any]) -> dict[str, Any]:
        """What all processes keep, for the first one to write, of what :meth:`state_dict` was in each.

        The first process receives rows while it writes them; the others have to :meth:`hand_over` theirs meanwhile.
        """
        if own["where"] == "disk":
            return {"where": "disk", "ranks": from_all(own, self._world)}
        others = (_receive(rank, self._background) for rank in range(1, self._world))
        return {"where": "memory", "rows": chain(own["rows"], *others)}

    def hand_over(self, own: dict[str, Any]) -> None:
        """Send what was kept here when a checkpoint was made to the first process, which writes it."""
        if own["where"] == "memory":
            _send(own["rows"], 0, self._background)

    def load(self, saved: dict[str, Any]) -> None:
        """Take over the rows of a checkpoint, written by any number of processes; every process calls.

        Raises:
            ValueError: if they are not whole.
        """
        if saved.get("alone"):
            raise ValueError(
                "ckpt_path: it was written when one of several processes had failed, without what that one kept of the"
                " clients. Evaluate it, or continue from `last`."
            )
        if saved["where"] == "disk":
            for rank, files in enumerate(saved.get("ranks", [saved])):  # version 0.1: the first process had all
                keeper = rank % self._world
                for client in {int(i) for slots in files["slots"].values() for i in slots}:
                    self.owners[client] = keeper
                if keeper == self._rank:
                    self.store.load_state_dict(files, rank)
            return
        if self._rank == 0:
            for rank in range(1, self._world):
                _send(self._of(saved["rows"], rank), rank, self._group)
        rows = self._of(saved["rows"], 0) if self._rank == 0 else _receive(0, self._group)
        self.store.load_state_dict({"where": "memory", "rows": rows})

    def _of(self, rows: Rows, rank: int) -> Rows:
        return ((client, row) for client, row in rows if self.owners[client] == rank)

    def close(self) -> None:
        """Close the connections."""
        for group in (self._group, self._background):
            if group is not None:
                distributed.destroy_process_group(group)


def from_all(own: T, world: int) -> list[T]:
    """What each of so many processes has, in their order; every process calls."""
    everyone = [own] * world
    if world > 1:
        distributed.all_gather_object(everyone, own)
    return everyone


def _send(rows: Rows, target: int, group: Any) -> None:
    for block in _blocks(rows):
        distributed.send(torch.tensor([len(block)]), target, group)
        distributed.send(torch.frombuffer(block, dtype=torch.uint8), target, group)
    distributed.send(torch.tensor([0]), target, group)


def _receive(source: int, group: Any) -> Iterator[tuple[int, Row]]:
    size = torch.zeros(1, dtype=torch.int64)
    while True:
        distributed.recv(size, source, group)
        if not int(size):
            return
        block = torch.empty(int(size), dtype=torch.uint8)
        distributed.recv(block, source, group)
        yield from _unpacked(block.numpy().data)


def _blocks(rows: Rows) -> Iterator[memoryview]:
    """Rows serialised some megabytes at a time; those of a block have tensors of the same names and shapes."""
    waiting: list[tuple[int, Row]] = []
    kind, size = None, 0
    for client, row in rows:
        found = {part: {k: (v.dtype, v.shape) for k, v in state.items()} for part, state in row.items()}
        if waiting and (found != kind or size >= _BLOCK_BYTES):
            yield _packed(waiting)
            waiting, size = [], 0
        waiting.append((client, row))
        kind, size = found, size + sum(v.nbytes for state in row.values() for v in state.values())
    if waiting:
        yield _packed(waiting)


def _packed(rows: list[tuple[int, Row]]) -> memoryview:
    parts = {
        part: {name: torch.stack([row[part][name].cpu() for _, row in rows]) for name in state}
        for part, state in rows[0][1].items()
    }
    buffer = io.BytesIO()
    torch.save({"clients": [client for client, _ in rows], "parts": parts}, buffer)
    return buffer.getbuffer()


def _unpacked(block: bytes | memoryview) -> Iterator[tuple[int, Row]]:
    saved = torch.load(io.BytesIO(block), weights_only=True)
    for i, client in enumerate(saved["clients"]):
        yield client, {part: {name: v[i] for name, v in state.items()} for part, state in saved["parts"].items()}


def append_rows(file: IO[bytes], rows: Rows) -> None:
    """Write rows into a file of ``torch.save``, after what it holds, block by block."""
    count = 0
    with zipfile.ZipFile(file, "a") as entries:
        for count, block in enumerate(_blocks(rows), 1):
            entries.writestr(f"{_ENTRIES}{count}", block)
        entries.writestr(f"{_ENTRIES}count", str(count))


@dataclass(frozen=True)
class SavedRows:
    """The rows of a checkpoint, which are read each time that they are gone through."""

    path: Path

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        with zipfile.ZipFile(self.path) as entries:
            if f"{_ENTRIES}count" not in entries.namelist():
                raise ValueError(f"ckpt_path={str(self.path)!r} has lost its clients' rows. Take another checkpoint.")
            for number in range(1, int(entries.read(f"{_ENTRIES}count")) + 1):
                yield from _unpacked(entries.read(f"{_ENTRIES}{number}"))
