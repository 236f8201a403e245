"""How much memory there is, and how much of it a graph of automatic differentiation holds."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device; on a CPU within the limit of the control group, if there is one."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return 0  # unknown: assume the worst
    return min(_available(), _control_group())


def _available() -> int:
    try:
        text = Path("/proc/meminfo").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 0


def _control_group() -> int:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**62
    return 2**62 if limit == "max" else max(int(limit) - used, 0)


def graph_bytes(build: Callable[[], object], exclude: Sequence[Tensor]) -> int:
    """Bytes of the tensors that a graph saves for its backward passes, each storage once.

    Where it holds transforms of ``torch.func``, which let nobody look, a guess: eight times what exists anyway, as the
    parameters, and is left out. Tensors are saved without their history, so that the hooks leave no cycle behind.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            build()
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        return 8 * sum(t.nbytes for t in exclude)
    return sum(seen.values())
