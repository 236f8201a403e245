"""What a first GPU should tell, in one command: checks, engines compared bit for bit, speed, accuracy, memory.

usage: python benchmarks/gpu.py [--out gpu] [--minutes 8] [--only NAME ...] [--dry-run]

It writes ``<out>.json`` and ``<out>.md``, a Markdown table, anew after each part, so that what is found is kept when
the time is up; parts that the time does not suffice for are listed. Each part runs in a process of its own. The parts:

checks     the tests that need a GPU (`make test-gpu`): engines against eager to the bit, recordings, memory, streams
speed      a round of the paper's setting (ten clients of 500 random images 3x32x32, five epochs, batches of 50) in each
           engine: eager, cuda_graph with 1, 4, 10 and 16 slots, compiled, bf16, MAN, SAM; FLOP/s, share of the peak of
           a large product, most memory taken, and whether the model is eager's to the bit
accuracy   50 rounds of FedAvg and FedAvg+MAN, on images made of 100 classes
pfl        pfl-research's CIFAR-10 setting on such images: 1,000 users of 50, 50 a round, one epoch in batches of 10

``--dry-run`` does all of it on a CPU, tiny, with work done anew in the place of CUDA graphs: it shows that the command
works, and its figures mean nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from round import Setting, flop, network, peak

from fedlight.algorithms.fedavg import FedAvg
from fedlight.data.arrays import ArrayDataset
from fedlight.data.augment import BatchTransform
from fedlight.data.datamodule import FederatedDataModule
from fedlight.engines.cuda_graph import CudaGraph
from fedlight.models import Classifier, SmallCNN
from fedlight.penalties.man import MAN
from fedlight.perturbations.sam import SAM
from fedlight.run.loggers import read_metrics
from fedlight.trainer import FederatedTrainer

ROOT = Path(__file__).parents[1]
SPEED = {
    "eager": {},
    "cuda_graph, 1 slot": {"slots": 1},
    "cuda_graph, 4 slots": {"slots": 4},
    "cuda_graph, 10 slots": {"slots": 10},
    "cuda_graph, 16 slots, 16 clients": {"slots": 16, "clients": 16},
    "cuda_graph, compiled": {"slots": 10, "compile": True},
    "cuda_graph, bf16-mixed": {"slots": 10, "precision": "bf16-mixed"},
    "cuda_graph, compiled, bf16-mixed": {"slots": 10, "compile": True, "precision": "bf16-mixed"},
    "cuda_graph, MAN": {"slots": 10, "man": True},
    "cuda_graph, SAM": {"slots": 10, "sam": True},
    "cuda_graph, MAN, SAM": {"slots": 10, "man": True, "sam": True},
    "cuda_graph, unequal clients": {"slots": 10, "unequal": True},
}
PARTS = {
    "checks": {},
    **{f"speed: {name}": setting for name, setting in SPEED.items()},
    "accuracy: FedAvg": {"rounds": 50},
    "accuracy: FedAvg+MAN": {"rounds": 50, "man": True},
    "pfl: cuda_graph": {"rounds": 20, "pfl": True},
}
COLUMNS = ("ms a round", "first round, ms", "GFLOP/s", "of the peak", "memory, MB", "eager's bits", "accuracy, %")


class Images(FederatedDataModule):
    """Images of classes: a pattern of each class in noise, so that there is something to learn."""

    def __init__(self, clients: int, each: int, classes: int, batch_size: int, unequal: bool, augment: bool) -> None:
        super().__init__(batch_size)
        rng, held_out = torch.Generator().manual_seed(0), 10 * classes
        sizes = [each // 2 + each * i // clients if unequal else each for i in range(clients)]
        y = torch.randint(0, classes, (sum(sizes) + held_out,), generator=rng)
        patterns = torch.randn(classes, 3, 8, 8, generator=rng).repeat_interleave(4, 2).repeat_interleave(4, 3)
        x = 128 + 24 * patterns[y] + 48 * torch.randn(len(y), 3, 32, 32, generator=rng)
        plain = BatchTransform([0.5] * 3, [0.25] * 3)
        transform = BatchTransform([0.5] * 3, [0.25] * 3, flip=0.5, crop_padding=4) if augment else plain
        stored = ArrayDataset(x.clamp(0, 255).to(torch.uint8), y, transform=transform)
        *rows, last = torch.arange(len(y)).split([*sizes, held_out])
        self.num_clients = clients
        self._clients = [stored.view(r, transform) for r in rows]
        self._val = stored.view(last, plain)

    def client_dataset(self, client: int) -> ArrayDataset:
        """Client ``client``'s images."""
        return self._clients[client]

    def val_dataset(self) -> ArrayDataset:
        """Images of the same classes."""
        return self._val


