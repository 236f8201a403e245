"""Checkpoints: plain tensors and Python values, written at once or not at all."""

import concurrent.futures
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fedlight.run.folder import atomic_file, writing
from fedlight.server.rows import SavedRows, append_rows

FORMAT = 2
"""Version of the checkpoint's layout; 1 had the clients' rows among the rest."""


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Serialise and write a checkpoint, its tensors on the CPU; the file appears whole or not at all.

    The rows of clients, an iterable at ``fedlight/clients/rows``, are written last and one after the other.

    Raises:
        OSError: if the disk is full or read-only; an older file of that name is then untouched.
    """
    fedlight = checkpoint.get("fedlight", {})
    clients = {**fedlight.get("clients", {})}
    if (rows := clients.pop("rows", None)) is not None:
        checkpoint = {**checkpoint, "fedlight": {**fedlight, "clients": clients}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(tree_map_only(torch.Tensor, torch.Tensor.cpu, checkpoint), file)
        if rows is not None:
            append_rows(file, rows)


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one after another, while training goes on.

    What it writes must not change any more: a snapshot's tensors do not.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._writes: list[Future[None]] = []
        self.seconds = 0.0  # that writes have taken since it was set to 0

    def submit(self, path: Path, *steps: Callable[[], object]) -> None:
        """Do what makes a checkpoint, step by step, when those before it are written."""
        self._pool = self._pool or ThreadPoolExecutor(1, "fedlight-checkpoints")
        self._writes.append(self._pool.submit(self._write, path, *steps))

    def _write(self, path: Path, *steps: Callable[[], object]) -> None:
        started = time.perf_counter()
        try:
            with writing(path.parent):
                for step in steps:
                    step()
        finally:
            self.seconds += time.perf_counter() - started

    @property
    def busy(self) -> bool:
        """Whether something is still to be written."""
        return any(not write.done() for write in self._writes)

    def failure(self, wait: bool = False) -> str | None:
        """Why a write failed that has ended since the last call, or None; ``wait`` for all to end."""
        if wait:
            concurrent.futures.wait(self._writes)
        ended = [write for write in self._writes if write.done()]
        self._writes = [write for write in self._writes if not write.done()]
        errors = [str(error) for write in ended if (error := write.exception()) is not None]
        return errors[0] if errors else None

    def close(self) -> None:
        """Wait until all is written."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True`` onto the CPU.

    Raises:
        MisconfigurationException: if the file is missing, torn or damaged, or was not written by fedlight.
    """
    given = f"ckpt_path={str(path)!r}"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise MisconfigurationException(f"{given} {what}. Give a file, 'last' or 'best'.")
    try:
        with zipfile.ZipFile(path) as parts:  # torch does not look at the checksums
            if (damaged := parts.testzip()) is not None:
                raise ValueError(f"{damaged} is damaged")
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise MisconfigurationException(
            f"{given} cannot be read ({type(error).__name__}): it is torn, damaged or no checkpoint."
            " Another checkpoint of the same run may be whole."
        ) from error
    if not isinstance(checkpoint, dict) or "fedlight" not in checkpoint:
        raise MisconfigurationException(f"{given} was not written by fedlight's trainer: it holds no federated state.")
    found, clients = checkpoint["fedlight"].get("format"), checkpoint["fedlight"].get("clients", {})
    if found not in (1, FORMAT):
        raise MisconfigurationException(f"{given} has format {found}, this version reads 1 and {FORMAT}.")
    if clients.get("where") == "memory":
        clients["rows"] = list(clients["rows"].items()) if found == 1 else SavedRows(path)
    return checkpoint


def check_state_dict(path: Path, saved: dict[str, Any], module: LightningModule) -> None:
    """Refuse the checkpoint of another model; buffers that are None as yet begin with what it has.

    Raises:
        MisconfigurationException: naming the first difference.
    """
    for prefix, owner in module.named_modules():
        for key in [key for key, buffer in owner._buffers.items() if buffer is None]:
            value = saved.get(f"{prefix}.{key}".removeprefix("."))
            owner._buffers[key] = None if value is None else value.to(module.device, copy=True)
    expected = module.state_dict()
    missing, surplus = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    if missing and not module.strict_loading:
        rank_zero_info(f"model.strict_loading=False: {', '.join(missing)} stay as they are, and are not in {path}.")
        missing = [name for name, parameter in module.named_parameters() if name in missing and parameter.requires_grad]
    both = {k: (here, saved[k]) for k, here in expected.items() if k in saved and isinstance(here, Tensor)}
    shapes = [k for k, (here, there) in both.items() if here.shape != there.shape]  # the rest is get_extra_state's
    details = [
        f"it {verb} {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for verb, names in (("lacks", missing), ("has", surplus))
        if names
    ]
    details += [f"{k!r} is {tuple(saved[k].shape)} there and {tuple(expected[k].shape)} here" for k in shapes[:1]]
    if details:
        raise MisconfigurationException(
            f"ckpt_path={str(path)!r} belongs to another model: {'; '.join(details)}. Use the `model` of that run."
        )
