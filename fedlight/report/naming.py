"""Which runs are seeds of one another, and what methods and settings are called."""

import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from fedlight.penalties.numbers import KEYS
from fedlight.run.names import method_name

SEEDS = ("seed_everything", "data.init_args.seed")
"""Keys in which the runs of one method and setting differ."""
_ADDED = ("perturbation", "trainer.personal", "trainer.aggregator")
_METHOD = ("algorithm", "trainer.callbacks", "trainer.centralized", *_ADDED)
# What changes where a run is kept, how fast it is, or what is measured, but not what is trained.
_ASIDE = (
    "ckpt_path", "trainer.default_root_dir", "trainer.name", "trainer.logger", "trainer.enable_",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.engine", "trainer.client_state", "trainer.compile", "trainer.deterministic", "trainer.views",
    "trainer.check_val_every_n_rounds", "trainer.client_val_every_n_rounds", "trainer.fast_dev_run", "trainer.swa_",
    "trainer.limit_test_batches", "data.init_args.root", "data.init_args.download", "trainer.allow_changes",
    "trainer.profiler",
)  # fmt: skip
_READING = {"num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "eval_batch_size"}
"""The same of data, also of those that are divided among clients."""
_STOPS = "EarlyStopping"
_DIVISION = (
    "data.init_args.partitioner", "data.init_args.num_clients", "trainer.sampler", "trainer.clients_per_round",
    "trainer.limit_train_batches",
)  # fmt: skip

_Key = TypeVar("_Key")
Items = tuple[tuple[str, Any], ...]
"""Keys and values that identify something, sorted and hashable."""


class Method:
    """A method: what trains, by a run's configuration of dotted keys.

    Attributes:
        name: as ``FedDyn+SAM+MAN``.
        items: its hyperparameters, by short keys such as ``alpha``, ``SAM.rho``, ``MAN.zeta``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.is_central = bool(config.get("trainer.centralized"))
        algorithm = _class(config.get("algorithm.class_path", "?"))
        if parts := config.get("trainer.personal"):  # names alone
            whole = {"class_path": "PersonalParts", "init_args.parts": [parts] if isinstance(parts, str) else parts}
            config = {**config, **{f"trainer.personal.{key}": value for key, value in whole.items()}}
        known = {key: config.get(f"{key}.class_path") for key in (_ADDED[:1] if self.is_central else _ADDED)}
        added = {key: _class(found) for key, found in known.items() if found}
        penalties = _penalties(_callbacks(config))
        names = [name for name, _ in penalties]
        self.name = method_name(algorithm, added.values(), names, self.is_central)
        work = {"limit_train_batches": config.get("trainer.limit_train_batches")}  # made that of a federated round
        own = _below(config, "algorithm.init_args.") | _own_module(config.get("algorithm.class_path"))
        items = work if self.is_central else own
        for key, part in added.items():
            settings = _below(config, f"{key}.init_args.") | _own_module(known[key])
            items |= {f"{part}.{k}": v for k, v in settings.items()}
        without = self.name.removesuffix("".join(f"+{n}" for n in names)), _hashable(items)
        self.has_man = "MAN" in names
        # Name and hyperparameters without penalties: the same for a method with MAN and without.
        self.base: tuple[Any, ...] = (*without, tuple(name for name in names if name != "MAN"))
        for name, settings in penalties:
            items |= {f"{name}.{k}": v for k, v in settings.items()}
        self.items: Items = _hashable(items)


def setting_of(config: Mapping[str, Any]) -> Items:
    """All of a configuration that is neither method nor seed nor a matter of where and how fast."""
    apart = tuple(f"{key}." for key in (*_METHOD, *SEEDS))
    reading = {k for k in config if k.startswith("data.") and k.rpartition(".")[2] in _READING}
    own = {k: v for k, v in config.items() if not (f"{k}.".startswith(apart) or k.startswith(_ASIDE) or k in reading)}
    stops = [c for c in _callbacks(config) if isinstance(c, Mapping) and _class(c.get("class_path", "")) == _STOPS]
    own = {inner: v for key, value in own.items() for inner, v in _spread(key, value)}
    return _hashable(own | {f"{_STOPS}.{k}": v for c in stops for k, v in (c.get("init_args") or {}).items()})


def _spread(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A list of objects by keys of their own, so that settings are told apart by what differs in it."""
    listed = value if isinstance(value, list) else []
    if not listed or not all(isinstance(entry, Mapping) and "class_path" in entry for entry in listed):
        yield key, value
        return
    for i, entry in enumerate(listed):
        yield f"{key}.{i}.class_path", entry["class_path"]
        yield from ((f"{key}.{i}.init_args.{name}", v) for name, v in (entry.get("init_args") or {}).items())


def pooled(setting: Items) -> Items:
    """The part of a setting that matters where the data are pooled: how they are divided does not."""
    return tuple((key, value) for key, value in setting if not key.startswith(_DIVISION))


def method_labels(methods: Iterable[Method]) -> dict[tuple[str, Items], str]:
    """A label for each method: its name, and what tells it from others of that name."""
    by_name: dict[str, dict[Items, None]] = {}
    for method in methods:
        by_name.setdefault(method.name, {})[method.items] = None
    labels = {}
    for name, variants in by_name.items():
        keys = differing([*variants])
        for items in variants:
            described = describe(items, keys)
            labels[name, items] = f"{name} ({described})" if described else name
    return _told_apart(labels)


def setting_labels(settings: Iterable[Items]) -> dict[Items, str]:
    """A label for each setting: what tells it from the others; where there is one only, the data's source."""
    distinct = list(dict.fromkeys(settings))
    keys = differing(distinct)
    labels = {}
    for items in distinct:
        known = dict(items)
        source = known.get("data.init_args.source") or _class(str(known.get("data.class_path", "all")))
        labels[items] = describe(items, keys) or str(source)
    return _told_apart(labels)


def _told_apart(labels: dict[_Key, str]) -> dict[_Key, str]:
    """Labels that are alike get numbers: what they stand for is not."""
    repeated = {label for label in labels.values() if list(labels.values()).count(label) > 1}
    return {s: f"{label} #{i + 1}" if label in repeated else label for i, (s, label) in enumerate(labels.items())}


def differing(variants: Sequence[Items]) -> list[str]:
    """Keys that some have and others lack, or whose values differ."""
    dicts = [dict(items) for items in variants]
    keys = sorted({key for d in dicts for key in d})
    return [key for key in keys if len({(key in d, d.get(key)) for d in dicts}) > 1]


def describe(items: Items, keys: Iterable[str]) -> str:
    """``DirichletClients, alpha=0.3``: classes by their name, other values behind the end of their key."""
    known, parts = dict(items), []
    for key in keys:
        if key in known:
            value, last = known[key], key.rsplit(".", 1)[-1]
            parts.append(_class(str(value)) if last == "class_path" else f"{last}={show(value)}")
    return ", ".join(parts)


def show(value: Any) -> str:
    """A value as it is shown: ``null`` for None, lists as in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, _Part):
        inner = ", ".join(f"{key}={show(v)}" for key, v in value.settings)
        return f"{_class(value.path)}({inner})" if inner or not value.path else _class(value.path)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(show(v) for v in value) + "]"
    if isinstance(value, str) and "." in value and value.replace(".", "").replace("_", "").isalnum():
        return _class(value)
    return str(value)


def _below(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}


def _own_module(path: Any) -> dict[str, str]:
    """Where a class that is none of fedlight's is from: another of that name is another method."""
    module = str(path).rpartition(".")[0]
    return {"of": module} if module and not module.startswith("fedlight") else {}


def _class(path: str) -> str:
    return str(path).rsplit(".", 1)[-1]


def _callbacks(config: Mapping[str, Any]) -> list[Any]:
    """The callbacks; one alone may stand without a list."""
    listed = config.get("trainer.callbacks")
    if isinstance(listed, list):
        return listed
    alone = config.get("trainer.callbacks.class_path")
    settings = _below(config, "trainer.callbacks.init_args.")
    return [] if alone is None else [{"class_path": alone, "init_args": settings}]


def _penalties(callbacks: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of each penalty that acts."""
    found = []
    for entry in callbacks:
        if isinstance(entry, Mapping) and _is_penalty(str(entry.get("class_path"))):
            settings = {k: v for k, v in (entry.get("init_args") or {}).items() if v is not None}
            if settings.get("zeta", 1) != 0:
                found.append((_class(str(entry["class_path"])), settings | _own_module(entry["class_path"])))
    return found


@functools.cache
def _is_penalty(class_path: str) -> bool:
    """Whether a callback adds to the loss; one that cannot be imported here may, and so is part of the name."""
    from fedlight.penalties.base import Penalty

    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return not class_path.startswith("fedlight.")
    return isinstance(found, type) and issubclass(found, Penalty)


class _Part(NamedTuple):
    """An object of a configuration, by its class, or a dictionary."""

    path: str
    settings: Items


def _hashable(items: Mapping[str, Any]) -> Items:
    return tuple(sorted((key, _frozen(value)) for key, value in items.items()))


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, Mapping) and value.keys() >= KEYS:
        after = f" after {value['after']}" if value.get("after") else ""
        return f"{value['schedule']} {value['from']:g} to {value['to']:g} in {value['rounds']} rounds{after}"
    if isinstance(value, Mapping):
        inner = value.get("init_args") or {}
        whole = "class_path" not in value or not isinstance(inner, Mapping)
        given = value if whole else {k: v for k, v in value.items() if k not in ("class_path", "init_args")} | inner
        return _Part(str(value.get("class_path", "")), _hashable(given))
    return value
