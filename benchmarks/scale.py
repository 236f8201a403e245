"""Seconds and memory against the number of clients, of clients per round, and of parameters.

usage: python benchmarks/scale.py [--rounds 30] [--repeat 3] [--engine eager]

Every setting runs in a process of its own, in turns, so that other work on the machine meets all of them alike; the
table holds the best of the repeats. All clients read ten rows of the same data, so what grows with their number is what
fedlight itself keeps. Memory is the largest resident size of the process.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from fedlight.data.arrays import ArrayDataset
from fedlight.data.datamodule import FederatedDataModule
from fedlight.run.loggers import read_metrics
from fedlight.trainer import FederatedTrainer

ROWS = 100_000
PER_CLIENT = 10


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Attributes:
        clients: N.
        per_round: K.
        width: width of the hidden layer; there are 27 times as many parameters.
    """

    clients: int = 1_000
    per_round: int = 100
    width: int = 32


SWEEPS = {
    "clients": [Setting(clients=n) for n in (1_000, 10_000, 100_000)],
    "clients per round": [Setting(clients=10_000, per_round=k) for k in (10, 100, 1_000)],
    "clients per round, a million parameters": [
        Setting(clients=1_000, per_round=k, width=37_037) for k in (10, 100, 1_000)
    ],
    "parameters": [Setting(per_round=10, width=w) for w in (32, 1_000, 30_000)],
}


class Model(LightningModule):
    """An MLP of 16 inputs and ten classes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Data(FederatedDataModule):
    """Clients that read ten rows each."""

    def __init__(self, clients: int) -> None:
        super().__init__(batch_size=5)
        rng = torch.Generator().manual_seed(0)
        self.num_clients = clients
        self._all = ArrayDataset(torch.randn(ROWS, 16, generator=rng), torch.randint(0, 10, (ROWS,), generator=rng))

    def client_size(self, client):
        """Ten."""
        return PER_CLIENT

    def client_dataset(self, client):
        """Rows of the common storage."""
        return self._all.view((torch.arange(PER_CLIENT) + PER_CLIENT * client) % ROWS, None)


def measure(setting: Setting, rounds: int, engine: str) -> dict:
    """Run a setting in this process."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = Model(setting.width)
        trainer = FederatedTrainer(
            max_rounds=rounds,
            clients_per_round=setting.per_round,
            engine=engine,
            accelerator="cpu",
            devices=1,
            views=["server", "selected"],
            default_root_dir=folder,
            enable_progress_bar=False,
        )
        trainer.fit(model, Data(setting.clients))
        rows = read_metrics(trainer.run_dir / "metrics.csv")
        seconds = [row["time/round_s"] for row in rows][min(2, len(rows) - 1) :]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total = time.perf_counter() - started
    parameters = sum(p.numel() for p in model.parameters())
    return {"round_s": statistics.median(seconds), "peak_mb": peak, "total_s": total, "parameters": parameters}


def run(setting: Setting, rounds: int, engine: str) -> dict:
    """Run a setting in a process of its own."""
    command = [sys.executable, __file__, "--engine", engine, "--rounds", str(rounds)]
    command += ["--child", json.dumps(asdict(setting))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Run all settings in turns and print a table for each sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--only", choices=[*SWEEPS], nargs="*", default=[*SWEEPS])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(Setting(**json.loads(arguments.child)), arguments.rounds, arguments.engine)))
        return
    versions = f"torch {version('torch')}, Python {platform.python_version()}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread; {versions}; engine {arguments.engine}")
    for name in arguments.only:
        results: dict[Setting, list[dict]] = {setting: [] for setting in SWEEPS[name]}
        for _ in range(arguments.repeat):
            for setting in SWEEPS[name]:
                results[setting].append(run(setting, arguments.rounds, arguments.engine))
        print(f"\nagainst {name}\n\n| N | K | P | ms a round | x | peak MB | x | whole run, s |")
        print("|---|---|---|---|---|---|---|---|")
        best = {s: {key: min(r[key] for r in found) for key in found[0]} for s, found in results.items()}
        first = best[SWEEPS[name][0]]
        for setting, b in best.items():
            cells = [f"{setting.clients:,}", f"{setting.per_round:,}", f"{b['parameters']:,}"]
            cells += [f"{1e3 * b['round_s']:.1f}", f"{b['round_s'] / first['round_s']:.2f}"]
            cells += [f"{b['peak_mb']:.0f}", f"{b['peak_mb'] / first['peak_mb']:.2f}", f"{b['total_s']:.1f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
