"""The Hessian of a loss over data as a linear operator: products with vectors, never the matrix."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fedlight.analysis.memory import free_memory, graph_bytes
from fedlight.penalties.batches import batch_size

Block = tuple[int, ...]
"""Positions of parameters: the rows and columns of the Hessian that belong to them."""


class NonFiniteLossError(ArithmeticError):
    """The loss, or a derivative of it, is NaN or infinite: there is no curvature to measure."""


class NoSecondDerivativeError(RuntimeError):
    """The loss cannot be differentiated twice; the message names the layers."""


class HessianOperator:
    """∇²L for L(w) = Σ_b n_b·loss_b(w) / Σ_b n_b over batches b: the mean over all their samples.

    A product is a double backward pass (Pearlmutter, 1994): ∇²L·v = ∇(∇L·v). The graph of ∇L is built once per batch
    for any number of vectors, and it is kept from one product to the next for as many batches as fit into
    ``graph_memory``; what is left of a product then is the second backward pass alone.

    Args:
        loss: ``(batch, index) -> scalar``, the mean over the samples of the batch.
        parameters: w. Vectors have their order and data type, and are on their device.
        batches: the data, on the device of the parameters.
        sizes: samples of each batch; found in the batches by default.
        weights: n_b, what the loss of each batch divides by; by default its samples. Batches of weight 0 are left out.
        reduce: sums a tensor over processes, each of which has batches of its own; None for a single process.
        graph_memory: bytes that may hold graphs between products. By default a quarter of the memory that is free,
            and 0 keeps none.
        settings: a context to compute in.
        explain: turns an error of automatic differentiation, at the batch of an index, into one that helps.

    Attributes:
        size: P, the number of parameters.
        dtype: of parameters and vectors.
        device: of parameters and vectors.
        weight: Σ_b n_b.

    Raises:
        ValueError: if there are no parameters or no data, or the parameters differ in data type or device.
    """

    def __init__(
        self,
        loss: Callable[[Any, int], Tensor],
        parameters: Sequence[Tensor],
        batches: Sequence[Any],
        *,
        sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        graph_memory: int | None = None,
        settings: Callable[[], AbstractContextManager[Any]] = nullcontext,
        explain: Callable[[RuntimeError, Any, int], Exception] | None = None,
    ) -> None:
        if not parameters:
            raise ValueError("The Hessian needs at least one trainable parameter; the model has none.")
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) > 1:
            raise ValueError(f"The parameters must share one data type and device, found {sorted(map(str, kinds))}.")
        self._of(parameters)
        self.batches, self._loss = batches, loss
        self._reduce, self._settings, self._explain = reduce, settings, explain
        self._sizes = [batch_size(b) for b in batches] if sizes is None else list(sizes)
        self._graph_memory = graph_memory
        self._kept: dict[int, tuple[Tensor, list[Tensor | None]]] = {}
        self._keep_until: int | None = None
        self.samples = int(self._sum(torch.tensor(sum(self._sizes), device=self.device)))
        if self.samples == 0:
            raise ValueError("The Hessian is a mean over samples, but there is no data: give at least one batch.")
        weights = self._sizes if weights is None else weights
        total = float(self._sum(torch.tensor(float(sum(weights)), dtype=self.dtype, device=self.device)))
        if not (0 < total < math.inf and min(weights, default=0) >= 0):
            raise ValueError(f"What the loss of the batches divides by must be positive in sum, found {list(weights)}.")
        self._shares, self.weight = [weight / total for weight in weights], total
        self._used = [index for index, weight in enumerate(weights) if weight > 0]

    def _of(self, parameters: Sequence[Tensor]) -> None:
        self.parameters, self._everything = tuple(parameters), tuple(range(len(parameters)))
        self._lengths = [p.numel() for p in parameters]
        self.size, self.dtype, self.device = sum(self._lengths), parameters[0].dtype, parameters[0].device

    def flat(self) -> Tensor:
        """A copy of w as one vector ``[P]``."""
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def matvec(self, vector: Tensor) -> Tensor:
        """∇²L·v for a vector ``[P]``."""
        return self.products([(self._everything, vector)])[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """∇²L·V for the columns of ``[P, m]``; every batch's graph is built once for all of them."""
        return torch.stack(self.products([(self._everything, v) for v in vectors.T])).T

    def products(self, requests: Sequence[tuple[Block, Tensor]]) -> list[Tensor]:
        """Products with diagonal blocks of ∇²L: for each ``(block, v)``, the block's rows and columns times v.

        Args:
            requests: a block and a vector of as many entries as the block's parameters have.
        """
        with self._settings(), torch.enable_grad():
            results = [torch.zeros_like(vector) for _, vector in requests]
            for index in self._used:
                _, gradients = self._graph(index)
                last = None if index in self._kept else len(requests) - 1  # its pass may free the graph
                for number, ((block, vector), result) in enumerate(zip(requests, results, strict=True)):
                    self._add_product(index, gradients, block, vector, result, retain=number != last)
                del gradients
        return [self._sum(result) for result in results]

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """L(w) and ∇L(w) ``[P]``.

        Raises:
            NonFiniteLossError: if either is NaN or infinite.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with self._settings(), torch.enable_grad():
            gradient = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            for index in self._used:
                kept = self._kept.get(index)
                loss, parts = kept if kept is not None else self._differentiate(index, create_graph=False)
                total += loss.detach()
                for view, part in zip(gradient.split_with_sizes(self._lengths), parts, strict=True):
                    if part is not None:
                        view += part.detach().reshape(-1)
        value, gradient = float(self._sum(total)), self._sum(gradient)
        for what, found in (("The loss", value), ("The gradient's norm", float(gradient.norm()))):
            if not math.isfinite(found):
                raise NonFiniteLossError(f"{what} is {found}, so the Hessian is not defined at these parameters.")
        return value, gradient

    def loss_at(self, params: Tensor) -> float:
        """L at other parameters ``[P]``. The operator's own are as before when it returns, and NaN is no error."""
        before = [p.data for p in self.parameters]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        try:
            for p, value in zip(self.parameters, params.split_with_sizes(self._lengths), strict=True):
                p.data = value.view_as(p)
            with self._settings(), torch.enable_grad():  # some steps take gradients of their own
                for index in self._used:
                    total += self._loss(self.batches[index], index).detach() * self._shares[index]
        finally:
            for p, data in zip(self.parameters, before, strict=True):
                p.data = data
        return float(self._sum(total))

    def graph_bytes_per_sample(self) -> float:
        """What the graph of the first batch holds in memory, per sample."""
        with self._settings(), torch.enable_grad():
            first = self._used[0]
            return graph_bytes(lambda: self._differentiate(first, True), self.parameters) / self._sizes[first]

    def release(self) -> None:
        """Free the graphs that are kept between products."""
        self._kept.clear()

    def _sum(self, value: Tensor) -> Tensor:
        return value if self._reduce is None else self._reduce(value)

    def _graph(self, index: int) -> tuple[Tensor, list[Tensor | None]]:
        if index in self._kept:
            return self._kept[index]
        if self._keep_until is None:
            self._keep_until = self._batches_to_keep()
        graph = self._differentiate(index, create_graph=True)
        if index < self._keep_until:
            self._kept[index] = graph
        return graph

    def _batches_to_keep(self) -> int:
        budget = free_memory(self.device) // 4 if self._graph_memory is None else self._graph_memory
        if budget == 0:
            return 0
        needed = self.graph_bytes_per_sample()
        return sum(total <= budget for total in accumulate(size * needed for size in self._sizes))

    def _differentiate(self, index: int, create_graph: bool) -> tuple[Tensor, list[Tensor | None]]:
        """A batch's share of L and of ∇L."""
        loss = self._loss(self.batches[index], index) * self._shares[index]
        gradients: Sequence[Tensor | None] = ()
        if loss.requires_grad:
            settings = {"create_graph": create_graph, "allow_unused": True}
            gradients = self._derivatives(index, loss, self.parameters, **settings)
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                "The loss does not depend on any trainable parameter. A training_step that detaches its loss cannot be"
                " analysed."
            )
        return loss, list(gradients)

    def _add_product(
        self, index: int, gradients: list[Tensor | None], block: Block, vector: Tensor, result: Tensor, retain: bool
    ) -> None:
        lengths = [self._lengths[i] for i in block]
        outputs, directions = [], []
        for i, part in zip(block, vector.split_with_sizes(lengths), strict=True):
            gradient = gradients[i]
            if gradient is not None and gradient.requires_grad:  # otherwise it is constant, and its curvature zero
                outputs.append(gradient)
                directions.append(part.reshape(gradient.shape))
        if outputs:
            inputs, settings = [self.parameters[i] for i in block], {"retain_graph": retain, "materialize_grads": True}
            parts = self._derivatives(index, outputs, inputs, directions, **settings)
            torch._foreach_add_(list(result.split_with_sizes(lengths)), [part.reshape(-1) for part in parts])

    def _derivatives(self, index: int, *of: Any, **settings: Any) -> Any:
        try:
            return torch.autograd.grad(*of, **settings)
        except RuntimeError as error:
            if self._explain is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise self._explain(error, self.batches[index], index) from error


def check_products(values: Tensor) -> None:
    """Refuse what was made of products with the Hessian, if it is not finite."""
    if not bool(values.isfinite().all()):
        raise NonFiniteLossError("A product with the Hessian is NaN or infinite: there is no finite curvature here.")
