"""FedAvg and FedAvg+MAN side by side: 20 clients, the embedded digits, under a minute on two cores.

python examples/demo.py [OUTPUT_FOLDER]

Prints a table of both runs, with the curvature of the loss at the end, and the paths of the pictures.
"""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fedlight import MAN, Classifier, FederatedTrainer, HessianSpectrum, ImageData
from fedlight.analysis.pictures import draw_density
from fedlight.data import DirichletClients
from fedlight.models import MLP
from fedlight.run.loggers import read_metrics

METHODS = {"FedAvg": 0.0, "FedAvg+MAN": 0.15}

ROUNDS = 40


def run(name: str, zeta: float, root: Path) -> tuple[FederatedTrainer, HessianSpectrum]:
    """Train one method and measure its curvature; both start from the same weights and see the same batches."""
    torch.manual_seed(0)
    model = Classifier(
        MLP(in_features=64, hidden=[128, 64], num_classes=10),
        num_classes=10,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=1e-3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99),
    )
    spectrum = HessianSpectrum(every_n_rounds=10, top_k=3)
    data = ImageData("digits", num_clients=20, partitioner=DirichletClients(alpha=0.1), batch_size=16)
    trainer = FederatedTrainer(
        max_rounds=ROUNDS,
        clients_per_round=0.25,
        local_epochs=5,
        gradient_clip_val=10.0,
        callbacks=[MAN(zeta=zeta), spectrum],  # with zeta=0 it measures the norms and changes nothing
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        name=name,
    )
    print(f"{name}:")
    trainer.fit(model, data)
    return trainer, spectrum


def picture(runs: dict[str, list[dict[str, float]]], layers: list[str], path: Path) -> None:
    """Accuracy and activation norms over rounds, readable in black and white."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, rows), style in zip(runs.items(), ("--", "-"), strict=True):
        rounds = [row["round"] + 1 for row in rows]
        left.plot(rounds, [100 * row["val/accuracy"] for row in rows], style, color="black", label=name)
        for layer, color in zip(layers, ("black", "gray"), strict=False):
            right.plot(rounds, [row[layer] for row in rows], style, color=color, label=f"{name}, {layer[4:]}")
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
    """Run both methods, print the table, draw the picture."""
    torch.set_num_threads(1)  # a network this small runs no faster on a second thread
    found = {name: run(name, zeta, root) for name, zeta in METHODS.items()}
    trainers = {name: trainer for name, (trainer, _) in found.items()}
    runs = {name: read_metrics(Path(str(trainer.log_dir)) / "metrics.csv") for name, trainer in trainers.items()}
    layers = [key for key in runs["FedAvg"][-1] if key.startswith("man/")]
    table = Table(title=f"digits, 20 clients, Dirichlet(0.1), {ROUNDS} rounds")
    columns = {"accuracy (%)": "val/accuracy", "accuracy, all (%)": "val/accuracy_all", "val loss": "val/loss"}
    columns |= {layer: layer for layer in layers}
    columns |= {"λ_max": "hessian/lambda_max", "trace": "hessian/trace"}
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="right")
    for name, rows in runs.items():
        final = {column: rows[-1][key] * (100 if "%" in column else 1) for column, key in columns.items()}
        table.add_row(name, *(f"{v:.2f}" if "%" in column or v > 5 else f"{v:.4f}" for column, v in final.items()))
    Console(width=110).print(table)
    picture(runs, layers, root / "demo.png")
    draw_density({name: spectrum.results["server"] for name, (_, spectrum) in found.items()}, root / "density.png")
    pictures = [p for t in trainers.values() for p in sorted(Path(str(t.log_dir)).glob("plots/*.png"))]
    print("pictures:", root / "demo.png", root / "density.png", *pictures)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/demo"))
