"""FedAvg and FedAvg+MAN side by side, three seeds each: the embedded digits, 20 clients, 40 % of the labels drawn anew.

python examples/demo.py [OUTPUT_FOLDER]

Under a minute on two cores. Prints a table of both, with the curvature of the loss at the end, and the paths of the
pictures. Learning rate, weight decay and ζ come from benchmarks/demo_search.py, which searches one grid for both
methods: docs/demo.md.
"""

import logging
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table

from fedlight import MAN, Classifier, FederatedTrainer, HessianSpectrum, ImageData
from fedlight.analysis.pictures import draw_density
from fedlight.data import DirichletClients
from fedlight.models import MLP
from fedlight.run.loggers import read_metrics

METHODS = {
    "FedAvg": {"lr": 0.1, "weight_decay": 1e-3, "zeta": 0.0},
    "FedAvg+MAN": {"lr": 0.1, "weight_decay": 0.0, "zeta": 0.5},
}
SEEDS = (3, 4, 5)  # the search had 0, 1 and 2
ROUNDS = 40
CLIENTS, PER_ROUND, EPOCHS, BATCH, GAMMA, CLIP = 20, 10, 10, 32, 0.94, 10.0


class NoisyDigits(ImageData):
    """The embedded digits with label skew; a fifth is held out, and of the rest 40 % of the labels are drawn anew."""

    def __init__(self) -> None:
        skew = DirichletClients(alpha=0.3)
        super().__init__("digits", num_clients=CLIENTS, partitioner=skew, batch_size=BATCH, val_fraction=0.2)

    def setup(self, stage: str | None = None) -> None:
        if self.partition is None:
            super().setup(stage)
            generator = torch.Generator().manual_seed(0)
            rows = self._train.positions(torch.arange(len(self._train)))  # what is held out stays as it is
            rows = rows[torch.rand(len(rows), generator=generator) < 0.4]
            self._train.targets[rows] = torch.randint(10, (len(rows),), generator=generator)


def make_net(seed: int) -> MLP:
    """The network, with the weights that this seed draws."""
    torch.manual_seed(seed)
    return MLP(in_features=64, hidden=[128, 64], num_classes=10)


def train(
    method: dict[str, float], seed: int, root: Path, name: str, callbacks: Sequence[Callback] = (), **settings: bool
) -> tuple[FederatedTrainer, ImageData]:
    """Train one method; the seed draws weights, clients and batches, the same for both methods."""
    model = Classifier(
        make_net(seed),
        num_classes=10,
        optimizer=lambda params: torch.optim.SGD(params, lr=method["lr"], weight_decay=method["weight_decay"]),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, GAMMA),
    )
    trainer = FederatedTrainer(
        max_rounds=ROUNDS,
        clients_per_round=PER_ROUND,
        local_epochs=EPOCHS,
        gradient_clip_val=CLIP,
        callbacks=[MAN(zeta=method["zeta"]), *callbacks],  # with zeta=0 MAN measures the norms and changes nothing
        accelerator="cpu",
        devices=1,
        engine="vmap",  # the clients of a round as one batched program
        seed=seed,
        default_root_dir=root,
        name=name,
        check_val_every_n_rounds=2,
        client_val_every_n_rounds=0,
        views=("server",),
        enable_checkpointing=False,
        enable_progress_bar=False,
        **settings,
    )
    data = NoisyDigits()
    trainer.fit(model, data)
    return trainer, data


def one(job: tuple[str, int, Path]) -> tuple[list[dict[str, float]], object, Path]:
    """One run in a process of its own: its rows, the last with the test set's accuracy, its spectrum and its folder."""
    name, seed, root = job
    be_quiet()
    first = seed == SEEDS[0]  # of this one there are pictures
    spectrum = HessianSpectrum(every_n_rounds=ROUNDS, top_k=3, density=first, layerwise=first, max_samples=None)
    trainer, data = train(METHODS[name], seed, root, name, [spectrum], enable_plots=first)
    folder = Path(str(trainer.log_dir))
    rows = read_metrics(folder / "metrics.csv")
    (tested,) = trainer.test(trainer.lightning_module, data, verbose=False)
    rows[-1] |= tested
    return rows, spectrum.results["server"], folder


