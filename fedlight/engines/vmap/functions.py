"""Functions that clients side by side compute in another way: of images that lie channels last, and dropout.

A convolution of K clients is run by ``vmap`` as one with K groups on ``[B, K·C, H, W]``, which is how images lie here.
Pooling would be run on ``[K·B, C, H, W]``, for which they would be copied back and forth. It treats every channel
alike, so here it sees the former as well: clients become further channels, without a copy.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_POOLING = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.max_pool2d}
"""Functions of images ``[B, C, H, W]`` that do the same to each channel."""

Pool = Callable[[Tensor], Tensor]


def clients_as_channels(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors that ``vmap`` runs; images among them, ``[A, B, C, H, W]``, lie as ``[B, H, W, A, C]``."""

    def run(*tensors: Tensor) -> Any:
        with _PoolingByChannel():
            return function(*map(_clients_last, tensors))

    return run


def _clients_last(tensor: Tensor) -> Tensor:
    if tensor.dim() != 5 or not tensor.is_floating_point():
        return tensor
    return tensor.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)


class _PoolingByChannel(TorchFunctionMode):
    """Inside, ``vmap`` runs pooling of images with the clients as further channels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _POOLING:
            return func(*args, **kwargs)
        images, *others = args if args else (kwargs.pop("input"),)
        if images.dim() != 4:
            return func(images, *others, **kwargs)
        return _Pooling.apply(images, lambda x: func(x, *others, **kwargs))


class _Pooling(torch.autograd.Function):
    """``pool(images)``."""

    @staticmethod
    def forward(images: Tensor, pool: Pool) -> Tensor:
        return pool(images)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Pool], output: Tensor) -> None:
        images, ctx.pool = inputs
        ctx.save_for_backward(images)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Pullback.apply(*grads, *ctx.saved_tensors, ctx.pool), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], images: Tensor, pool: Pool) -> tuple[Tensor, int]:
        return _by_channel(pool, in_dims, images)


class _Pullback(torch.autograd.Function):
    """A gradient of the outputs, pulled back to the images: linear in it."""

    @staticmethod
    def forward(grad: Tensor, images: Tensor, pool: Pool) -> Tensor:
        return _pulled_back(pool, grad, images)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Pool], output: Tensor) -> None:
        _, images, ctx.pool = inputs
        ctx.save_for_backward(images)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return torch.func.jvp(ctx.pool, ctx.saved_tensors, grads)[1], None, None

    @staticmethod
    def vmap(info: Any, in_dims: Iterable[int | None], grad: Tensor, images: Tensor, pool: Pool) -> tuple[Tensor, int]:
        return _by_channel(lambda g, x: _pulled_back(pool, g, x), in_dims, grad, images)


def _pulled_back(pool: Pool, grad: Tensor, images: Tensor) -> Tensor:
    pulled: Tensor = torch.func.vjp(pool, images)[1](grad)[0]
    return pulled


def _by_channel(function: Callable[..., Tensor], in_dims: Iterable[int | None], *images: Tensor) -> tuple[Tensor, int]:
    """A function of images ``[B, C, H, W]`` of all clients: they lie as ``[B, A·C, H, W]``, and so does the result."""
    moved = [x if dim is None else x.movedim(dim, 1) for x, dim in zip(images, in_dims, strict=False)]
    clients = next(x.shape[1] for x in moved if x.dim() == 5)
    all_have = [x if x.dim() == 5 else x[:, None].expand(-1, clients, -1, -1, -1) for x in moved]
    out = function(*(x.flatten(1, 2) for x in all_have))
    return out.unflatten(1, (clients, -1)), 1  # type: ignore[no-untyped-call]


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
        if kwargs.get("generator") is not None:
            raise RuntimeError("randomness of a generator, which would give every client others")
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
