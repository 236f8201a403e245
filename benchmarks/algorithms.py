"""Every algorithm, with and without MAN, on the embedded digits: accuracy, rounds, communication and seconds.

    python benchmarks/algorithms.py
    python benchmarks/algorithms.py --rounds 10 --seeds 1 --algorithms FedAvg FedDyn FedSAM

20 clients whose classes are drawn from Dirichlet(0.3), 5 of them in each round. The settings are sensible ones for
this small problem, not tuned ones: read the table for what runs and what it costs, and the accuracies with care.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fedlight import MAN, Classifier, FederatedTrainer, ImageData, algorithms
from fedlight.algorithms.fedmuon import Muon
from fedlight.data import DirichletClients
from fedlight.models import MLP
from fedlight.run.loggers import read_metrics

# Where the default, which is that of much longer image training, does not suit 30 rounds of 5 steps.
SETTINGS = {
    "FedProx": {"mu": 0.01},
    "FedDyn": {"alpha": 0.1},
    "FedDC": {"alpha": 0.1},
    "FedSpeed": {"alpha": 0.1, "rho": 0.05},
    "FedSMOO": {"alpha": 0.1, "rho": 0.05},
    "FedLESAM_D": {"alpha": 0.1},
    "FedGloSS": {"rho": 0.05},
    "FedCM": {"alpha": 0.3},
    "MoFedSAM": {"alpha": 0.3},
    "FedWMSAM": {"alpha": 0.3},
    "FedAvgM": {"server_lr": 0.5, "momentum": 0.7},
    "FedAdam": {"server_lr": 0.02},
    "FedYogi": {"server_lr": 0.02},
    "FedAdagrad": {"server_lr": 0.05},
    "FedASAM": {"rho": 0.2},
}
OPTIMIZERS = {"FedAdamW": partial(torch.optim.AdamW, lr=0.01), "FedMuon": partial(Muon, lr=0.05, adamw_lr=0.01)}
NAMES = [name for name in algorithms.__all__ if name not in ("Algorithm", "Message")]


def network(name: str) -> nn.Module:
    """A dense network; with BatchNorm for the method that is about it."""
    if name == "FedBN":
        layers = [nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)
    return MLP(in_features=64, num_classes=10, hidden=[64])


def run(name: str, man: bool, seed: int, root: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train once; returns the figures of the table."""
    torch.manual_seed(seed)
    optimizer = OPTIMIZERS.get(name, partial(torch.optim.SGD, lr=0.1))
    model = Classifier(network(name), num_classes=10, optimizer=optimizer)
    data = ImageData("digits", num_clients=20, partitioner=DirichletClients(0.3), batch_size=16, seed=seed)
    trainer = FederatedTrainer(
        algorithm=getattr(algorithms, name)(**SETTINGS.get(name, {})),
        callbacks=[MAN(zeta=options.zeta)] if man else [],
        max_rounds=options.rounds,
        clients_per_round=options.clients_per_round,
        local_epochs=options.local_epochs,
        gradient_clip_val=10.0,
        client_val_every_n_rounds=0,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        default_root_dir=root,
        name=f"{name}-{'MAN' if man else 'plain'}",
        seed=seed,
    )
    began = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - began
    rows = read_metrics(Path(str(trainer.log_dir)) / "metrics.csv")
    reached = [row["round"] + 1 for row in rows if row["val/accuracy"] >= options.target]
    return {
        "server": 100 * rows[-1]["val/accuracy"],
        "all": 100 * rows[-1]["val/accuracy_all"],
        "reached": reached[0] if reached else float("inf"),
        "mb": sum(row["comm/down_mb"] + row["comm/up_mb"] for row in rows),
        "seconds": seconds,
    }


def summary(runs: list[dict[str, float]], rounds: int) -> list[str]:
    """One row of the table: mean and standard deviation over the seeds."""

    def spread(key: str) -> str:
        values = [r[key] for r in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.1f} ± {deviation:.1f}"

    late = any(r["reached"] == float("inf") for r in runs)
    reached = f"{rounds}+" if late else f"{statistics.mean(r['reached'] for r in runs):.0f}"
    means = [statistics.mean(r[key] for r in runs) for key in ("mb", "seconds")]
    return [spread("server"), spread("all"), reached, *(f"{mean:.1f}" for mean in means)]


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="communication rounds (30)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (3)")
    parser.add_argument("--clients-per-round", type=int, default=5, help="clients of a round, of 20 (5)")
    parser.add_argument("--local-epochs", type=int, default=1, help="local epochs (1)")
    parser.add_argument("--zeta", type=float, default=0.15, help="weight of MAN (0.15)")
    parser.add_argument("--target", type=float, default=0.85, help="accuracy whose first round is shown (0.85)")
    parser.add_argument("--algorithms", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help="by default all")
    return parser.parse_args()


def main() -> None:
    """Run everything and print the table."""
    options, console = parse(), Console(width=110)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    table = Table(title=f"digits, 20 clients, Dirichlet(0.3), {options.rounds} rounds, {options.seeds} seeds")
    target = f"rounds to {100 * options.target:.0f} %"
    for column in ("method", "accuracy (%)", "accuracy, all (%)", target, "sent (MB)", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    with tempfile.TemporaryDirectory() as root:
        for name in options.algorithms:
            for man in (False, True):
                label = name + ("+MAN" if man else "")
                runs = [run(name, man, seed, Path(root), options) for seed in range(options.seeds)]
                row = summary(runs, options.rounds)
                table.add_row(label, *row)
                console.print(f"{label:16}", *(f"{cell:>12}" for cell in row))
    console.print(table)


if __name__ == "__main__":
    main()
