"""How far the Hessian's figures on a sample of the data lie from those on all of it: the picture in docs/sharpness.md.

    python benchmarks/hessian_samples.py --data cifar100.npz [--samples 3000] [--picture docs/images/max_samples.png]

The model is the CNN of `configs/paper/cifar100.yaml` after some steps of SGD. Every value of max_samples is tried with
several draws. The trace is estimated with the same random vectors throughout, so that only the sample differs.
"""

import argparse
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedlight.analysis import hessian_operator, layer_blocks, top_eigenvalues, trace
from fedlight.analysis.lanczos import block_eigenvalues
from fedlight.analysis.pictures import drawn, line_style
from fedlight.data.arrays import ArrayDataset
from fedlight.models import CifarCNN, Classifier
from fedlight.seeding import generator


def figures(model: Classifier, data: ArrayDataset, max_samples: int | None, seed: int) -> dict[str, float]:
    """λ_max, the trace, and the mean of the layers' λ_max on a sample."""
    operator = hessian_operator(model, data, max_samples=max_samples, seed=seed)
    largest = top_eigenvalues(operator, generator=generator(0, "start"), smallest=False, tolerance=3e-3)
    total = trace(operator, generator=generator(0, "trace"), tolerance=0.0, max_probes=8)
    layers = block_eigenvalues(operator, layer_blocks(model), generator=generator(0, "layers"), tolerance=3e-3)
    operator.release()
    by_layer = [pairs.values.item() for pairs in layers.values()]
    return {
        "λ_max": largest.values.item(),
        "trace": total.value,
        "λ_max of a layer (mean)": sum(by_layer) / len(by_layer),
    }


def trained(data: ArrayDataset, steps: int) -> Classifier:
    """The CNN after some steps on batches of 50."""
    model = Classifier(net=CifarCNN, num_classes=100)
    optimizer, rng = torch.optim.SGD(model.parameters(), 0.05), generator(0, "order")
    for _ in range(steps):
        x, y = data.batch(torch.randint(len(data), (50,), generator=rng))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    return model.eval()


def draw_sampling_error(
    samples: Sequence[int], errors: Mapping[str, Sequence[Sequence[float]]], path: str | Path
) -> Path:
    """How far a figure measured on a sample lies from that on all data.

    Args:
        samples: values of ``max_samples``.
        errors: for each figure, and each value of ``samples``, the relative errors of several draws.
        path: of the PNG.
    """

    def plot(figure: Any) -> None:
        axes = figure.subplots()
        for index, (name, draws) in enumerate(errors.items()):
            rms = [(sum(e * e for e in errs) / len(errs)) ** 0.5 for errs in draws]
            axes.plot(samples, [100 * e for e in rms], label=name, **line_style(index))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(list(samples), [f"{count:,}" for count in samples])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [m * 10**e for e in range(-6, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel("max_samples")
        axes.set_ylabel("error against all samples (%, root mean square)")
        axes.set_title("How many samples are enough")
        axes.legend()

    return drawn(path, plot, (6, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an .npz with x_train and y_train")
    parser.add_argument("--samples", type=int, default=3000, help="what counts as all of the data")
    parser.add_argument("--max-samples", type=int, nargs="+", default=[100, 200, 500, 1000])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--picture", default="docs/images/max_samples.png")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with np.load(args.data) as file:
        images = torch.tensor(file["x_train"][: args.samples]).permute(0, 3, 1, 2).float() / 255
        labels = torch.tensor(file["y_train"][: args.samples]).long()
    data = ArrayDataset((images - images.mean()) / images.std(), labels)
    model, start = trained(data, args.steps), time.perf_counter()
    exact = figures(model, data, None, 0)
    print(f"all {args.samples} samples, {time.perf_counter() - start:.0f} s: {exact}", flush=True)
    errors: dict[str, list[list[float]]] = {name: [] for name in exact}
    for count in args.max_samples:
        start = time.perf_counter()
        draws = [figures(model, data, count, seed) for seed in range(args.draws)]
        for name, value in exact.items():
            errors[name].append([draw[name] / value - 1 for draw in draws])
        rms = {name: f"{100 * np.sqrt(np.mean(np.square(found[-1]))):.1f} %" for name, found in errors.items()}
        print(f"max_samples {count}: {rms}, {(time.perf_counter() - start) / args.draws:.0f} s each", flush=True)
    print(draw_sampling_error(args.max_samples, errors, Path(args.picture)))


if __name__ == "__main__":
    main()
