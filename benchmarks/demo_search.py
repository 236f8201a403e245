"""The search behind examples/demo.py: one grid for FedAvg and for FedAvg+MAN, and the best cell by one rule.

usage: python benchmarks/demo_search.py      144 runs of the demo, two at a time

Learning rate, weight decay and the number of rounds are searched for both, ζ besides for MAN. Each cell is trained with
the seeds 0, 1, 2 as the demo trains it; the best mean accuracy on the images that are held out for validation is taken.
The demo has other seeds and reports the test images. What came out is in docs/demo.md.
"""

import importlib.util
import itertools
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

spec = importlib.util.spec_from_file_location("demo", Path(__file__).parents[1] / "examples" / "demo.py")
demo = importlib.util.module_from_spec(spec)
sys.modules["demo"] = demo
spec.loader.exec_module(demo)

LEARNING_RATES, WEIGHT_DECAYS = (0.03, 0.1, 0.3), (0.0, 1e-3, 1e-2, 3e-2)
ZETAS, ROUNDS = (0.0, 0.15, 0.5, 1.5), (20, demo.ROUNDS)
SEEDS = (0, 1, 2)


def accuracies(job: tuple[float, float, float, int]) -> dict[int, float]:
    """Validation accuracy in percent after each of ROUNDS."""
    lr, weight_decay, zeta, seed = job
    demo.be_quiet()
    with tempfile.TemporaryDirectory() as folder:
        method = {"lr": lr, "weight_decay": weight_decay, "zeta": zeta}
        trainer, _ = demo.train(method, seed, Path(folder), "search", enable_plots=False)
        rows = demo.read_metrics(Path(str(trainer.log_dir)) / "metrics.csv")
    return {rounds: 100 * rows[rounds - 1]["val/accuracy"] for rounds in ROUNDS}


def main() -> None:
    """Train all cells, print a row as soon as it is complete, and the best of each ζ."""
    cells = list(itertools.product(LEARNING_RATES, WEIGHT_DECAYS, ZETAS, SEEDS))
    best: dict[float, tuple] = {}
    print("| lr | weight decay | rounds | " + " | ".join(f"ζ = {zeta}" for zeta in ZETAS) + " |\n|" + "---|" * 7)
    with ProcessPoolExecutor(2, mp_context=get_context("fork" if sys.platform == "linux" else "spawn")) as pool:
        found = pool.map(accuracies, cells)
        for lr, weight_decay in itertools.product(LEARNING_RATES, WEIGHT_DECAYS):
            row = {zeta: [next(found) for _ in SEEDS] for zeta in ZETAS}
            for rounds in ROUNDS:
                values = {zeta: [run[rounds] for run in runs] for zeta, runs in row.items()}
                shown = " | ".join(f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in values.values())
                print(f"| {lr} | {weight_decay} | {rounds} | {shown} |", flush=True)
                for zeta, v in values.items():
                    best[zeta] = max(best.get(zeta, (0.0,)), (statistics.mean(v), lr, weight_decay, rounds))
    for zeta, (mean, lr, weight_decay, rounds) in best.items():
        print(f"best with ζ = {zeta}: {mean:.1f} %, lr {lr}, weight decay {weight_decay}, {rounds} rounds")


if __name__ == "__main__":
    main()
