"""Run folders as a run leaves them, with numbers that can be checked by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

MAN = {"class_path": "fedlight.MAN", "init_args": {"zeta": 0.15, "layers": None}}


def config(
    algorithm: str = "FedAvg",
    seed: int = 0,
    alpha: float = 0.3,
    callbacks: list[dict] | None = None,
    perturbation: dict | None = None,
    **trainer: Any,
) -> dict[str, Any]:
    return {
        "seed_everything": seed,
        "trainer": {"max_rounds": 3, "callbacks": callbacks, "name": "x", "default_root_dir": "r", **trainer},
        "algorithm": {"class_path": f"fedlight.{algorithm}", "init_args": {"server_lr": 1.0}},
        "perturbation": perturbation,
        "model": {"class_path": "fedlight.Classifier", "init_args": {"num_classes": 10}},
        "data": {
            "class_path": "fedlight.ImageData",
            "init_args": {
                "source": "digits",
                "partitioner": {"class_path": "fedlight.data.DirichletClients", "init_args": {"alpha": alpha}},
            },
        },
        "ckpt_path": None,
    }


def write_run(
    path: Path,
    accuracy: list[float],
    settings: dict[str, Any] | None = None,
    columns: dict[str, list[float]] | None = None,
    finished: bool = True,
) -> Path:
    """A run with one round for each accuracy; ``columns`` holds other metrics by round."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("# lightning\n" + yaml.safe_dump(settings or config()))
    rows = [
        {
            "round": i,
            "val/accuracy": value,
            "val/loss": 1 - value,
            "train/loss": 2 - value,
            "comm/down_mb": 1.5,
            "comm/up_mb": 0.5,
            "time/round_s": 2.0,
            **{name: values[i] for name, values in (columns or {}).items()},
        }
        for i, value in enumerate(accuracy)
    ]
    with (path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["round"])
        writer.writeheader()
        writer.writerows(rows)
    if finished:
        versions = {"fedlight": "0.1.0", "torch": "2", "lightning": "2", "python": "3"}
        summary = {"final": rows[-1], "rounds": len(rows), "versions": versions, "device": "cpu"}
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def write_study(root: Path) -> Path:
    """FedAvg and FedDyn, each with and without MAN, two seeds, two settings; and a central run."""
    final = {"FedAvg": 0.5, "FedDyn": 0.6}
    for alpha in (0.3, 0.6):
        for algorithm, base in final.items():
            for man in (False, True):
                for seed in (0, 1):
                    last = base + 0.1 * man + 0.02 * seed + (alpha - 0.3) / 10
                    settings = config(algorithm, seed, alpha, [MAN] if man else None)
                    name = f"{algorithm}{'-man' if man else ''}-{alpha}"
                    columns = {"clients/accuracy_mean": [0.2, 0.3, last], "clients/accuracy_p10": [0.1, 0.2, last / 2]}
                    columns |= {"clients/loss_mean": [3, 2, 1 - last], "clients/loss_max": [5, 4, 2 - last]}
                    write_run(root / name / f"version_{seed}", [0.2, 0.4, last], settings, columns)
    write_run(root / "central" / "version_0", [0.5, 0.7, 0.9], config("FedDyn", centralized=True))
    return root
