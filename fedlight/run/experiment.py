"""Which experiment a run is: plain values read off the live objects, the same from YAML and from Python."""

import enum
import hashlib
import inspect
import math
import re
import types
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, Subset

from fedlight.data.arrays import ArrayDataset
from fedlight.data.datamodule import FederatedDataModule, class_counts
from fedlight.data.partitioned import Partition
from fedlight.data.reading import class_names
from fedlight.penalties.numbers import settings_of
from fedlight.run.context import RunContext
from fedlight.seeding import preserved_global_rng, seed_global_rng
from fedlight.server.federation import View

# Not the engine, compile, deterministic or devices: they say how the same function is computed, and a run may move.
_TRAINER = (
    *("local_epochs", "local_steps", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("precision", "tf32", "centralized", "transforms", "aggregator", "personal"),
)
_DATA = (
    *("num_clients", "batch_size", "seed", "partitioner", "collate_fn"),
    *("tokenizer", "max_length", "vocab_size"),
)
_HOW = ("params", "initial_lr", "foreach", "fused", "capturable", "differentiable")
_SAMPLES = 8


def describe(run: RunContext) -> dict[str, Any]:
    """What a run has in common with those that continue it, by nested keys."""
    trainer, module, optimization = run.trainer, run.module, run.schedule
    limit = run.settings["limit_train_batches"]
    hparams = plain({k: v for k, v in module.hparams.items() if not k.startswith("_")})
    groups = optimization.optimizer.param_groups
    return {
        "seed_everything": trainer.seed,
        "algorithm": plain(trainer.algorithm),
        "perturbation": plain(trainer.perturbation),
        "trainer": {
            **{key: plain(run.settings[key]) for key in _TRAINER},
            "limit_train_batches": repr(None if repr(limit) == "1.0" else limit),  # 1 is a batch, 1.0 all of them
            "sampler": plain(trainer.sampler),
            "clients_per_round": trainer.sampler.clients_per_round,
            "callbacks": plain(trainer.penalties),
            "views": [view for view in get_args(View) if view in run.federation.views],
            "buffers": run.federation.clients.buffer_policy,
        },
        "data": _data(run.datamodule),
        "model": {
            "class_path": type(module).__name__,
            "hparams": {k: v for k, v in hparams.items() if not isinstance(v, dict)},  # objects, or their YAML
            "trained": [info.name for info in run.layout.parameters],
            "layers": re.sub(r"0x[0-9a-f]+", "", repr(module)).splitlines()[1:],
        },
        "optimizer": {
            "class_path": type(optimization.optimizer).__name__,
            "groups": [plain({k: v for k, v in group.items() if k not in _HOW}) for group in groups],
            "sizes": [sum(p.numel() for p in group["params"]) for group in groups],
            "lr_scheduler": [plain(vars(scheduled)) for scheduled in optimization.schedulers],
        },
    }


def plain(value: Any, depth: int = 0) -> Any:
    """A value as numbers, strings, lists and dictionaries; an object as its class and what it was made with."""
    value = value.item() if isinstance(value, np.generic) else settings_of(value) or value
    value = value.value if isinstance(value, enum.Enum) and isinstance(value, int | str) else value
    if value is None or isinstance(value, bool | int | float | str):
        return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    if isinstance(value, Tensor | np.ndarray):
        return value.item() if math.prod(value.shape) == 1 else [list(value.shape), _number(value)]
    if isinstance(value, torch.dtype | torch.device | PurePath | enum.Enum):
        return str(value)
    if depth > 5:
        return type(value).__name__
    if isinstance(value, Mapping):
        return {str(k): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v, depth + 1) for v in (value if isinstance(value, list | tuple) else sorted(value, key=str))]
    if isinstance(value, partial):  # that of a command line has the class that is made among its arguments
        made = next((a for a in value.args if isinstance(a, type)), value.func)
        return {"class_path": getattr(made, "__name__", ""), **plain(value.keywords, depth + 1)}
    if isinstance(value, types.FunctionType):  # a lambda's name says nothing
        code, cells = value.__code__, [c.cell_contents for c in value.__closure__ or () if c != types.CellType()]
        numbers = [c for c in code.co_consts if isinstance(c, int | float)]
        return [value.__qualname__, list(code.co_names), numbers, plain([value.__defaults__, cells], depth + 1)]
    if hasattr(value, "__qualname__") or not hasattr(value, "__dict__"):
        return getattr(value, "__qualname__", type(value).__name__)
    return {"class_path": type(value).__name__, **plain(_settings(value), depth + 1)}


