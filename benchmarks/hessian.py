"""Seconds for λ_max and for the trace of a Hessian: fedlight, PyHessian and curvlinops on the same model and data.

    python benchmarks/hessian.py [--samples 500] [--data cifar100.npz] [--device cuda]

The model is the CNN of `configs/paper/cifar100.yaml` after some steps of SGD. Every method gets the same batches. The
first table compares one Hessian-vector product with a plain forward, backward and second backward pass. PyHessian is
used where it is installed (`pip install pyhessian`); curvlinops comes with fedlight's extra `dev`.
"""

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from fedlight.analysis import HessianOperator, hessian_operator, top_eigenvalues, trace

Batches = list[tuple[Tensor, Tensor]]


class Model(LightningModule):
    """The network whose Hessian is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(1600, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, 100),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        return F.cross_entropy(self.net(batch[0]), batch[1])


def load(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images and labels: CIFAR-100 from an .npz, or noise around a picture per class."""
    count = max(args.samples, 2000)  # it learns from more than what is measured
    if args.data:
        with np.load(args.data) as file:
            x = torch.tensor(file["x_train"][:count]).permute(0, 3, 1, 2).float() / 255
            return (x - x.mean()) / x.std(), torch.tensor(file["y_train"][:count]).long()
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(0, 100, (count,), generator=rng)
    x = torch.randn(100, 3, 32, 32, generator=rng)[y] + torch.randn(count, 3, 32, 32, generator=rng)
    return x, y


def train(model: Model, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer, rng = torch.optim.SGD(model.parameters(), 0.05), torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(0, len(y), (50,), generator=rng).to(x.device)
        optimizer.zero_grad()
        F.cross_entropy(model.net(x[rows]), y[rows]).backward()
        optimizer.step()
    optimizer.zero_grad()


def timed(function: Callable[[], Any], device: torch.device, repeats: int = 1) -> tuple[float, Any]:
    """The best of some repetitions, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best, result


def products(model: Model, batches: Batches, device: torch.device, repeats: int) -> None:
    """One product of each kind against plain passes."""
    parameters = list(model.parameters())
    vector = torch.randn(sum(p.numel() for p in parameters), device=device)
    parts = [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)]

    def plain() -> None:
        for x, y in batches:
            gradients = torch.autograd.grad(F.cross_entropy(model.net(x), y), parameters, create_graph=True)
            torch.autograd.grad(gradients, parameters, parts)

    unkept, kept = hessian_operator(model, batches, graph_memory=0), hessian_operator(model, batches)
    vectors = torch.randn(len(vector), 8, device=device)
    kept.matvec(vector)
    ways: dict[str, Callable[[], Any]] = {
        "plain forward, backward, backward": plain,
        "fedlight, one vector, no graph kept": lambda: unkept.matvec(vector),
        "fedlight, one vector, graphs kept": lambda: kept.matvec(vector),
        "fedlight, per vector of 8, no graph kept": lambda: unkept.matmat(vectors),
    }
    plain()
    times = {name: timed(f, device, repeats)[0] / (8 if "of 8" in name else 1) for name, f in ways.items()}
    print(f"\n{'one Hessian-vector product':<44}{'seconds':>10}{'ratio':>8}")
    for name, seconds in times.items():
        print(f"{name:<44}{seconds:>10.4f}{seconds / times['plain forward, backward, backward']:>8.2f}")


def peers(model: Model, batches: Batches, device: torch.device) -> dict[str, tuple[Callable[[], float], ...]]:
    """By name: what computes λ_max to 1e-3, and what computes the trace."""
    samples = sum(len(y) for _, y in batches)

    def ours() -> HessianOperator:
        return hessian_operator(model, batches)

    def rng() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    ways: dict[str, tuple[Callable[[], float], ...]] = {
        "fedlight": (
            lambda: top_eigenvalues(ours(), generator=rng(), smallest=False, tolerance=1e-3).values.item(),
            lambda: trace(ours(), generator=rng(), tolerance=0.02, max_probes=32).value,
        )
    }
    from curvlinops import HessianLinearOperator, hutchinson_trace
    from scipy.sparse.linalg import eigsh

    def theirs() -> Any:
        parameters = [p for p in model.net.parameters() if p.requires_grad]
        loss = nn.CrossEntropyLoss()
        return HessianLinearOperator(model.net, loss, parameters, batches, num_data=samples, check_deterministic=False)

    ways["curvlinops + scipy"] = (
        lambda: float(eigsh(theirs().to_scipy(), k=1, which="LA", tol=1e-3, return_eigenvectors=False)[0]),
        lambda: float(hutchinson_trace(theirs(), num_matvecs=32)),
    )
    try:
        from pyhessian import hessian
    except ImportError:
        print("PyHessian is not installed (pip install pyhessian); it is left out.")
        return ways

    def power() -> Any:
        return hessian(model.net, nn.CrossEntropyLoss(), dataloader=batches, cuda=device.type == "cuda")

    ways["PyHessian"] = (
        lambda: float(power().eigenvalues(maxIter=500, tol=1e-3)[0][0]),
        lambda: float(np.mean(power().trace(maxIter=100, tol=1e-3))),
    )
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="steps of SGD before the Hessian is measured")
    parser.add_argument("--repeats", type=int, default=3, help="of a single product; the best counts")
    parser.add_argument("--reference-probes", type=int, default=64, help="random vectors of the reference trace")
    parser.add_argument("--data", help="an .npz with x_train and y_train")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = Model().to(device)
    x, y = (tensor.to(device) for tensor in load(args))
    train(model, x, y, args.steps)
    x, y = x[: args.samples], y[: args.samples]
    batches = list(zip(x.split(args.batch_size), y.split(args.batch_size), strict=True))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    parameters = sum(p.numel() for p in model.parameters())
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {where}")
    print(f"{parameters:,} parameters, {len(y):,} samples in batches of {args.batch_size}, float32")
    products(model, batches, device, args.repeats)

    exact = hessian_operator(model, batches)
    rng = torch.Generator().manual_seed(1)
    pairs = top_eigenvalues(exact, 5, generator=rng, smallest=False, tolerance=1e-5)
    reference = trace(
        exact, generator=rng, tolerance=0, max_probes=args.reference_probes, known=(pairs.values, pairs.vectors)
    )
    exact.release()
    wanted = pairs.values[0].item()
    print(f"\nreference: λ_max {wanted:.5g}, trace {reference.value:.4g} ± {reference.error:.2g}")
    print(f"{'':<22}{'λ_max':>10}{'error':>10}{'seconds':>10}   {'trace':>10}{'error':>10}{'seconds':>10}")
    for name, (largest, total) in peers(model, batches, device).items():
        seconds, value = timed(largest, device)
        trace_seconds, estimate = timed(total, device)
        print(
            f"{name:<22}{value:>10.5g}{abs(value / wanted - 1):>10.1e}{seconds:>10.2f}   "
            f"{estimate:>10.4g}{abs(estimate / reference.value - 1):>10.1e}{trace_seconds:>10.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