def train(
    setting: dict, dry: bool, engine: str | CudaGraph, rounds: int
) -> tuple[torch.Tensor, list[dict], list[float]]:
    """The model ``[P]`` after some rounds, the rows of ``metrics.csv``, and the device's most memory in MB."""
    pfl, clients = setting.get("pfl", False), setting.get("clients", 10)
    population = (4 if dry else 1000) if pfl else 100 if "rounds" in setting else clients
    classes, each, batch = (10, 50, 10) if pfl else (100, 20 if dry else 500, 50)
    data = Images(population, each, classes, batch, setting.get("unequal", False), augment=not pfl)
    torch.manual_seed(0)
    net = SmallCNN(num_classes=10) if pfl else network(0.125 if dry else 1.0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = FederatedTrainer(
            algorithm=FedAvg(),
            perturbation=SAM(0.05) if setting.get("sam") else None,
            callbacks=[MAN(0.15)] if setting.get("man") else [],
            max_rounds=rounds,
            clients_per_round=min(population, 50) if pfl else clients,
            local_epochs=1 if pfl or dry else 5,
            accelerator="cpu" if dry else "gpu",
            devices=1,
            precision=setting.get("precision", "32-true"),
            gradient_clip_val=10.0,
            engine=engine,
            compile=setting.get("compile", False) and not dry,
            views=["server"],
            client_val_every_n_rounds=0,
            check_val_every_n_rounds=10,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_plots=False,
            enable_checkpointing=False,
        )
        module = Classifier(net, classes, lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=1e-3, fused=True))
        if not dry:
            torch.cuda.reset_peak_memory_stats()
        trainer.fit(module, data)
        taken = 0.0 if dry else torch.cuda.max_memory_allocated() / 1e6
        params = torch.cat([p.detach().flatten().cpu() for p in module.parameters()])
        return params, read_metrics(trainer.run_dir / "metrics.csv"), [taken]


def measure(name: str, setting: dict, dry: bool) -> dict:
    """The figures of one part, by column."""
    torch.backends.cudnn.deterministic = True  # the same kernels in both engines
    device = torch.device("cpu" if dry else "cuda")
    rounds = min(setting.get("rounds", 5), 2 if dry else 1000)
    slots, precision = setting.get("slots"), setting.get("precision", "32-true")
    graph = CudaGraph(slots)
    if dry:
        sys.path.append(str(Path(__file__).parents[1]))
        from tests.engines.tape import Anew

        graph = CudaGraph(slots, Anew)
    params, rows, (taken,) = train(setting, dry, "eager" if name == "speed: eager" else graph, rounds)
    seconds = [row["time/train_s"] + row["time/aggregate_s"] for row in rows]
    typical = statistics.median(seconds[1:])
    found = {"ms a round": 1e3 * typical, "first round, ms": 1e3 * seconds[0], "memory, MB": taken}
    if name.startswith("speed"):
        samples = [
            len(d) for d in Images(setting.get("clients", 10), 500, 100, 50, "unequal" in setting, False)._clients
        ]
        work = Setting(clients=1, images=sum(samples), epochs=5, sam="sam" in setting)
        if not dry:
            found |= {
                "GFLOP/s": flop(work) / typical / 1e9,
                "of the peak": flop(work) / typical / peak(device, precision),
            }
        if name != "speed: eager" and not setting.get("compile"):
            found["eager's bits"] = bool(torch.equal(params, train(setting, dry, "eager", rounds)[0]))
    else:
        found["accuracy, %"] = 100 * next(row["val/accuracy"] for row in reversed(rows) if "val/accuracy" in row)
    return found


def checks(dry: bool, seconds: float) -> dict:
    """The tests that need a GPU; in a dry run only found."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/engines/test_cuda_graph_gpu.py"]
    command += ["--collect-only"] if dry else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1] if lines else done.stderr[-300:], "failed": failed}


def table(found: dict[str, dict]) -> str:
    """All parts as Markdown."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    notes = []
    for name, part in found.items():
        if "summary" in part or "error" in part:
            notes += [f"{name}: {part.get('summary') or part['error']}", *part.get("failed", [])]
            continue
        values = [part.get(column) for column in COLUMNS]
        cells = ["" if v is None else str(v) if isinstance(v, bool) else f"{v:,.3g}" for v in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def run(name: str, dry: bool, seconds: float) -> dict:
    """One part in a process of its own: what fails there stops nothing."""
    if seconds <= 0:
        return {"error": "not run: the time was up"}
    command = [sys.executable, __file__, "--part", name, *(["--dry-run"] if dry else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    try:
        if name == "checks":
            return checks(dry, seconds)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": "stopped: the time was up"}
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not results:
        return {"error": (done.stderr.strip().splitlines() or ["no result"])[-1][:300]}
    return json.loads(results[-1].removeprefix("RESULT "))


def main() -> None:
    """Run all parts and write what they tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="the files' name, without .json and .md")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which what is left is not run")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="parts whose name begins like this")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, without CUDA graphs")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print("RESULT " + json.dumps(measure(arguments.part, PARTS[arguments.part], arguments.dry_run)), flush=True)
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run shows on a CPU that the command works")
    wanted = [n for n in PARTS if not arguments.only or n.startswith(tuple(arguments.only))]
    if not wanted:
        parser.error(f"--only: there is no part that begins so. Parts: {', '.join(PARTS)}")
    device = "a CPU, dry run: the figures mean nothing" if arguments.dry_run else torch.cuda.get_device_name()
    head, found, began = f"{device}; torch {version('torch')}", dict[str, dict](), time.monotonic()
    for name in wanted:
        found[name] = run(name, arguments.dry_run, 60 * arguments.minutes - (time.monotonic() - began))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps({"device": head, "parts": found}, indent=2) + "\n")
        arguments.out.with_suffix(".md").write_text(f"{head}\n\n{table(found)}\n")
        print(f"{name}: {found[name]}", flush=True)
    print(f"\n{head}\n\n{table(found)}")


if __name__ == "__main__":
    main()
