"""Random numbers: every draw comes from a generator seeded by (seed, purpose, round, client)."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit seed that depends on every argument and on nothing else.

    Args:
        seed: the seed of the experiment.
        purpose: what the numbers are for, as ``"order"`` or ``"sampling"``.
        keys: whatever else tells one draw from another, as round and client.
    """
    text = "/".join([str(int(seed)), purpose, *(str(int(k)) for k in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`. The same arguments give the same numbers on every machine."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *keys))


def seed_global_rng(seed: int, devices: bool = True) -> None:
    """Seed the generators that user code may read: Python's, NumPy's legacy one and torch's, on every device or not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if not devices:
        return
    # torch.manual_seed would queue a call, with a stack trace, for every kind of device that is not in use.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def preserved_global_rng(devices: bool = True) -> Iterator[None]:
    """Restore Python's, NumPy's and torch's global generators on exit, those of devices or not."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Where CUDA is not in use this must not make a context on every GPU, nor ask the driver each time.
    in_use = devices and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_states = torch.cuda.get_rng_state_all() if in_use else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