def be_quiet() -> None:
    """What several processes at a time do: one thread each, and no report of every run."""
    torch.set_num_threads(1)  # a network this small runs no faster on a second thread
    for name in ("lightning.pytorch", "fedlight"):
        logging.getLogger(name).setLevel(logging.WARNING)


def picture(runs: dict[str, list[list[dict[str, float]]]], layers: list[str], path: Path) -> None:
    """Accuracy and activation norms over rounds, means and ranges of the seeds, readable in black and white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, seeds), style in zip(runs.items(), ("--", "-"), strict=True):
        for axes, key, label, color, factor in [(left, "val/accuracy", name, "black", 100)] + [
            (right, layer, f"{name}, {layer[4:]}", color, 1)
            for layer, color in zip(layers, ("black", "gray"), strict=False)
        ]:
            rounds = [i + 1 for i, row in enumerate(seeds[0]) if key in row]
            values = [[factor * row[key] for row in rows if key in row] for rows in seeds]
            axes.plot(rounds, [statistics.mean(v) for v in zip(*values, strict=True)], style, color=color, label=label)
            low, high = zip(*[(min(v), max(v)) for v in zip(*values, strict=True)], strict=True)
            axes.fill_between(rounds, low, high, color=color, alpha=0.12, linewidth=0)
    left.set(xlabel="communication round", ylabel="validation accuracy (%)", title="the server's model")
    right.set(xlabel="communication round", ylabel="mean squared activation", yscale="log")
    right.set_title("what MAN keeps small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8, loc="lower right")
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(root: Path) -> None:
    """Run both methods with three seeds in two processes, print the table, draw the pictures."""
    jobs = [(name, seed, root) for seed in SEEDS for name in METHODS]
    print(f"{len(jobs)} runs of {ROUNDS} rounds, two at a time ...", flush=True)
    # A process that is forked has loaded torch already, which takes as long as a run.
    with ProcessPoolExecutor(2, mp_context=get_context("fork" if sys.platform == "linux" else "spawn")) as pool:
        found = dict(zip(jobs, pool.map(one, jobs), strict=True))
    runs = {name: [found[name, seed, root][0] for seed in SEEDS] for name in METHODS}
    layers = [key for key in runs["FedAvg"][0][-1] if key.startswith("man/")]
    columns = {"test accuracy (%)": "test/accuracy", "λ_1": "hessian/lambda_max", "λ_2": "hessian/lambda_2"}
    columns |= {"λ_3": "hessian/lambda_3", "trace": "hessian/trace"} | {layer: layer for layer in layers}
    last = {name: {c: [rows[-1][k] for rows in seeds] for c, k in columns.items()} for name, seeds in runs.items()}
    table = Table(title=f"digits, 20 clients, 40 % label noise, {ROUNDS} rounds: mean ± deviation of seeds {SEEDS}")
    for column in ("method", *columns):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, figures in last.items():
        table.add_row(name, *(show(v, 100 if "%" in column else 1) for column, v in figures.items()))
    compared = []
    for column in columns:  # seed by seed
        pairs = list(zip(last["FedAvg"][column], last["FedAvg+MAN"][column], strict=True))
        is_share = "%" in column
        compared.append(show([100 * (man - plain) if is_share else man / plain for plain, man in pairs], 1))
    table.add_row("gain, ratios", *compared)
    Console(width=130).print(table)
    picture(runs, layers, root / "demo.png")
    draw_density({name: found[name, SEEDS[0], root][1] for name in METHODS}, root / "density.png")
    pictures = [p for name in METHODS for p in sorted(found[name, SEEDS[0], root][2].glob("plots/*.png"))]
    print("pictures:", root / "demo.png", root / "density.png", *pictures)


def show(values: list[float], factor: float) -> str:
    """Mean ± standard deviation."""
    mean, spread = factor * statistics.mean(values), factor * statistics.stdev(values)
    digits = 1 if abs(mean) > 20 else 2 if abs(mean) > 1 else 3
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/demo"))
