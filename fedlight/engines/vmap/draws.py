"""Dropout for clients side by side: each client's masks come from its own seed, whoever trains beside it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""Constants of SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators"), as signed numbers."""

_BITS = 24
"""Bits of a uniform number, as in a float32's mantissa."""


class ClientDropout(TorchFunctionMode):
    """Inside, ``dropout`` draws its masks by counting from a seed, with tensor operations that work row by row.

    The numbers are those of SplitMix64, for the seed of the client in the round, of which each has its own under
    ``vmap``, the number of the step (both int64 without dimensions), and the calls of ``dropout`` within it.
    """

    def __init__(self, seed: Tensor, step: Tensor) -> None:
        super().__init__()
        self._seed, self._calls = _mixed(seed + step * _GOLDEN), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is torch.dropout:
            named = {"training" if key == "train" else key: value for key, value in kwargs.items() if key != "input"}
            return self._dropout(args[0] if args else kwargs["input"], *args[1:], **named)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        if not training or p == 0:
            return input
        self._calls += 1
        places = torch.arange(input.numel(), device=input.device)
        call = _mixed(self._seed + torch.full_like(places[:1], self._calls) * _GOLDEN)
        numbers = _mixed(call + places * _GOLDEN) & ((1 << _BITS) - 1)
        kept = (numbers >= round(p * 2**_BITS)).view(input.shape).to(input.dtype)
        scaled = kept * (1 / (1 - p) if p < 1 else 0.0)
        return input.mul_(scaled) if inplace else input * scaled


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finalizer of int64 numbers, which wrap."""
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
