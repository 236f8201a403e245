"""What a measurement of curvature found."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedlight.analysis.stochastic import Density, TraceEstimate


@dataclass(frozen=True)
class HessianResult:
    """The curvature of a loss L at parameters w.

    Attributes:
        loss: L(w), without penalties.
        gradient_norm: ‖∇L(w)‖.
        sharpness: L(w + ρ ∇L/‖∇L‖) − L(w).
        rho: ρ.
        eigenvalues: the largest ones of ∇²L, descending.
        residuals: ‖Hv − λv‖ of each.
        smallest: the smallest eigenvalue, which is negative away from a minimum.
        smallest_residual: its residual.
        converged: whether the eigenvalues reached the tolerance.
        trace: tr ∇²L with its standard error, or None.
        density: how the eigenvalues are distributed, or None.
        layers: λ_max of each layer's diagonal block.
        clients: λ_max of each client's own loss, by its number; NaN where that loss is not finite.
        samples: how many the loss is a mean over.
        parameters: P.
        seconds: what each part took.
        eigenvectors: of the largest eigenvalues, ``[k, P]``, on the device; not saved.
    """

    loss: float
    gradient_norm: float
    sharpness: float
    rho: float
    eigenvalues: list[float]
    residuals: list[float]
    smallest: float
    smallest_residual: float
    converged: bool = True
    trace: TraceEstimate | None = None
    density: Density | None = None
    layers: dict[str, float] = field(default_factory=dict)
    clients: dict[int, float] = field(default_factory=dict)
    samples: int = 0
    parameters: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    eigenvectors: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue."""
        return self.eigenvalues[0]

    def metrics(self) -> dict[str, float]:
        """Scalars by the names under which they are logged."""
        out = {"hessian/lambda_max": self.lambda_max, "hessian/lambda_min": self.smallest}
        out |= {f"hessian/lambda_{k}": value for k, value in enumerate(self.eigenvalues[1:], 2)}
        out |= {"hessian/lambda_max_residual": self.residuals[0], "hessian/lambda_min_residual": self.smallest_residual}
        out |= {f"hessian/lambda_{k}_residual": value for k, value in enumerate(self.residuals[1:], 2)}
        if self.trace is not None:
            out |= {"hessian/trace": self.trace.value, "hessian/trace_error": self.trace.error}
        out |= {f"hessian/{name}": getattr(self, name) for name in ("loss", "gradient_norm", "sharpness")}
        out |= {f"hessian/layer/{name}/lambda_max": value for name, value in self.layers.items()}
        if self.clients:
            values = list(self.clients.values())
            out["hessian/clients/lambda_max_mean"] = sum(values) / len(values)
            out["hessian/clients/lambda_max_max"] = max(values, key=lambda value: (math.isnan(value), value))
        out["time/hessian_s"] = sum(self.seconds.values())
        return out

    def density_table(self) -> list[tuple[float, float]]:
        """Rows of (eigenvalue, density); empty where it was not measured."""
        if self.density is None:
            return []
        return list(zip(self.density.grid.tolist(), self.density.values.tolist(), strict=True))

    def summary(self) -> str:
        """The figures as lines of text, each with how far to trust it, and the time that each part took."""
        pairs = zip(self.eigenvalues, self.residuals, strict=True)
        out = {f"λ_{i}" + (" (max)" if i == 1 else ""): f"{v:.5g} ± {r:.1g}" for i, (v, r) in enumerate(pairs, 1)}
        out["λ_min"] = f"{self.smallest:.5g} ± {self.smallest_residual:.1g}"
        if self.trace is not None:
            out["trace"] = f"{self.trace.value:.5g} ± {self.trace.error:.2g}"
        out |= {"loss": f"{self.loss:.5g}", "‖∇L‖": f"{self.gradient_norm:.5g}"}
        out[f"sharpness, ρ = {self.rho:g}"] = f"{self.sharpness:.5g}"
        out |= {f"λ_max of layer {name}": f"{value:.5g}" for name, value in self.layers.items()}
        clients, logged = "hessian/clients/lambda_max_", self.metrics().items()
        out |= {f"λ_max of a client's loss, {k.removeprefix(clients)}": f"{v:.5g}" for k, v in logged if clients in k}
        head = f"{self.samples:,} samples, {self.parameters:,} parameters; ± residual, or standard error of the trace"
        lines = [head, *(f"{name:<32}{text}" for name, text in out.items())]
        lines.append("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in self.seconds.items()))
        if not self.converged:
            lines.append("The eigenvalues did not reach the tolerance; see the residuals.")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write everything but the eigenvectors to an ``.npz`` file, which needs no pickle to be read."""
        apart = ("trace", "density", "layers", "clients", "seconds", "eigenvectors")
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in vars(self).items() if name not in apart}
        if self.trace is not None:
            arrays |= {"trace": self.trace.value, "trace_error": self.trace.error, "trace_probes": self.trace.probes}
        if (found := self.density) is not None:
            arrays |= {"density_eigenvalue": found.grid.numpy(), "density": found.values.numpy()}
            arrays |= {"density_nodes": found.nodes.numpy(), "density_weights": found.weights.numpy()}
            arrays["density_width"] = found.width
        arrays |= {"layer_names": np.array(list(self.layers), dtype=str), "layer_lambda_max": [*self.layers.values()]}
        arrays |= {"client_numbers": [*self.clients], "clients": [*self.clients.values()]}
        arrays |= {"seconds_names": np.array(list(self.seconds), dtype=str), "seconds": list(self.seconds.values())}
        save_arrays(path, arrays)


def save_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays to an ``.npz`` file of just that name, and make its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
