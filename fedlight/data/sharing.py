"""One copy of the data for all processes of a machine."""

import mmap
import os
import tempfile
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.serialization import set_default_mmap_options

from fedlight.data.arrays import ArrayDataset, in_memory
from fedlight.data.datamodule import FederatedDataModule


def share_among_processes(fabric: Fabric, data: FederatedDataModule) -> int:
    """Let the processes of each machine hold once what the datasets of a datamodule store in memory.

    The first process of a machine writes the tensors to a file in the folder for temporary files, and all of them map
    it into their memory in place of their own copy. The file has no name any more when this returns.

    Shared are the first client's, the validation and the test dataset, and so what else is a view of their storage,
    where they are in memory. Every process must call it, with data that are the same. Returned are the bytes.
    """
    if fabric.world_size == 1:
        return 0
    sets = data.client_dataset(0), data.val_dataset(), data.test_dataset()
    datasets = [in_memory(dataset, data.collate_fn) for dataset in sets]
    storages = list({id(d.storage): d.storage for d in datasets if isinstance(d, ArrayDataset)}.values())
    tensors = [tensor for storage in storages for tensor in storage.leaves]
    layout = [(str(t.dtype), tuple(t.shape)) for t in tensors]
    path = _write(tensors) if fabric.local_rank == 0 else None
    everyone: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(everyone, (fabric.node_rank, layout, path))
    files = {node: found for node, _, found in everyone if found is not None}
    possible = all(other == layout and node in files for node, other, _ in everyone)
    if possible:
        with set_default_mmap_options(mmap.MAP_SHARED):
            mapped = iter(torch.load(files[fabric.node_rank], mmap=True))
        for storage in storages:
            storage.replace([next(mapped) for _ in storage.leaves])
    torch.distributed.barrier()
    if path is not None:
        os.unlink(path)
    return sum(t.nbytes for t in tensors) if possible else 0


def _write(tensors: list[Tensor]) -> str | None:
    """The file; None where there is no room for it."""
    file = None
    try:
        with tempfile.NamedTemporaryFile(prefix="fedlight-data-", delete=False) as file:
            torch.save(tensors, file)
    except (OSError, RuntimeError):  # torch's own, where it cannot write on
        if file is not None:
            os.unlink(file.name)
        return None
    return file.name
