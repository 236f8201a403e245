"""Seconds, memory and traffic against the number of clients, of clients per round, of parameters, and of processes.

usage: python benchmarks/scale.py [--rounds 30] [--repeat 3] [--engine eager] [--checkout PATH]

Every setting runs in processes of its own, in turns, so that other work on the machine meets all of them alike; the
table holds the best of the repeats. All clients read ten rows of the same data, so what grows with their number is what
fedlight itself keeps. `peak MB` is the largest resident size of a process; `all MB` is that of all processes together,
what they share counted once (their proportional set sizes, looked at every second and at the end), and `grown MB` what
of it came after imports. `MB sent` is what
passes the loopback device in a round, its median: nothing else on the machine should use that meanwhile. With
`--checkout` another checkout of fedlight, an older one perhaps, is measured.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F

from fedlight import FederatedDataModule, FederatedTrainer, sampling
from fedlight.algorithms import FedAvg, FedDyn
from fedlight.data.arrays import ArrayDataset

ROWS = 100_000
PER_CLIENT = 10


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Attributes:
        clients: N.
        per_round: K.
        width: width of the hidden layer; there are 27 times as many parameters with 16 inputs.
        inputs: of the model.
        processes: that share the clients of a round.
        rounds: to train; 0 for as many as the others.
        stateful: whether every client comes in turn, and keeps two vectors: FedDyn's, and its model for view `all`.
    """

    clients: int = 1_000
    per_round: int = 100
    width: int = 32
    inputs: int = 16
    processes: int = 1
    rounds: int = 0
    stateful: bool = False


SWEEPS = {
    "clients": [Setting(clients=n) for n in (1_000, 10_000, 100_000)],
    "clients per round": [Setting(clients=10_000, per_round=k) for k in (10, 100, 1_000)],
    "clients per round, a million parameters": [
        Setting(clients=1_000, per_round=k, width=37_037, processes=p, rounds=5)
        for p in (1, 2)
        for k in (10, 100, 1_000)
    ],
    "processes, FedDyn's state of every client": [
        Setting(clients=100_000, per_round=9_999, inputs=64, processes=p, rounds=11, stateful=True) for p in (1, 2)
    ],
    "parameters": [Setting(per_round=10, width=w) for w in (32, 1_000, 30_000)],
}


class Model(LightningModule):
    """An MLP of ten classes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch, batch_idx):
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Data(FederatedDataModule):
    """Clients that read ten rows each."""

    def __init__(self, clients: int, inputs: int) -> None:
        super().__init__(batch_size=5)
        rng = torch.Generator().manual_seed(0)
        self.num_clients = clients
        self._all = ArrayDataset(torch.randn(ROWS, inputs, generator=rng), torch.randint(0, 10, (ROWS,), generator=rng))

    def client_size(self, client):
        """Ten."""
        return PER_CLIENT

    def client_dataset(self, client):
        """Rows of the common storage."""
        return self._all.view((torch.arange(PER_CLIENT) + PER_CLIENT * client) % ROWS, None)


class Traffic(Callback):
    """Bytes that have passed the loopback device when each round begins."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def on_round_start(self, trainer, pl_module):
        """Read the counter."""
        line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
        self.sent.append(int(line.split()[9]))

    def megabytes(self) -> float:
        """The median of a round."""
        rounds = [b - a for a, b in itertools.pairwise(self.sent)]
        return statistics.median(rounds) / 1e6


def proportional_mb() -> float:
    """The resident size of this process, in which pages are divided among those that share them."""
    return int(re.search(r"Pss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) / 1024


@contextmanager
def peak_of(figure, every=1.0):
    """Yield a list whose last entry is the largest value of a figure so far, looked at every second."""
    peaks, ended = [figure()], threading.Event()

    def look():
        while not ended.wait(every):
            peaks.append(max(peaks[-1], figure()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()
        peaks.append(max(peaks[-1], figure()))


def measure(setting: Setting, rounds: int, engine: str) -> dict:
    """Run a setting in this process, and in those that it starts; the first one's figures are of all."""
    torch.set_num_threads(1)
    started, traffic = time.perf_counter(), Traffic()
    with tempfile.TemporaryDirectory() as folder, peak_of(proportional_mb) as shared:
        model = Model(setting.inputs, setting.width)
        trainer = FederatedTrainer(
            algorithm=FedDyn() if setting.stateful else FedAvg(),
            sampler=sampling.RoundRobin() if setting.stateful else sampling.Uniform(),
            max_rounds=setting.rounds or rounds,
            clients_per_round=setting.per_round,
            engine=engine,
            accelerator="cpu",
            devices=setting.processes,
            callbacks=[traffic],
            views=["server", "selected", *(["all"] if setting.stateful else [])],
            default_root_dir=folder,
            enable_progress_bar=False,
        )
        trainer.fit(model, Data(setting.clients, setting.inputs))
        seconds = []
        if trainer.is_global_zero:
            with (trainer.run_dir / "metrics.csv").open() as file:
                seconds = [float(row["time/round_s"]) for row in csv.DictReader(file)]
    memory = [(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, shared[-1], shared[-1] - shared[0])]
    if setting.processes > 1:
        own, memory = memory, [None] * setting.processes
        torch.distributed.all_gather_object(memory, own[0])
    return {
        "first": trainer.is_global_zero,
        "round_s": statistics.median(seconds[min(2, len(seconds) - 1) :] or [0]),
        "sent_mb": traffic.megabytes(),
        "peak_mb": max(peak for peak, _, _ in memory),
        "all_mb": sum(proportional for _, proportional, _ in memory),
        "grown_mb": sum(grown for _, _, grown in memory),
        "total_s": time.perf_counter() - started,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def run(setting: Setting, rounds: int, engine: str, checkout: str) -> dict:
    """Run a setting in a process of its own."""
    command = [sys.executable, __file__, "--engine", engine, "--rounds", str(rounds)]
    command += ["--child", json.dumps(asdict(setting))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = checkout
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
    parser.add_argument("--checkout", default=str(Path(__file__).parents[1]), help="whose fedlight is measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        found = measure(Setting(**json.loads(arguments.child)), arguments.rounds, arguments.engine)
        if found.pop("first"):
            print(json.dumps(found))
        return
    versions = f"torch {version('torch')}, Python {platform.python_version()}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread; {versions}; engine {arguments.engine}")
    print(f"fedlight of {arguments.checkout}")
    for name in arguments.only:
        results: dict[Setting, list[dict]] = {setting: [] for setting in SWEEPS[name]}
        for _ in range(arguments.repeat):
            for setting in SWEEPS[name]:
                results[setting].append(run(setting, arguments.rounds, arguments.engine, arguments.checkout))
        titles = (
            "processes",
            "N",
            "K",
            "P",
            "ms a round",
            "x",
            "MB sent",
            "peak MB",
            "x",
            "all MB",
            "x",
            "grown MB",
            "x",
            "whole run, s",
        )
        print(f"\nagainst {name}\n\n| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
        best = {s: {key: min(r[key] for r in found) for key in found[0]} for s, found in results.items()}
        first = best[SWEEPS[name][0]]
        for setting, b in best.items():
            cells = [f"{n:,}" for n in (setting.processes, setting.clients, setting.per_round, b["parameters"])]
            cells += [f"{1e3 * b['round_s']:.1f}", f"{b['round_s'] / first['round_s']:.2f}", f"{b['sent_mb']:.1f}"]
            for figure in ("peak_mb", "all_mb", "grown_mb"):
                cells += [f"{b[figure]:.0f}", f"{b[figure] / first[figure]:.2f}"]
            cells.append(f"{b['total_s']:.1f}")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
