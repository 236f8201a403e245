"""Curvature of a model's task loss: eigenvalues, trace, density, layers, sharpness."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedlight.analysis.batches import analysis_batches
from fedlight.analysis.lanczos import Eigenpairs, block_eigenvalues, top_eigenvalues
from fedlight.analysis.operators import Block, HessianOperator, NonFiniteLossError
from fedlight.analysis.result import HessianResult
from fedlight.analysis.stochastic import density as estimate_density
from fedlight.analysis.stochastic import trace as estimate_trace
from fedlight.analysis.task import TaskLoss
from fedlight.checks import check_number
from fedlight.seeding import generator

_PROBE = 64  # samples that show how much memory a graph needs
_CPU_GRAPH, _DEVICE_GRAPH = 2**25, 2**30

Data = Dataset[Any] | Iterable[Any]


def hessian_operator(
    module: nn.Module,
    data: Data | None,
    *,
    double: bool = False,
    device: torch.device | str | None = None,
    max_samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    reduce: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
    world_size: int = 1,
    graph_memory: int | None = None,
    transfer: Callable[[Any], Any] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    loss: TaskLoss | None = None,
) -> HessianOperator:
    """The Hessian of the task loss that ``module.training_step`` returns, without penalties and in eval mode.

    Args:
        module: a LightningModule. The operator works on a copy: it shows the model as it is now.
        data: see :func:`~fedlight.analysis.batches.analysis_batches`, as for ``max_samples``, ``batch_size``,
            ``transfer`` and ``collate_fn``.
        double: compute in float64; float32 by default, whatever the training precision.
        device: where to compute; where the module is by default.
        max_samples: samples to draw from a dataset; None for all.
        batch_size: samples of a batch. The operator does not depend on it, but its speed does: by default the graph of
            a batch takes about 32 MB on a CPU, where more leaves the caches, and 1 GB elsewhere.
        seed: of the draw.
        reduce: sums a tensor over processes.
        rank: of this process.
        world_size: processes that share the data.
        graph_memory: see :class:`~fedlight.analysis.operators.HessianOperator`.
        transfer: moves a batch to the device.
        collate_fn: makes a batch of samples.
        loss: what a former call built for the same module, to be used again.
    """
    loss = loss or TaskLoss(module, torch.float64 if double else torch.float32, device)
    parameters = list(loss.parameters.values())
    if not parameters:
        raise ValueError(f"The Hessian needs at least one trainable parameter; {type(loss.module).__name__} has none.")
    how: dict[str, Any] = {"device": (here := parameters[0].device), "transfer": transfer, "collate_fn": collate_fn}
    read = partial(analysis_batches, data, seed=seed, **how)
    build = partial(HessianOperator, loss, parameters, settings=loss.settings, explain=loss.explain)
    if batch_size is None and isinstance(data, Dataset):
        probe = read(max_samples=_PROBE, batch_size=_PROBE)
        target = _CPU_GRAPH if here.type == "cpu" else _DEVICE_GRAPH
        batch_size = max(1, min(4096, int(target / build(probe, sizes=probe.sizes).graph_bytes_per_sample())))
    batches = read(max_samples=max_samples, batch_size=batch_size, rank=rank, world_size=world_size)
    weights = loss.denominators(batches)
    return build(batches, sizes=batches.sizes, weights=weights, reduce=reduce, graph_memory=graph_memory)


def measure_hessian(
    operator: HessianOperator,
    *,
    top_k: int = 1,
    tolerance: float = 1e-3,
    max_products: int = 500,
    trace: bool = True,
    trace_tolerance: float = 0.02,
    trace_probes: int = 32,
    density: bool = False,
    density_steps: int = 48,
    density_probes: int = 2,
    layers: Mapping[str, Block] | None = None,
    rho: float = 0.05,
    seed: int = 0,
) -> HessianResult:
    """Measure the curvature that an operator describes.

    Args:
        operator: ∇²L.
        top_k: how many of the largest eigenvalues.
        tolerance: see :func:`~fedlight.analysis.lanczos.top_eigenvalues`, as for ``max_products``.
        max_products: products that the eigenvalues may take.
        trace: whether to estimate the trace.
        trace_tolerance: its standard error, as a share of it.
        trace_probes: random vectors that the trace may take.
        density: whether to estimate the spectral density.
        density_steps: products per random vector.
        density_probes: random vectors.
        layers: blocks of parameters whose λ_max to find, as from :func:`~fedlight.analysis.layers.layer_blocks`.
        rho: radius of the sharpness L(w + ρ ∇L/‖∇L‖) − L(w).
        seed: of the random vectors.

    Raises:
        NonFiniteLossError: if the loss or a derivative is NaN or infinite.
        NoSecondDerivativeError: if a layer cannot be differentiated twice; the message names it.
        ValueError: if an argument is out of range.
    """
    check_number("`rho`, the radius of the sharpness,", rho, positive=True)
    seconds: dict[str, float] = {}
    timed, rng = partial(_timed, seconds=seconds, device=operator.device), partial(generator, seed)
    with timed("gradient"):
        loss, gradient = operator.loss_and_gradient()
        norm = float(gradient.norm())
        sharpness = operator.loss_at(operator.flat() + (rho / norm) * gradient) - loss if norm > 0 else 0.0
    limits: dict[str, Any] = {"tolerance": tolerance, "max_products": max_products}
    with timed("eigenvalues"):
        pairs = top_eigenvalues(operator, top_k, generator=rng("hessian eigenvalues"), **limits)
    known, estimate, spectrum = {"known": (pairs.values, pairs.vectors)}, None, None
    if trace:
        draws: dict[str, Any] = {"generator": rng("hessian trace"), "max_probes": trace_probes, **known}
        with timed("trace"):
            estimate = estimate_trace(operator, tolerance=trace_tolerance, **draws)
    if density:
        draws = {"generator": rng("hessian density"), "probes": density_probes, **known}
        with timed("density"):
            spectrum = estimate_density(operator, steps=density_steps, **draws)
    by_layer: dict[str, Eigenpairs] = {}
    if layers is not None:
        with timed("layers"):
            by_layer = block_eigenvalues(operator, layers, generator=rng("hessian layers"), tolerance=tolerance)
    assert pairs.smallest is not None
    return HessianResult(
        loss=loss,
        gradient_norm=norm,
        sharpness=sharpness,
        rho=rho,
        eigenvalues=pairs.values.tolist(),
        residuals=pairs.residuals.tolist(),
        smallest=float(pairs.smallest.values),
        smallest_residual=float(pairs.smallest.residuals),
        converged=pairs.converged,
        trace=estimate,
        density=spectrum,
        layers={name: float(p.values[0]) for name, p in by_layer.items()},
        samples=operator.samples,
        parameters=operator.size,
        seconds=seconds,
        eigenvectors=pairs.vectors,
    )


def clients_lambda_max(
    module: nn.Module,
    clients: Sequence[Data],
    *,
    tolerance: float = 1e-2,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> list[float]:
    """λ_max of the loss on each client's own data, at the same parameters; processes share the clients.

    It is NaN for a client whose loss is not finite.

    Args:
        module: the model.
        clients: each client's data.
        tolerance: see :func:`~fedlight.analysis.lanczos.top_eigenvalues`.
        seed: of draws and start vectors.
        rank: of this process.
        world_size: processes.
        reduce: sums a tensor over processes.
        options: further arguments of :func:`hessian_operator`.
    """
    values = torch.zeros(len(clients), dtype=torch.float64)
    dtype = torch.float64 if options.pop("double", False) else torch.float32
    loss = TaskLoss(module, dtype, options.pop("device", None))
    device = next(iter(loss.parameters.values())).device
    for index in range(rank, len(clients), world_size):
        operator = hessian_operator(module, clients[index], seed=seed, loss=loss, **options)
        rng = generator(seed, "hessian eigenvalues")
        try:
            operator.loss_and_gradient()  # says so if the loss is not finite
            pairs = top_eigenvalues(operator, generator=rng, smallest=False, tolerance=tolerance)
            values[index] = pairs.values[0]
        except NonFiniteLossError:  # of this client alone: the other processes wait for what the rest add up to
            values[index] = math.nan
    values = values.to(device)
    out: list[float] = (values if reduce is None else reduce(values)).tolist()
    return out


@contextmanager
def _timed(name: str, seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = time.perf_counter() - start
