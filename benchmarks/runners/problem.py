"""What every framework trains: the same model, data, clients, epochs and batches."""

import argparse
import json
import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclass
class Problem:
    """A federated problem that needs no download."""

    clients: list[Pair]
    test: Pair
    batch_size: int
    epochs: int
    lr: float
    rounds: int
    name: str
    per_round: int = 0  # clients of a round; 0 for all

    def __post_init__(self) -> None:
        self.per_round = self.per_round or len(self.clients)

    @property
    def share(self) -> float:
        """The clients of a round among all of them."""
        return self.per_round / len(self.clients)

    @property
    def eval_batch_size(self) -> int:
        """Samples of a batch of an evaluation; processes share batches, so there are some where it takes long."""
        return {"cnn": 100, "small": 250}.get(self.name, 1000)

    def net(self) -> nn.Module:
        """The network, with the same initial weights every time."""
        torch.manual_seed(0)
        if self.name == "digits":
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        if self.name == "small":
            return nn.Sequential(
                *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(400, 10)),
            )
        return nn.Sequential(
            *(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(1600, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, 100)),
        )

    @torch.no_grad()
    def accuracy(self, net: nn.Module) -> float:
        """Share of the test set that a network gets right."""
        training = net.training
        net.eval()
        (x, y), size = self.test, self.eval_batch_size
        right = sum(int((net(a).argmax(1) == b).sum()) for a, b in zip(x.split(size), y.split(size), strict=True))
        net.train(training)
        return right / len(y)


def digits(rounds: int) -> Problem:
    """Ten clients of 140 images of 8x8, an MLP, three epochs of five batches."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(x, dtype=torch.float32)[order] / 16, torch.tensor(y)[order]
    parts = torch.arange(1400).chunk(10)
    return Problem([(x[p], y[p]) for p in parts], (x[1400:], y[1400:]), 28, 3, 0.1, rounds, "digits")


def cnn(rounds: int) -> Problem:
    """Four clients of 200 random images of 3x32x32, the paper's CIFAR-100 network, two epochs of four batches."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(1000, 3, 32, 32, generator=rng), torch.randint(0, 100, (1000,), generator=rng)
    parts = torch.arange(800).chunk(4)
    return Problem([(x[p], y[p]) for p in parts], (x[800:], y[800:]), 50, 2, 0.05, rounds, "cnn")


def small(rounds: int) -> Problem:
    """Fifty clients of 100 images of 28x28, twenty of them in a round, a CNN of 5,258 parameters, two epochs.

    An image is noise around one of ten patterns; an epoch is five batches.
    """
    rng = torch.Generator().manual_seed(0)
    patterns, y = torch.randn(10, 1, 28, 28, generator=rng), torch.randint(0, 10, (6000,), generator=rng)
    x = patterns[y] + 4 * torch.randn(6000, 1, 28, 28, generator=rng)
    parts = torch.arange(5000).chunk(50)
    return Problem([(x[p], y[p]) for p in parts], (x[5000:], y[5000:]), 20, 2, 0.05, rounds, "small", 20)


class Clock:
    """Moments at which rounds ended."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.loaded = time.time() - float(os.environ.get("PROCESS_STARTED", "nan"))
        self.ends: list[float] = []

    def round_ended(self) -> None:
        """Note the end of a round."""
        self.ends.append(time.perf_counter())

    def report(self, accuracy: float, **more: object) -> None:
        """Print a line of JSON: the median round without the first one, and what came before the second."""
        gaps = sorted(b - a for a, b in zip(self.ends[:-1], self.ends[1:], strict=True))
        result = {"round_s": gaps[len(gaps) // 2], "first_s": self.ends[0] - self.started, "rounds": len(self.ends)}
        result |= {"start_s": self.loaded + result["first_s"], "accuracy": accuracy}
        print("RESULT " + json.dumps({**result, **more}), flush=True)


def from_arguments() -> tuple[Problem, argparse.Namespace]:
    """The problem of ``--workload`` and ``--rounds``; threads of ``--threads``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=["digits", "small", "cnn"], default="digits")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return {"digits": digits, "small": small, "cnn": cnn}[arguments.workload](arguments.rounds), arguments