def _settings(value: Any) -> dict[str, Any]:
    """Attributes that are called as the arguments of its constructors; if some are not, all simple ones as well."""
    held = {**getattr(vars(value).get("penalty"), "__dict__", {}), **vars(value)}  # with what an algorithm's own has
    if isinstance(value, LRScheduler):
        return {k: v for k, v in held.items() if k not in ("optimizer", "base_lrs", "_last_lr")}
    inits = [init for cls in type(value).__mro__ if isinstance(init := vars(cls).get("__init__"), types.FunctionType)]
    arguments = [p for init in inits for p in inspect.signature(init).parameters.values()]
    names = {p.name for p in arguments if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"self"}
    found = {name: held[k] for name in sorted(names) for k in (name, f"_{name}") if k in held}
    simple = {k: v for k, v in held.items() if isinstance(v, bool | int | float | str) and not k.startswith("_")}
    return found if len(found) == len(names) else simple | found


def _data(data: FederatedDataModule) -> dict[str, Any]:
    """How batches are made, and fingerprints: of every client's indices and labels, and of some samples."""
    partition, counts, first = getattr(data, "partition", None), class_counts(data), data.client_dataset(0)
    indices, clients = hashlib.blake2b(digest_size=8), range(data.num_clients)
    if isinstance(partition, Partition):
        indices.update(torch.cat([partition.sizes, partition.rows]).numpy().tobytes())
    elif type(data).client_size is not FederatedDataModule.client_size:  # to make all datasets may take long
        indices.update(np.asarray([data.client_size(client) for client in clients]).tobytes())
    else:
        for dataset in map(data.client_dataset, clients):
            rows = dataset.indices if isinstance(dataset, Subset | ArrayDataset) else None
            rows = [len(dataset)] if rows is None else rows  # type: ignore[arg-type]
            indices.update(np.asarray([len(rows), *rows]).tobytes())
    indices.update(b"" if counts is None else counts.numpy().tobytes())
    while isinstance(first, Subset):
        first = first.dataset
    with preserved_global_rng():
        samples = [_sample(data.client_dataset(clients[i * len(clients) // _SAMPLES]), i) for i in range(_SAMPLES)]
    return {
        "class_path": type(data).__name__,
        **{key: plain(getattr(data, key, None)) for key in _DATA},
        "classes": class_names(data) or plain(getattr(data, "classes", None)),
        "transform": plain(getattr(first, "transform", None)),
        "held_out_clients": list(data.new_clients),
        "partition": indices.hexdigest(),
        "samples": samples,
    }


def _sample(dataset: Dataset[Any], number: int) -> Any:
    """Numbers that depend on a sample; None where it is not the same twice, or cannot be read: training will tell."""
    dataset = dataset.view(dataset.indices, None) if isinstance(dataset, ArrayDataset) else dataset
    found: list[Any] = []
    for _ in range(2):
        seed_global_rng(0)
        try:
            found.append([_number(leaf) for leaf in tree_leaves(dataset[number * 7919 % len(dataset)])])  # type: ignore[arg-type]
        except Exception:
            return None
    return found[0] if found[0] == found[1] else None


def _number(value: Any) -> float:
    """Nearly the same for values that are: another machine may round otherwise as it decodes an image."""
    if isinstance(value, str | bytes):
        return float(zlib.crc32(value.encode() if isinstance(value, str) else value))
    flat = torch.as_tensor(value if isinstance(value, Tensor) else np.asarray(value)).detach().cpu().double().flatten()
    return float((flat.abs() * (1 + torch.arange(len(flat)) % 97)).sum())


def differences(old: Any, new: Any, key: str = "") -> dict[str, list[Any]]:
    """What differs, by dotted keys, as ``[old, new]``; of dictionaries, what both have."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{key}.{k}".removeprefix("."), old[k], new[k]) for k in old if k in new]
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return {key: [[v for v in old if v not in new], [v for v in new if v not in old]]}
        pairs = [(f"{key}.{i}", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        numbers = isinstance(old, int | float) and isinstance(new, int | float)
        same = repr(old) == repr(new) or (numbers and math.isclose(old, new, rel_tol=1e-6))
        return {} if same else {key: [old, new]}
    return {name: change for k, a, b in pairs for name, change in differences(a, b, k).items()}
