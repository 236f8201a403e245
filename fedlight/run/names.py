"""What a method is called in tables, pictures and loggers, what metrics say by their names, and what they come to."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedlight.penalties.numbers import KEYS

CENTRAL = "Central"
"""The name of training on pooled data, where no algorithm is at work."""


def method_name(
    algorithm: str, parts: Iterable[str | None] = (), penalties: Iterable[str] = (), centralized: bool = False
) -> str:
    """The class names of a method's parts joined: ``FedDyn+SAM+MAN``. Where data are pooled no algorithm plays a part.

    Of what may be added to it, a perturbation, a personal part and an aggregator, some are None.
    """
    return "+".join([CENTRAL if centralized else algorithm, *filter(None, parts), *penalties])


_PREFERRED = (
    "^val/accuracy$",
    "^(val(id(ation)?)?[/_.])?acc(uracy)?$",
    "^(val(id(ation)?)?[/_.])?loss$",
    "accuracy|(^|[^a-z])acc([^a-z]|$)",
    "loss",
)
_SMALLER = (
    "loss|error|cross_?entropy|perplexity|distance|divergence|hinge|brier|regret|bits_per|"
    "(^|[^a-z])(err|[rn]*msl?e|mae|s?mape|nll|bce|ce|ece|ppl|wer|cer|eer|bp[bcd]|fid|lpips|kl)([^a-z]|$)|"
    "(^|[^a-z])(std|epsilon|drift|penalty)([^a-z]|$)"  # of what fedlight logs, spread, cost and sharpness
    "|^(time|comm|hessian)/"
)


def preferred_metric(logged: Iterable[str]) -> str | None:
    """What to judge a model by: an accuracy, else a loss, else the first of what validation logs; None of nothing."""
    ranks = {name: [bool(re.search(p, name.lower())) for p in _PREFERRED] for name in logged}
    return min(ranks, key=lambda name: [*ranks[name], True].index(True), default=None)


def smaller_is_better(metric: str) -> bool:
    """Whether the name of a metric means a loss, an error, a spread, a cost or a sharpness."""
    return re.search(_SMALLER, metric.lower()) is not None


def is_share(metric: str) -> bool:
    """Whether a metric lies in [0, 1] and is shown in percent."""
    return "accuracy" in metric


def best_row(rows: Iterable[Mapping[str, float]], metric: str) -> Mapping[str, float] | None:
    """The row with the best value of a metric, the first of equals; None if none has one."""
    having = [row for row in rows if not math.isnan(row.get(metric, math.nan))]
    best: Any = min if smaller_is_better(metric) else max
    return best(having, key=lambda row: row[metric], default=None)  # type: ignore[no-any-return]


def dotted(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """A nested configuration by the keys of the command line: ``{"trainer": {"name": "a"}}`` by ``trainer.name``.

    Lists stay as they are; an empty mapping is a value, and so is a schedule.
    """
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value and not value.keys() >= KEYS:
            out |= dotted(value, f"{above}{key}.")
        else:
            out[f"{above}{key}"] = value
    return out


def aggregate(metric: str) -> str | None:
    """What a summary keeps of a metric besides the last value, in W&B's words: the largest accuracy, the least loss."""
    found = None if metric.endswith("_std") else re.search(f"(loss)|{_PREFERRED[3]}", metric.lower())
    return None if found is None else "min,last" if found[1] else "max,last"


def client_names(found: Mapping[int, Mapping[str, float]]) -> dict[str, str]:
    """What each metric of clients is called below ``clients/``: without ``val/`` or ``val_``, never like another."""
    names, logged = dict[str, str](), dict.fromkeys(name for metrics in found.values() for name in metrics)
    for name in sorted(logged, key=lambda name: not name.startswith("val/")):
        names[name] = re.sub("^val[/_](?=.)", "", name)
        while list(names.values()).count(names[name]) > 1:
            names[name] = f"logged_{names[name]}"
    return names


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or nothing where nothing is near."""
    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


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
