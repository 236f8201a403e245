"""A heat map of aggregators against attacks, and the same as a table, of the runs of sweeps/attacks.yaml.

python benchmarks/attacks.py runs/attacks docs/images/attacks.png
"""

import argparse
from pathlib import Path

from fedlight.report.groups import Stat
from fedlight.report.naming import show
from fedlight.report.runs import find_runs

METRIC = "val/accuracy"


def name(part: object) -> str:
    """A class and what it was made with, as ``Krum(attackers=4, keep=10)``; of several, joined."""
    if not isinstance(part, dict):
        return ", ".join(name(each) for each in part) if isinstance(part, list) and part else "none"
    given = part.get("init_args") or {}
    return str(part["class_path"]).rsplit(".", 1)[-1] + (
        f"({', '.join(f'{k}={show(v)}' for k, v in given.items() if k != 'clients')})" if {*given} - {"clients"} else ""
    )


def cells(folder: Path) -> dict[tuple[str, str], Stat]:
    """Accuracy after the last round by aggregator and attack, over the seeds."""
    found: dict[tuple[str, str], list[float | None]] = {}
    for run in find_runs([folder]):
        path, given = run.config.get("trainer.aggregator.class_path"), "trainer.aggregator.init_args."
        settings = {k.removeprefix(given): v for k, v in run.config.items() if k.startswith(given)}
        if path and path.endswith("GeometricMedian"):
            settings = {}  # as they are by default
        rows = name({"class_path": path, "init_args": settings} if path else None)
        columns = name(run.config.get("trainer.transforms"))
        found.setdefault(("mean" if rows == "none" else rows, columns), []).append(run.last(METRIC))
    return {key: stat for key, values in found.items() if (stat := Stat.of(values)) is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    found = cells(options.folder)
    rows, columns = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    print("| aggregator | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for row in rows:
        stats = [found.get((row, column)) for column in columns]
        shown = ["–" if s is None else f"{100 * s.mean:.1f} ± {100 * (s.std or 0):.1f}" for s in stats]
        print(f"| `{row}` | " + " | ".join(shown) + " |")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    values = [[100 * found[row, column].mean for column in columns] for row in rows]
    image = axes.imshow(values, vmin=10, vmax=100, cmap="cividis", aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < 60 else "black")
    axes.set_xticks(range(len(columns)), [c.replace("(", "\n(") for c in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    figure.colorbar(image, label="accuracy after the last round (%)")
    figure.savefig(options.picture, dpi=150)


if __name__ == "__main__":
    main()
