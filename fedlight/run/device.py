"""How a run uses its device: products of float32, in which order images lie, what becomes of blocks that are freed."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import Precision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3), of the GNU C library."""
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
"""Variables by which a user chooses them."""


def keep_freed_blocks(fabric: Fabric, cleanup: ExitStack) -> None:
    """On a CPU, let the process keep the blocks that are freed, until the end.

    Otherwise the C library gives large ones back to the system, which clears every page of the next one: up to a third
    of the time of local steps whose tensors have megabytes. No result changes; a process may hold a quarter more
    memory. Nothing happens where there is another library, or the user has chosen what it does.
    """
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" and fabric.device.type == "cpu" else None
    if not hasattr(library, "mallopt") or any(name in os.environ for name in _OWN):
        return

    def give_back() -> None:
        library.mallopt(_MMAP_MAX, 2**16)  # which is where it begins; thresholds where it would have moved them to
        library.mallopt(_MMAP_THRESHOLD, 2**25)
        library.mallopt(_TRIM_THRESHOLD, 2**26)
        library.malloc_trim(0)

    cleanup.callback(give_back)
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)


def feed_channels_last(precision: Precision) -> None:
    """Let ``convert_input`` of a run's own Fabric give images ``[B, C, H, W]`` whose channels are neighbours in memory.

    Shapes and values stay; convolutions then take kernels that need no copies in between, and give outputs of this
    format themselves. So it is in training and evaluation, in every engine.
    """
    convert = precision.convert_input
    vars(precision)["convert_input"] = lambda data: apply_to_collection(convert(data), Tensor, _channels_last)


def _channels_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 4 or not tensor.is_floating_point():
        return tensor
    out = tensor.contiguous(memory_format=torch.channels_last)
    # Images of one channel are in both formats; torch takes the one that their strides are written in.
    _, channels, height, width = out.shape
    return out.as_strided(out.shape, (channels * height * width, 1, channels * width, channels))


@contextmanager
def float32_products(precision: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Inside, products and convolutions of float32 are computed in float32; or GPUs round factors to 10 bits (tf32)."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    backends = torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends[: 3 if precision == "tf32" else None]:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
