"""What many clients, and tensors on a device, come to as numbers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlight.run.names import client_names, smaller_is_better


def over_clients(found: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """The spread over the clients of each metric that they have, and what the worst of them has."""
    out: dict[str, float] = {}
    for name, short in client_names(found).items():
        each = torch.tensor([metrics[name] for metrics in found.values() if name in metrics], dtype=torch.float64)
        figures = {"mean": each.mean(), "std": each.std(unbiased=False), "min": each.min(), "max": each.max()}
        figures |= {f"p{percent}": each.quantile(percent / 100) for percent in (10, 90)}
        out |= {f"clients/{short}_{figure}": float(value) for figure, value in figures.items()}
        out[f"clients/worst_{short}"] = out[f"clients/{short}_{'max' if smaller_is_better(name) else 'min'}"]
    return out


def as_floats(row: Mapping[str, Tensor | float]) -> dict[str, float]:
    """A row as Python numbers; tensors are brought from the device together."""
    tensors = {k: v for k, v in row.items() if isinstance(v, Tensor)}
    values: list[float] = []
    if tensors:
        devices = {v.device for v in tensors.values()}
        same = {k: (v if len(devices) == 1 else v.cpu()).detach().double().reshape(()) for k, v in tensors.items()}
        values = torch.stack(list(same.values())).tolist()
    numbers = dict(zip(tensors, values, strict=True))
    return {k: numbers[k] if k in numbers else float(v) for k, v in row.items()}
