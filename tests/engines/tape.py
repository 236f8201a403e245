"""A stand-in for CUDA graphs on the CPU: it replays tensor operations, not Python, into the memory of the recording."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlight.engines.cuda_graph.recorder import Recorder


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


class Tape(Recorder):
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
