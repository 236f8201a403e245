"""Extreme eigenvalues of a symmetric operator: restarted Lanczos whose vectors stay on the device.

The iteration is a generator that yields a vector and is sent the operator's product with it. So one driver can serve
many iterations at once: those of all layers of a network share every graph (:func:`block_eigenvalues`).

Source: Wu and Simon, 2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems".
"""

import math
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlight.analysis.operators import Block, HessianOperator, check_products
from fedlight.checks import check_number, check_whole


class KrylovSpace:
    """An orthonormal basis on the device, and the operator's projection on it on the CPU.

    Every product is orthogonalised against the whole basis, twice (Daniel et al., 1976), so restarts need nothing else.

    Attributes:
        basis: ``[capacity, P]``; the first ``count`` rows are used.
        room: the dimension of the space that is searched, P less what is locked.
        products: how many it has absorbed.
        scale: the largest |λ| so far; ``rounding`` is what the data type makes of it.
    """

    def __init__(
        self, size: int, capacity: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        self.size, self.dtype, self.device, self.generator = size, dtype, device, generator
        self.basis = torch.empty(capacity, size, dtype=dtype, device=device)
        self.projection = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.locked = torch.empty(0, size, dtype=dtype, device=device)
        self.rest = torch.empty(0)
        self.room, self.count, self.products = size, 0, 0
        self.scale = self.rounding = 0.0
        self._append(self._random())

    def lock(self, vectors: Tensor) -> None:
        """Search from now on in the complement of these eigenvectors, from a random start."""
        self.locked, self.count = vectors, 0
        self.room = self.size - len(vectors)
        self.projection.zero_()
        self._append(self._random())

    def absorb(self, product: Tensor) -> float:
        """Project the product with the last basis vector; keep the rest of it, and return the rest's norm."""
        self.products += 1
        used = self.basis[: self.count]
        coefficients = used @ product
        rest = self._purge(product - coefficients @ used)
        correction = used @ rest
        rest = self._purge(rest - correction @ used)
        column = (coefficients + correction).double().cpu()
        check_products(column)
        self.projection[: self.count, self.count - 1] = column
        self.projection[self.count - 1, : self.count] = column
        self.rest = rest
        return float(rest.norm()) if self.count < self.room else 0.0

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the projection, descending, and eigenvectors in the columns."""
        values, coordinates = torch.linalg.eigh(self.projection[: self.count, : self.count])
        self.scale = max(self.scale, float(values.abs().max()))
        self.rounding = 20 * torch.finfo(self.dtype).eps * self.scale
        return values.flip(0), coordinates.flip(1)

    def vectors(self, coordinates: Tensor) -> Tensor:
        """The rows that have these coordinates (columns) in the basis, normalised."""
        rows: Tensor = coordinates.T.to(self.basis) @ self.basis[: self.count]
        return rows.div_(rows.norm(dim=1, keepdim=True))

    def restart(self, values: Tensor, coordinates: Tensor, k: int, smallest: bool) -> None:
        """Keep the best half of the space: approximate eigenvectors at the ends that are sought."""
        capacity = len(self.basis)
        keep = min(k + (capacity - k) // 2, capacity - 1)
        low = min(max(1, keep // 4), keep - k) if smallest else 0
        chosen = list(range(keep - low)) + list(range(self.count - low, self.count))
        rows = self.vectors(coordinates[:, chosen])
        self.basis[: len(rows)] = rows
        self.projection.zero_()
        self.projection[: len(rows), : len(rows)] = values[chosen].diag()
        self.count = len(rows)

    def extend(self, norm: float, negligible: float) -> None:
        """Append the rest of the last product; where it is nothing, the space is invariant: a random direction."""
        self._append(self.rest / norm if norm > max(negligible, 1e-300) else self._random())

    def _append(self, vector: Tensor) -> None:
        self.basis[self.count] = vector
        self.count += 1

    def _random(self) -> Tensor:
        vector: Tensor = torch.randn(self.size, generator=self.generator, dtype=torch.float64)
        vector = (vector / vector.norm()).to(self.dtype).to(self.device)
        for _ in range(3):
            used = self.basis[: self.count]
            vector = self._purge(vector - (used @ vector) @ used)
            vector = vector / vector.norm()
        return vector

    def _purge(self, vector: Tensor) -> Tensor:
        return vector - (self.locked @ vector) @ self.locked if len(self.locked) else vector


Iteration = Generator[Tensor, Tensor, "Eigenpairs"]


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of a symmetric operator H, and the smallest.

    Attributes:
        values: λ_1 ≥ λ_2 ≥ ..., ``[k]`` float64 on the CPU.
        vectors: unit eigenvectors in the rows of ``[k, P]``, on the operator's device.
        residuals: ‖Hv − λv‖ of each, ``[k]``: an eigenvalue of H is at most this far from λ.
        smallest: the smallest eigenvalue with its vector and residual, each ``[1, ...]``, where it was asked for.
        converged: whether every residual is within the tolerance.
        products: how many products with H it took.
    """

    values: Tensor
    vectors: Tensor = field(repr=False)
    residuals: Tensor
    smallest: "Eigenpairs | None" = None
    converged: bool = True
    products: int = 0


def top_eigenvalues(
    operator: HessianOperator,
    k: int = 1,
    *,
    generator: torch.Generator,
    smallest: bool = True,
    tolerance: float = 1e-3,
    max_products: int = 500,
    basis: int | None = None,
) -> Eigenpairs:
    """The k largest eigenvalues, multiple ones as often as they occur, and the smallest.

    Args:
        operator: H.
        k: how many of the largest; more than P are cut to P, with a warning.
        generator: draws the start vectors, on the CPU.
        smallest: whether to find the smallest eigenvalue too.
        tolerance: iterate until the error of each of the largest is at most tolerance·|λ|, and that of the smallest at
            most tolerance·max|λ|; see :func:`eigenvalue_errors`. What rounding allows, about 20 ε·max|λ|, always counts
            as converged.
        max_products: give up after so many products, with ``converged=False`` and a warning.
        basis: vectors of length P to keep at most; by default 40, or 2k + 20 if that is more.

    Raises:
        ValueError: if k is below 1, or the tolerance is not positive.
        NonFiniteLossError: if a product holds NaN or infinity.
    """
    check_whole("`top_k`", k)
    check_number("`tolerance`", tolerance, positive=True)
    if k > (size := operator.size):
        warnings.warn(f"`top_k` is {k}, but the model has {size} parameters; all {size} are computed.", stacklevel=2)
    k = min(k, size)
    iteration = lanczos(operator, size, k, generator, smallest, tolerance, max_products, basis)
    pairs = _verified(operator, _driven({"": iteration}, lambda asked: [operator.matvec(asked[""])])[""])
    if not pairs.converged:
        worst = float((pairs.residuals / pairs.values.abs().clamp(min=1e-300)).max())
        warnings.warn(
            f"The eigenvalues did not converge within {max_products} products: the largest residual is {worst:.2g} of"
            f" its eigenvalue, the tolerance {tolerance:.2g}. Raise max_products or the tolerance.",
            stacklevel=2,
        )
    return pairs


def block_eigenvalues(
    operator: HessianOperator,
    blocks: Mapping[str, Block],
    *,
    generator: torch.Generator,
    tolerance: float = 1e-3,
) -> dict[str, Eigenpairs]:
    """The largest eigenvalue of each diagonal block. All iterations advance together and share every batch's graph."""
    sizes = {name: sum(operator.parameters[i].numel() for i in block) for name, block in blocks.items()}
    settings = generator, False, tolerance, 200
    iterations = {name: lanczos(operator, size, 1, *settings) for name, size in sizes.items()}
    return _driven(iterations, lambda asked: operator.products([(blocks[name], v) for name, v in asked.items()]))


def _driven(
    iterations: Mapping[str, Iteration], products: Callable[[dict[str, Tensor]], list[Tensor]]
) -> dict[str, Eigenpairs]:
    """Let iterations run side by side to their ends; ``products`` gives each the product that it asks for."""
    vectors, done = {name: next(iteration) for name, iteration in iterations.items()}, dict[str, Eigenpairs]()
    while vectors:
        for name, product in zip(list(vectors), products(vectors), strict=True):
            try:
                vectors[name] = iterations[name].send(product)
            except StopIteration as stop:
                done[name] = stop.value
                del vectors[name]
    return {name: done[name] for name in iterations}


def lanczos(
    operator: HessianOperator,
    size: int,
    k: int,
    generator: torch.Generator,
    smallest: bool,
    tolerance: float,
    max_products: int,
    basis: int | None = None,
) -> Iteration:
    """The iteration behind :func:`top_eigenvalues`: yields v ``[size]``, is sent Hv, returns the eigenpairs.

    A Krylov space holds one vector of each eigenspace, so a multiple eigenvalue shows once. For k > 1 the iteration
    therefore starts again, orthogonally to what it found, until nothing above the k-th eigenvalue is left.
    """
    capacity = max(40, 2 * k + 20) if basis is None else max(basis, k + 3)
    space = KrylovSpace(size, min(size, capacity), operator.dtype, operator.device, generator)
    limits = tolerance, max_products
    pairs = yield from _solve(space, *limits, k, smallest, floor=-math.inf)
    while 1 < k < size and pairs.converged:
        space.lock(pairs.vectors)
        other = yield from _solve(space, *limits, 1, False, floor=float(pairs.values[-1]))
        pairs = replace(pairs, converged=other.converged)
        margin = max(tolerance * abs(float(pairs.values[-1])), space.rounding)
        if not other.converged or float(other.values[0]) <= float(pairs.values[-1]) + margin:
            break
        names = ("values", "vectors", "residuals")
        both: dict[str, Any] = {name: torch.cat([getattr(pairs, name), getattr(other, name)]) for name in names}
        order = both["values"].argsort(descending=True)[:k]
        pairs = replace(pairs, **{name: found[order.to(found.device)] for name, found in both.items()})
    return replace(pairs, products=space.products)


def eigenvalue_errors(values: Tensor, residuals: Tensor) -> Tensor:
    """How far each approximate eigenvalue may be from the eigenvalue that it stands for.

    With r = ‖Hv − λv‖, an eigenvalue is within r of λ, and within r²/gap if the others are at least ``gap`` away
    (Parlett, 1980, "The Symmetric Eigenvalue Problem", chapter 11). The gap is the distance to the next value, less
    that one's residual. Both are those of all eigenvalues of the projection, ``[j]``.
    """
    distances = (values[:, None] - values).abs() - residuals
    distances.fill_diagonal_(math.inf)
    gaps = distances.min(1).values
    return torch.where(gaps > residuals, residuals.square() / gaps.clamp(min=1e-300), residuals)


def _solve(space: KrylovSpace, tolerance: float, max_products: int, k: int, smallest: bool, floor: float) -> Iteration:
    """Extend the space until k eigenpairs (and the smallest) converge, or none above the floor can be there."""
    steps = 0
    while True:
        steps += 1
        norm = space.absorb((yield space.basis[space.count - 1]))
        values, coordinates = space.ritz()
        residuals = norm * coordinates[-1].abs()
        wanted = min(k, len(values))
        errors = eigenvalue_errors(values, residuals)
        allowed = (tolerance * values.abs()).clamp(min=space.rounding)
        good = wanted == min(k, space.room) and bool((errors[:wanted] <= allowed[:wanted]).all())
        if smallest:
            good &= float(errors[-1]) <= max(tolerance * space.scale, space.rounding)
        # A random start can look like an eigenvector by chance where nearly all eigenvalues are alike: take some steps.
        good &= steps >= min(8, space.room)
        whole = space.count == space.room  # the space is everything there is: exact
        below = steps >= 12 and float(values[0] + residuals[0]) <= floor
        below &= float(residuals[0]) <= 0.1 * max(abs(float(values[0])), abs(floor))
        if good or whole or below or space.products >= max_products:
            top = Eigenpairs(values[:wanted], space.vectors(coordinates[:, :wanted]), residuals[:wanted])
            last = Eigenpairs(values[-1:], space.vectors(coordinates[:, -1:]), residuals[-1:])
            return replace(top, smallest=last if smallest else None, converged=good or whole or below)
        if space.count == len(space.basis):
            space.restart(values, coordinates, k, smallest)
        space.extend(norm, space.rounding)


def _verified(operator: HessianOperator, pairs: Eigenpairs) -> Eigenpairs:
    """Values and residuals from products with the vectors found, which rounding in the iteration cannot flatter."""
    vectors = pairs.vectors if pairs.smallest is None else torch.cat([pairs.vectors, pairs.smallest.vectors])
    products = operator.matmat(vectors.T).T
    values = (products * vectors).sum(1)
    residuals = (products - values[:, None] * vectors).norm(dim=1)
    values, residuals, k = values.double().cpu(), residuals.double().cpu(), len(pairs.values)
    order = values[:k].argsort(descending=True)
    return replace(
        pairs,
        values=values[order],
        vectors=vectors[order.to(vectors.device)],
        residuals=residuals[order],
        smallest=pairs.smallest and Eigenpairs(values[k:], vectors[k:], residuals[k:]),
        products=pairs.products + len(vectors),
    )
