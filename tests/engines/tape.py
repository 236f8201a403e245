"""A stand-in for CUDA graphs on the CPU: it replays tensor operations, not Python, into the memory of the recording."""

from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Anew:
    """Does what is recorded anew, on any device."""

    def __init__(self, device):
        self._random_state = torch.get_rng_state()

    def record(self, work, warm_up=None):
        self.anew(work)()
        return self.anew(work)

    def anew(self, work):
        return self._own_random_state()(work)

    def seed(self, seed):
        self._random_state = torch.Generator().manual_seed(seed).get_state()

    def ordered(self):
        return nullcontext()

    strict = ordered

    def begin(self):
        pass

    end = begin

    @contextmanager
    def _own_random_state(self):
        before = torch.get_rng_state()
        torch.set_rng_state(self._random_state)
        yield
        self._random_state = torch.get_rng_state()
        torch.set_rng_state(before)


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.operations:
            if func.is_view:
                continue  # it looks at the same memory as in the recording
            new = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(value)


class Tape(Anew):
    """As with a CUDA graph, Python numbers are frozen, and tensors are read and written where they were.

    Attributes:
        recordings: how many there were, over all slots.
        steps: operations replayed.
    """

    recordings = 0

    def record(self, work, warm_up=None):
        (warm_up or work)()
        with _Tape() as tape:
            work()
        Tape.recordings += 1

        def replay():
            before = torch.get_rng_state()
            torch.set_rng_state(self._random_state)
            tape.replay()
            self._random_state = torch.get_rng_state()
            torch.set_rng_state(before)

        return replay
