"""What is kept for each client between rounds, in memory or in rows of files."""

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedlight.perturbations.base import State
from fedlight.run.folder import writing
from fedlight.server.state import num_bytes

Row = dict[str, State]
Where = Literal["auto", "device", "cpu", "disk"]


class ClientStore:
    """Rows of state for those clients that have trained: nothing is kept for the others.

    States are handed out on a device. They are kept there, on the CPU, or (``auto``) there up to ``limit_bytes``.
    """

    def __init__(self, device: torch.device | str = "cpu", where: Where = "auto", limit_bytes: float = 8e9) -> None:
        self.device = torch.device(device)
        self._where, self._limit, self._bytes = where, limit_bytes, 0
        self._rows: dict[int, Row] = {}

    def get(self, client: int, part: str) -> State | None:
        """The state of one part (``algorithm``, ``perturbation``, ``buffers``, ``latest``), or None if never put."""
        state = self._rows.get(client, {}).get(part)
        return None if state is None else {k: v.to(self.device) for k, v in state.items()}

    def put(self, client: int, part: str, state: State) -> None:
        """Replace a client's state of one part; an empty state takes no room."""
        if not state:
            return
        row = self._rows.get(client, {})  # replaced and never changed, as snapshots may hold it
        target = self._place(row.get(part, {}), state)
        # Copies: rows then lie side by side, and not each among what its client's round lets go of.
        self._rows[client] = {**row, part: {k: v.detach().to(target, copy=True) for k, v in state.items()}}

    def put_row(self, client: int, row: Row) -> None:
        """Replace a client's states of several parts."""
        for part, state in row.items():
            self.put(client, part, state)

    def take(self, client: int) -> Row:
        """A client's states by part, which are not kept here any more."""
        row = self._rows.pop(client, {})
        self._bytes -= sum(map(self._device_bytes, row.values()))
        return row

    def _place(self, old: State, new: State) -> torch.device:
        if self._where != "auto" or self.device.type == "cpu":
            return self.device if self._where == "device" else torch.device("cpu")
        self._bytes -= self._device_bytes(old)
        if self._bytes + num_bytes(new) > self._limit:
            return torch.device("cpu")
        self._bytes += num_bytes(new)
        return self.device

    def _device_bytes(self, state: State) -> int:
        return num_bytes({k: v for k, v in state.items() if v.device.type == self.device.type})

    def clients(self) -> list[int]:
        """Clients that have state, in order."""
        return sorted(self._rows)

    def state_dict(self) -> dict[str, Any]:
        """All rows, with the tensors themselves: a row is replaced, never overwritten."""
        return {"where": "memory", "rows": sorted(self._rows.items(), key=itemgetter(0))}

    def load_state_dict(self, state: dict[str, Any], rank: int = 0) -> None:
        """Take over the rows of a :meth:`state_dict`, which was that of the process ``rank``.

        Raises:
            ValueError: if the rows are on disk.
        """
        if state["where"] != "memory":
            raise ValueError("ckpt_path: its clients' state is on disk. Continue with trainer.client_state=disk.")
        for client, row in state["rows"]:
            self.put_row(client, row)

    def committed(self) -> None:
        """A checkpoint that refers to the present rows is safely on disk."""


@dataclass
class _Files:
    """Rows of one part with tensors of the same names and shapes."""

    shapes: dict[str, tuple[str, list[int]]]  # data type and shape of each tensor
    slots: dict[int, int] = field(default_factory=dict)  # where each client's row is
    sums: dict[int, int] = field(default_factory=dict)  # its checksum
    free: list[int] = field(default_factory=list)
    retired: list[int] = field(default_factory=list)  # free once the next checkpoint is on disk

    def retire(self, client: int) -> None:
        self.retired.append(self.slots.pop(client))
        del self.sums[client]


