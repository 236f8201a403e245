"""Trace and spectral density of a symmetric operator from products with random vectors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlight.analysis.operators import HessianOperator, check_products

_CHUNK = 8  # random vectors that share one pass over the data
_GRID = 1024  # points of a smoothed density


@dataclass(frozen=True)
class TraceEstimate:
    """A trace, and how far to trust it.

    Attributes:
        value: the estimate.
        error: its standard error.
        probes: how many random vectors it is the mean of.
    """

    value: float
    error: float
    probes: int


@dataclass(frozen=True)
class Density:
    """The density of an operator's eigenvalues: how they are distributed over the real line.

    Attributes:
        nodes: quadrature nodes ``[n, m]`` of n random vectors, float64 on the CPU.
        weights: their weights ``[n, m]``; each row sums to 1.
        grid: eigenvalues ``[g]`` at which the smoothed density is given.
        values: the density there ``[g]``: it integrates to 1.
        width: standard deviation of the Gaussian that smooths it, 1 % of the range of the nodes.
    """

    nodes: Tensor
    weights: Tensor
    grid: Tensor
    values: Tensor
    width: float


def trace(
    operator: HessianOperator,
    *,
    generator: torch.Generator,
    tolerance: float = 0.02,
    max_probes: int = 32,
    known: tuple[Tensor, Tensor] | None = None,
) -> TraceEstimate:
    """The trace, by Hutchinson's estimator: the mean of v·Hv over random signs v.

    Args:
        operator: H.
        generator: draws the signs, on the CPU.
        tolerance: draw more vectors until the standard error is at most this share of the estimate.
        max_probes: stop after so many, at least 2.
        known: eigenvalues ``[k]`` and eigenvectors ``[k, P]``. Their part of the trace is then exact, and only the
            rest is estimated: Σ_i λ_i ((x_i·v)² − 1) is subtracted from every sample, which has mean zero.

    Raises:
        NonFiniteLossError: if a product holds NaN or infinity.
    """
    samples = torch.empty(0, dtype=torch.float64)
    while True:
        count = min(_CHUNK, max(max_probes, 2) - len(samples))
        probes = _signs(operator, count, generator)
        chunk = (probes * operator.matmat(probes)).sum(0, dtype=torch.float64).cpu()
        if known is not None:
            overlaps = (known[1].to(probes) @ probes).double().cpu().square()
            chunk -= known[0].cpu().double() @ (overlaps - 1)
        samples = torch.cat([samples, chunk])
        check_products(samples)
        value, error = float(samples.mean()), float(samples.std()) / math.sqrt(len(samples))
        if error <= tolerance * abs(value) or len(samples) >= max(max_probes, 2):
            return TraceEstimate(value, error, len(samples))


def density(
    operator: HessianOperator,
    *,
    generator: torch.Generator,
    steps: int = 48,
    probes: int = 2,
    known: tuple[Tensor, Tensor] | None = None,
) -> Density:
    """The spectral density over the whole range, negative eigenvalues included, by stochastic Lanczos quadrature.

    Each random vector v gives the Gauss quadrature of the measure Σ_i (x_i·v)² δ(λ − λ_i); their mean is the density
    (Ubaru, Chen and Saad, 2017; Ghorbani et al., 2019). The m-step quadrature is exact for the moments v·H^j v with
    j < 2m. All vectors advance together and share every batch's graph. Nothing is reorthogonalised, so no basis is
    stored: nodes then repeat, and their weights share what one node had (Chen, Trogdon and Ubaru, 2021).

    Args:
        operator: H.
        generator: draws the random vectors, on the CPU.
        steps: m, nodes per random vector; at most P.
        probes: n, random vectors.
        known: eigenvalues ``[k]`` and eigenvectors ``[k, P]``, as for :func:`trace`. They get their exact share 1/P
            each, and the random vectors describe the rest, orthogonal to them. An outlier is else off by its own size.

    Raises:
        NonFiniteLossError: if a product holds NaN or infinity.
    """
    found = None if known is None else known[1].to(operator.device, operator.dtype)
    # Normal numbers, not signs: what is left of them after the projection still has every direction equally often.
    rows = torch.stack([torch.randn(operator.size, generator=generator) for _ in range(probes)])
    vectors = _without(rows.to(operator.device, operator.dtype).T, found)
    vectors = vectors / vectors.norm(dim=0).clamp(min=1e-30)
    previous, beta = torch.zeros_like(vectors), torch.zeros(probes, dtype=operator.dtype, device=operator.device)
    diagonal, off_diagonal, scale = [], [], torch.zeros_like(beta)
    for _ in range(min(steps, operator.size)):
        product = _without(operator.matmat(vectors), found)
        product -= beta * previous
        alpha = (product * vectors).sum(0)
        product -= alpha * vectors
        scale = torch.maximum(scale, alpha.abs() + beta)
        beta = product.norm(dim=0)
        # An invariant space: the quadrature is complete, and what follows must get no weight.
        alive = beta > 20 * torch.finfo(operator.dtype).eps * scale
        beta = beta * alive
        diagonal.append(alpha)
        off_diagonal.append(beta)
        previous, vectors = vectors, torch.where(alive, product / beta.clamp(min=1e-30), 0.0)
    main = torch.stack(diagonal, 1).double().cpu()
    off = torch.stack(off_diagonal, 1).double().cpu()[:, :-1]
    check_products(torch.cat([main, off], 1))
    tridiagonal = torch.diag_embed(main) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    nodes, coordinates = torch.linalg.eigh(tridiagonal)
    weights = coordinates[:, 0].square()
    if known is not None:
        exact, share = known[0].double().cpu().expand(probes, -1), 1 / operator.size
        weights = torch.cat([weights * (1 - len(known[0]) / operator.size), torch.full_like(exact, share)], 1)
        nodes = torch.cat([nodes, exact], 1)
    return _smoothed(nodes, weights)


def _without(columns: Tensor, found: Tensor | None) -> Tensor:
    """The part of the columns that is orthogonal to the eigenvectors found."""
    return columns if found is None else columns - found.T @ (found @ columns)


def _smoothed(nodes: Tensor, weights: Tensor) -> Density:
    used = nodes[weights > 1e-12]
    low, high = float(used.min()), float(used.max())
    width = 0.01 * (max(high - low, 0.1 * max(abs(low), abs(high))) or 1.0)
    grid = torch.linspace(low - 5 * width, high + 5 * width, _GRID, dtype=torch.float64)
    kernels = torch.exp(-0.5 * ((grid[:, None] - used) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    values = kernels @ weights[weights > 1e-12] / len(nodes)
    return Density(nodes, weights, grid, values, width)


def _signs(operator: HessianOperator, count: int, generator: torch.Generator) -> Tensor:
    """Random signs ``[P, count]``: one row of the generator's numbers per vector, whatever the count."""
    rows = torch.randint(0, 2, (count, operator.size), generator=generator, dtype=torch.int8)
    return (2 * rows - 1).to(device=operator.device, dtype=operator.dtype).T
