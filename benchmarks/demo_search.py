"""The search behind examples/demo.py: one grid for FedAvg and for FedAvg+MAN, and the best cell by one rule.

python benchmarks/demo_search.py      minutes on an idle core

Learning rate, weight decay and the number of rounds are searched for both, ζ besides for MAN. Each cell is trained with
the seeds 0, 1, 2; the best mean accuracy on the images that are held out for validation is taken. The demo has other
seeds and reports the test images. FedAvg is written out here in plain PyTorch, the clients of all seeds and of all ζ at
once, with the demo's data, network and schedule: 144 runs in the time of a few. What came out is in docs/demo.md.
"""

import importlib.util
import itertools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlight.data import ArrayDataset

LEARNING_RATES, WEIGHT_DECAYS = (0.03, 0.1, 0.3), (0.0, 1e-3, 1e-2, 3e-2)
ZETAS, ROUNDS = (0.0, 0.15, 0.5, 1.5), (20, 40)
SEEDS = (0, 1, 2)


def load_demo():
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parents[1] / "examples" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return demo


def forward(weights: list[Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, n, 10] of B networks for their inputs [B, n, 64], and Σ_l mean(a_l²) of each network [B]."""
    norms = torch.zeros(len(x))
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        x = torch.baddbmm(bias[:, None], x, weight.mT)
        if bias is not weights[-1]:
            x = x.relu()
            norms = norms + x.square().mean((1, 2))
    return x, norms


def cell(demo, data: list[dict], lr: float, weight_decay: float) -> dict[int, Tensor]:
    """Validation accuracy in percent [ζ, seed] after each of ROUNDS."""
    zeta, generator, found = torch.tensor(ZETAS), torch.Generator().manual_seed(0), {}
    server = [torch.stack(parts) for parts in zip(*(demo.make_net(seed).parameters() for seed in SEEDS), strict=True)]
    server = [p.detach().repeat(len(ZETAS), *[1] * (p.dim() - 1)) for p in server]  # [ζ·seed, ...]
    K, n = demo.PER_ROUND, data[0]["x"].shape[1]
    for t in range(max(ROUNDS)):
        rate = lr * demo.GAMMA**t
        clients = [torch.randperm(demo.CLIENTS, generator=generator)[:K] for _ in SEEDS]
        x, y = (torch.cat([d[name][c] for d, c in zip(data, clients, strict=True)]) for name in ("x", "y"))
        weights = [p.repeat_interleave(K, 0).requires_grad_() for p in server]  # [ζ·seed·client, ...]
        for _ in range(demo.EPOCHS):
            order = torch.stack([torch.randperm(n, generator=generator) for _ in range(len(x))])
            for rows in order.split(demo.BATCH, 1):
                xb = x.gather(1, rows[..., None].expand(-1, -1, 64)).repeat(len(ZETAS), 1, 1)
                yb = y.gather(1, rows).repeat(len(ZETAS), 1)
                logits, norms = forward(weights, xb)
                losses = F.cross_entropy(logits.mT, yb, reduction="none").mean(1)
                losses = losses + zeta.repeat_interleave(len(x)) / 2 * norms
                gradients = torch.autograd.grad(losses.sum(), weights)
                size = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
                clip = (demo.CLIP / (size + 1e-6)).clamp(max=1)
                with torch.no_grad():
                    for p, g in zip(weights, gradients, strict=True):
                        p.sub_(rate * (g * clip.view(-1, *[1] * (g.dim() - 1)) + weight_decay * p))
        server = [p.detach().unflatten(0, (-1, K)).mean(1) for p in weights]
        if t + 1 in ROUNDS:
            x, y = (torch.stack([d[name] for d in data]) for name in ("x_val", "y_val"))
            hits = forward(server, x.repeat(len(ZETAS), 1, 1))[0].argmax(2) == y.repeat(len(ZETAS), 1)
            found[t + 1] = 100 * hits.float().mean(1).view(len(ZETAS), len(SEEDS))
    return found


def whole(dataset: ArrayDataset) -> tuple[Tensor, Tensor]:
    return dataset.batch(torch.arange(len(dataset)))


def arrays(demo) -> dict[str, Tensor]:
    """What the clients hold, cut to the size of the smallest, and the images for validation."""
    data = demo.NoisyDigits()
    data.setup("fit")
    clients = [whole(data.client_dataset(i)) for i in range(demo.CLIENTS)]
    n = min(len(y) for _, y in clients)
    x, y = (torch.stack([c[k][:n] for c in clients]) for k in (0, 1))
    x_val, y_val = whole(data.val_dataset())
    return {"x": x.flatten(2), "y": y, "x_val": x_val.flatten(1), "y_val": y_val}


def main() -> None:
    demo = load_demo()
    data = [arrays(demo)] * len(SEEDS)
    best: dict[float, tuple] = {}
    print("| lr | weight decay | rounds | " + " | ".join(f"ζ = {zeta}" for zeta in ZETAS) + " |\n|" + "---|" * 7)
    for lr, weight_decay in itertools.product(LEARNING_RATES, WEIGHT_DECAYS):
        for rounds, values in cell(demo, data, lr, weight_decay).items():
            means, spreads = values.mean(1).tolist(), values.std(1).tolist()
            shown = " | ".join(f"{mean:.1f} ± {spread:.1f}" for mean, spread in zip(means, spreads, strict=True))
            print(f"| {lr} | {weight_decay} | {rounds} | {shown} |", flush=True)
            for zeta, mean in zip(ZETAS, means, strict=True):
                best[zeta] = max(best.get(zeta, (0.0,)), (mean, lr, weight_decay, rounds))
    for zeta, (mean, *setting) in best.items():
        print(f"best with ζ = {zeta}: {mean:.1f} %, lr {setting[0]}, weight decay {setting[1]}, {setting[2]} rounds")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