class DiskClientStore(ClientStore):
    """Rows in files: memory holds only what is being read.

    Files are read and written, not mapped into memory: a disk that is full or gone is then an error and no signal.

    A row is never overwritten while a checkpoint may refer to it: a put goes to a free slot, and the slot that it
    replaces is free again once the next checkpoint is on disk. So a run that is killed at any time resumes from its
    last checkpoint. A checkpoint holds the checksum of each row, by which rows are refused that have been overwritten
    since, or damaged. The files' folder is part of the run's checkpoint.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(device, "cpu")
        self._folder = folder
        # By part, and a number for those with other tensors, of buffers that came late: "buffers", "buffers#1".
        self._files: dict[str, _Files] = {}

    def get(self, client: int, part: str) -> State | None:
        """Read a client's rows of one part."""
        for name, files in self._of(part).items():
            if client in files.slots:
                return {key: value.to(self.device) for key, value in self._read(name, files.slots[client]).items()}
        return None

    def _of(self, part: str) -> dict[str, _Files]:
        return {name: files for name, files in self._files.items() if name.partition("#")[0] == part}

    def put(self, client: int, part: str, state: State) -> None:
        """Write a client's rows of one part to a free slot."""
        if not state:
            return
        before = self._of(part)
        fitting = [name for name, files in before.items() if files.shapes.keys() == state.keys()]
        for files in (files for name, files in before.items() if name not in fitting and client in files.slots):
            files.retire(client)
        part = fitting[0] if fitting else f"{part}#{len(before)}" if before else part
        # Later on the files are there, or their rows are lost: a new file would read as zeros for the other clients.
        mode = "r+b" if fitting else "wb"
        shapes = {k: (str(v.dtype).split(".")[1], list(v.shape)) for k, v in state.items()}
        files = self._files.setdefault(part, _Files(shapes))
        slot = files.free.pop() if files.free else len(files.slots) + len(files.retired)
        if client in files.slots:
            files.retire(client)
        files.slots[client] = slot
        rows = {name: tensor_bytes(state[name]) for name in files.shapes}
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, row in rows.items():
                with self._file(part, name).open(mode) as file:
                    file.seek(slot * len(row))
                    file.write(row.data)
        files.sums[client] = _checksum(client, rows.values())

    def take(self, client: int) -> Row:
        """A client's states by part; their slots are free once the next checkpoint is on disk."""
        row: Row = {}
        for name, files in self._files.items():
            if client in files.slots:
                row[name.partition("#")[0]] = self._read(name, files.slots[client])
                files.retire(client)
        return row

    def clients(self) -> list[int]:
        """Clients that have state, in order."""
        return sorted({client for files in self._files.values() for client in files.slots})

    def _file(self, part: str, name: str) -> Path:
        return self._folder / f"{part}.{name.replace('/', '%2F')}.bin"  # transforms keep `params/0/error`

    def _read(self, part: str, slot: int) -> State:
        shapes = self._files[part].shapes
        state = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in shapes.items()}
        with writing(self._folder):
            for name, value in state.items():
                with self._file(part, name).open("rb") as file:
                    file.seek(slot * value.nbytes)
                    if file.readinto(tensor_bytes(value)) < value.nbytes:
                        raise OSError(f"{file.name} has lost its end")
        return state

    def state_dict(self) -> dict[str, Any]:
        """Which slot holds which client; the rows themselves stay in the files, which are synced."""
        with writing(self._folder):
            for path in (self._file(part, name) for part, files in self._files.items() for name in files.shapes):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        every = self._files.items()
        return {
            "where": "disk",
            "slots": {part: dict(sorted(files.slots.items())) for part, files in every},
            "checksums": {part: dict(sorted(files.sums.items())) for part, files in every},
            "free": {part: sorted([*files.free, *files.retired]) for part, files in every},
            "shapes": {part: {n: [d, list(s)] for n, (d, s) in files.shapes.items()} for part, files in every},
        }

    def load_state_dict(self, state: dict[str, Any], rank: int | None = None) -> None:
        """Take over the rows of a :meth:`state_dict`; those that the checkpoint holds itself are written to disk.

        Files are in the folder of the process ``rank``, by default this store's own; rows of another one are copied.

        Raises:
            ValueError: if rows are missing, damaged, or have been overwritten since.
        """
        if state["where"] == "memory":
            return super().load_state_dict(state)
        folder = self._folder if rank is None else self._folder.with_name(f"rank{rank}")
        if folder != self._folder:
            other = DiskClientStore(folder)
            other.load_state_dict(state)
            for client in other.clients():
                self.put_row(client, other.take(client))
            return None
        self._files = {}
        for part, shapes in state["shapes"].items():
            slots, sums = ({int(i): int(n) for i, n in state[key][part].items()} for key in ("slots", "checksums"))
            kinds = {name: (dtype, list(shape)) for name, (dtype, shape) in shapes.items()}
            self._files[part] = _Files(kinds, slots, sums, [int(slot) for slot in state["free"][part]])
            self._verify(part)
        return None

    def _verify(self, part: str) -> None:
        files = self._files[part]
        rows = ((i, map(tensor_bytes, self._read(part, slot).values())) for i, slot in files.slots.items())
        if changed := [i for i, row in rows if _checksum(i, row) != files.sums[i]]:
            raise ValueError(
                f"ckpt_path: the state of clients {changed[:5]} on disk is not what this checkpoint was written with:"
                " it has been overwritten as the run went on, or the files are damaged. Continue from `last`."
            )

    def committed(self) -> None:
        """Slots that only older checkpoints refer to are free again."""
        for files in self._files.values():
            files.free += files.retired
            files.retired = []


def tensor_bytes(value: Tensor) -> Any:
    """A tensor's bytes, as an array that shares its memory where it is contiguous and in main memory."""
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _checksum(client: int, rows: Iterable[Any]) -> int:
    for row in rows:
        client = zlib.crc32(row.data, client)
    return client


def client_store(where: Where, folder: Path, device: torch.device) -> ClientStore:
    """The store for ``trainer.client_state``; on a GPU ``auto`` uses up to a third of the free device memory."""
    if where == "disk":
        return DiskClientStore(folder, device)
    limit = torch.cuda.mem_get_info(device)[0] / 3 if device.type == "cuda" else float("inf")
    return ClientStore(device, where, limit)


def reweighed(mean: State, shares: Tensor, store: ClientStore) -> State:
    """The mean of the clients' latest models with other ``shares`` ``[N]``: summed up anew from their rows."""
    first = mean["initial"]
    moved = torch.zeros_like(first, dtype=torch.float64)
    for client in store.clients():
        if (row := store.get(client, "latest")) is not None:
            moved += float(shares[client]) * (row["params"].double() - first)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(moved)  # every process has the rows of some
    return {"params": first.double() + moved, "initial": first, "shares": shares}
