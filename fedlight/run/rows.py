"""A round's row of metrics."""

from collections.abc import Mapping

import torch
from torch import Tensor


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
