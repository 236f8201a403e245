"""The space that a Lanczos iteration has explored."""

import torch
from torch import Tensor

from fedlight.analysis.operators import check_products


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
