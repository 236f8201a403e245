"""What a round costs: engines, MAN, SAM, clients per round and model size, on the CPU or on a GPU.

usage: python benchmarks/round.py [--device cpu|gpu] [--precision 32-true|bf16-mixed] [--repeat 3] [--only NAME ...]

The workload is the paper's CIFAR-100 network and setting on random images: on a GPU ten clients of 500 images of
3x32x32, five epochs, batches of 50; on the CPU four clients of 100 images and one epoch. The plain loop is the same
training written by hand, with the data on the device. Settings take turns, each in a process of its own; the table has
the best of the repeats. ``besides`` is what a round takes besides local training and evaluation: sampling, exchange,
aggregation, state, logging and checkpoints (the median; those are written in the background). FLOP/s are counted from
the network's forward and backward passes, SAM's second ones included, and compared with what a large matrix product
reaches on the same device in the same precision.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fedlight.data.arrays import ArrayDataset
from fedlight.data.augment import BatchTransform
from fedlight.data.datamodule import FederatedDataModule
from fedlight.penalties.man import MAN
from fedlight.perturbations.sam import SAM
from fedlight.run.loggers import read_metrics
from fedlight.trainer import FederatedTrainer

BATCH = 50


@dataclass(frozen=True)
class Setting:
    """One line of the table.

    Attributes:
        engine: an engine, or ``loop`` for the loop by hand.
        clients: K.
        images: of each client.
        epochs: local epochs.
        width: channels and units, in units of the paper's network.
        man: with MAN.
        sam: with SAM.
        compile: with ``trainer.compile``.
        processes: devices.
        threads: of each process; 0 for the cores divided among the processes.
        toy: a linear model on clients of four images each, so that little but fedlight's own work is left.
    """

    engine: str = "eager"
    clients: int = 10
    images: int = 500
    epochs: int = 5
    width: float = 1.0
    man: bool = True
    sam: bool = False
    compile: bool = False
    processes: int = 1
    threads: int = 0
    toy: bool = False


def settings(device: str) -> dict[str, Setting]:
    """All lines, by name."""
    if device == "cpu":
        base = Setting(clients=4, images=100, epochs=1)
        return {
            "loop, all cores": replace(base, engine="loop", man=False),
            "eager, all cores": replace(base, man=False),
            "eager, a process a core": replace(base, man=False, processes=os.cpu_count() or 1),
            "eager, MAN": base,
            "eager, MAN, SAM": replace(base, sam=True),
            "vmap": replace(base, engine="vmap", man=False),
            "toy model": Setting(clients=10, images=4, epochs=1, man=False, threads=1, toy=True),
        }
    graph = Setting(engine="cuda_graph")
    return {
        "loop": Setting(engine="loop", man=False),
        "eager": Setting(man=False),
        "eager, MAN": Setting(),
        "eager, MAN, SAM": Setting(sam=True),
        "cuda_graph": replace(graph, man=False),
        "cuda_graph, MAN": graph,
        "cuda_graph, MAN, SAM": replace(graph, sam=True),
        "cuda_graph, MAN, compiled": replace(graph, compile=True),
        "cuda_graph, MAN, K=1": replace(graph, clients=1),
        "cuda_graph, MAN, K=30": replace(graph, clients=30),
        "cuda_graph, MAN, half as wide": replace(graph, width=0.5),
        "cuda_graph, MAN, twice as wide": replace(graph, width=2.0),
        "toy model, eager": Setting(clients=10, images=4, epochs=1, man=False, toy=True),
    }


def network(width: float, toy: bool = False) -> nn.Sequential:
    """The paper's CIFAR-100 network, wider or narrower; or a linear model."""
    torch.manual_seed(0)
    if toy:
        return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 100))
    c, h, g = (round(n * width) for n in (64, 384, 192))
    return nn.Sequential(
        *(nn.Conv2d(3, c, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(c, c, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(25 * c, h), nn.ReLU(), nn.Linear(h, g), nn.ReLU(), nn.Linear(g, 100)),
    )


class Model(LightningModule):
    """Cross-entropy, SGD with weight decay."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.net = network(setting.width, setting.toy)

    def training_step(self, batch, batch_idx):
        """Cross-entropy."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        """The paper's."""
        return torch.optim.SGD(self.parameters(), lr=0.01, weight_decay=1e-3)


class Data(FederatedDataModule):
    """Random images, augmented as in the paper."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(BATCH)
        rng, n = torch.Generator().manual_seed(0), setting.clients * setting.images
        transform = BatchTransform([0.5] * 3, [0.25] * 3, flip=0.5, crop_padding=4)
        images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=rng)
        stored = ArrayDataset(images, torch.randint(0, 100, (n,), generator=rng), transform=transform)
        self.num_clients = setting.clients
        self.datasets = [stored.view(rows, transform) for rows in torch.arange(n).split(setting.images)]

    def client_dataset(self, client):
        """An equal part."""
        return self.datasets[client]


def by_hand(setting: Setting, rounds: int, device: torch.device, precision: str) -> list[float]:
    """Seconds of each round of a loop written by hand, with gradients clipped as in the trainer."""
    data, server = Data(setting), network(setting.width).to(device)
    datasets, net, seconds = [d.to(device) for d in data.datasets], copy.deepcopy(server), []
    cast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
    for _ in range(rounds):
        started = time.perf_counter()
        models = []
        for dataset in datasets:
            net.load_state_dict(server.state_dict())
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01, weight_decay=1e-3)
            for _ in range(setting.epochs):
                order = torch.randperm(len(dataset))
                draws = {k: v.to(device) for k, v in dataset.draw(len(dataset), torch.Generator()).items()}
                for i, rows in enumerate(order.to(device).split(BATCH)):
                    part = {k: v[i * BATCH : i * BATCH + len(rows)] for k, v in draws.items()}
                    x, y = dataset.batch(rows, part)
                    optimizer.zero_grad()
                    with cast:
                        loss = F.cross_entropy(net(x), y)
                    loss.backward()
                    nn.utils.clip_grad_norm_(net.parameters(), 10.0)
                    optimizer.step()
            models.append({k: v.clone() for k, v in net.state_dict().items()})
        server.load_state_dict({k: torch.stack([m[k] for m in models]).mean(0) for k in models[0]})
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def with_fedlight(setting: Setting, rounds: int, device: torch.device, precision: str) -> list[dict] | None:
    """The rows of ``metrics.csv``; None in any process but the first."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = FederatedTrainer(
            perturbation=SAM(0.05) if setting.sam else None,
            max_rounds=rounds,
            clients_per_round=setting.clients,
            local_epochs=setting.epochs,
            engine=setting.engine,
            compile=setting.compile,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=setting.processes,
            precision=precision,
            gradient_clip_val=10.0,
            callbacks=[MAN(0.15)] if setting.man else [],
            views=["server"],
            default_root_dir=folder,
            enable_progress_bar=False,
        )
        trainer.fit(Model(setting), Data(setting))
        if not trainer.is_global_zero:
            return None
        return read_metrics(trainer.run_dir / "metrics.csv")


def flop(setting: Setting) -> float:
    """FLOP of a round: forward and backward passes of the network."""
    net, x = network(setting.width, setting.toy), torch.randn(BATCH, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    steps = setting.clients * setting.epochs * setting.images / BATCH
    return counter.get_total_flops() * steps * (2 if setting.sam else 1)


def peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def child(arguments: argparse.Namespace) -> None:
    """Run one setting in this process and print its result."""
    setting = Setting(**json.loads(arguments.child))
    device = torch.device("cuda" if arguments.device == "gpu" else "cpu")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = (
        "tf32" if arguments.tf32 else "ieee"
    )
    if device.type == "cpu":
        torch.set_num_threads(setting.threads or max(1, (os.cpu_count() or 1) // setting.processes))
    besides, rounds = None, arguments.rounds * (50 if setting.toy else 1)
    if setting.engine == "loop":
        seconds = by_hand(setting, rounds, device, arguments.precision)
    else:
        rows = with_fedlight(setting, rounds, device, arguments.precision)
        if rows is None:
            return
        seconds = [row["time/train_s"] + row["time/aggregate_s"] for row in rows]
        rest = [r["time/round_s"] - r["time/train_s"] - r["time/evaluate_s"] + r["time/save_s"] for r in rows[1:]]
        besides = statistics.median(rest)
    result = {"round_s": statistics.median(seconds[1:]), "first_s": seconds[0], "flop": flop(setting)}
    result |= {"besides_s": besides, "peak": peak(device, arguments.precision)}
    print("RESULT " + json.dumps(result), flush=True)


def run(setting: Setting, arguments: argparse.Namespace) -> dict:
    """Run one setting in a process of its own.

    Raises:
        RuntimeError: if it fails.
    """
    command = [sys.executable, __file__, "--rounds", str(arguments.rounds), "--device", arguments.device]
    command += ["--precision", arguments.precision, "--child", json.dumps(asdict(setting))]
    command += ["--tf32"] if arguments.tf32 else []
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONWARNINGS": "ignore"}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no result"])[-1])
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    """Run all settings in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--tf32", action="store_true", help="let float32 products use TensorFloat-32")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    wanted = {n: s for n, s in settings(arguments.device).items() if not arguments.only or n in arguments.only}
    results: dict[str, list[dict]] = {name: [] for name in wanted}
    for _ in range(arguments.repeat):
        for name, setting in wanted.items():
            try:
                results[name].append(run(setting, arguments))
            except RuntimeError as error:
                print(f"{name} is left out: {error}", flush=True)
    device = (
        torch.cuda.get_device_name() if arguments.device == "gpu" else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    precision = arguments.precision + (" (TF32)" if arguments.tf32 else "")
    best_peak = max(r["peak"] for found in results.values() for r in found)
    print(f"\n{device}; {precision}; torch {version('torch')}; a large product: {best_peak / 1e9:,.0f} GFLOP/s\n")
    print("| | ms a round | x the first line | besides, ms | first round, ms | GFLOP/s | of the product |")
    print("|---|---|---|---|---|---|---|")
    first = None
    for name, found in results.items():
        if not found:
            continue
        best = min(found, key=lambda r: r["round_s"])
        first = first or best["round_s"]
        speed = best["flop"] / best["round_s"]
        cells = [name, f"{1e3 * best['round_s']:.1f}", f"{best['round_s'] / first:.2f}"]
        cells.append("" if best["besides_s"] is None else f"{1e3 * min(r['besides_s'] for r in found):.2f}")
        cells += [f"{1e3 * best['first_s']:.0f}", f"{speed / 1e9:,.0f}", f"{100 * speed / best_peak:.0f} %"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
