"""Images of clients side by side, when they lie channels last: clients become further channels, without a copy.

A convolution of K clients is run by ``vmap`` as one with K groups on ``[B, K·C, H, W]``, which is how images lie here.
Pooling would be run on ``[K·B, C, H, W]``, for which they would be copied back and forth. It treats every channel
alike, so here it sees the former as well.
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
