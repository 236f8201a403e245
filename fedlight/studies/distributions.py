"""What a parameter of a study may be: W&B's distributions."""

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.run.names import nearest

_BOUNDS, _BELL, _SHAPE = {"min", "max"}, {"mu", "sigma"}, {"a", "b"}
_Draw = Callable[[random.Random, Mapping[str, Any]], Any]
# The keys of each distribution in the YAML, and how it is drawn from with what they say.
_KINDS: dict[str, tuple[set[str], _Draw]] = {
    "constant": ({"value"}, lambda rng, s: s["value"]),
    "categorical": ({"values"}, lambda rng, s: s["values"][rng.randrange(len(s["values"]))]),
    "categorical_w_probabilities": (
        {"values", "probabilities"},
        lambda rng, s: rng.choices(s["values"], s["probabilities"])[0],
    ),
    "int_uniform": (_BOUNDS, lambda rng, s: rng.randint(s["min"], s["max"])),
    "uniform": (_BOUNDS, lambda rng, s: rng.uniform(s["min"], s["max"])),
    "log_uniform": (_BOUNDS, lambda rng, s: math.exp(rng.uniform(s["min"], s["max"]))),
    "log_uniform_values": (_BOUNDS, lambda rng, s: math.exp(rng.uniform(math.log(s["min"]), math.log(s["max"])))),
    "inv_log_uniform": (_BOUNDS, lambda rng, s: math.exp(-rng.uniform(s["min"], s["max"]))),
    "inv_log_uniform_values": (
        _BOUNDS,
        lambda rng, s: math.exp(-rng.uniform(-math.log(s["max"]), -math.log(s["min"]))),
    ),
    "normal": (_BELL, lambda rng, s: rng.gauss(s["mu"], s["sigma"])),
    "log_normal": (_BELL, lambda rng, s: rng.lognormvariate(s["mu"], s["sigma"])),
    # An exponent of 0 moves all of the mass to that end.
    "beta": (_SHAPE, lambda rng, s: rng.betavariate(s["a"], s["b"]) if s["a"] and s["b"] else float(s["a"] > 0)),
}
_QUANTISED = ("uniform", "log_uniform", "log_uniform_values", "normal", "log_normal", "beta")
_KEYS = {kind: keys for kind, (keys, _) in _KINDS.items()}
_KEYS |= {f"q_{kind}": _KEYS[kind] | {"q"} for kind in _QUANTISED}
_DEFAULTS: dict[str, float] = {"q": 1.0, "mu": 0.0, "sigma": 1.0, "a": 1, "b": 1}
_FINITE = ("constant", "categorical", "int_uniform", "q_uniform")


@dataclass(frozen=True)
class Distribution:
    """Values of one parameter: W&B's name of the distribution, and its bounds, values, and so on."""

    kind: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, spec: Mapping[str, Any], key: str, nested: bool = False) -> "Distribution":
        """The distribution that a parameter's mapping describes, at a ``key`` of the YAML; an error if it is none.

        Where it is part of another parameter, ``nested``, W&B takes bounds that are exponents of e.
        """
        check_keys(spec, {"distribution"}.union(*_KEYS.values()), key)
        kind = spec["distribution"] if "distribution" in spec else _inferred(spec, key)
        if not isinstance(kind, str) or kind not in _KEYS:
            raise MisconfigurationException(f"`{key}.distribution: {kind}` is not known{nearest(str(kind), _KEYS)}")
        check_keys({k: v for k, v in spec.items() if k != "distribution"}, _KEYS[kind], key)
        if kind.endswith("log_uniform") and not nested:
            raise MisconfigurationException(
                f"`{key}`: min and max of {kind} are exponents of e, found {spec.get('min')} and {spec.get('max')}, and"
                f" W&B does not take it any more. Use {kind}_values, whose min and max are those of the values."
            )
        missing = sorted(_KEYS[kind] - spec.keys() - _DEFAULTS.keys())
        if missing:
            raise MisconfigurationException(f"`{key}`: {kind} needs {' and '.join(missing)}.")
        settings = {name: spec.get(name, _DEFAULTS.get(name)) for name in sorted(_KEYS[kind])}
        if kind.startswith("categorical"):
            _check_values(settings, key)
        elif kind != "constant":
            _check_numbers(kind, settings, key)
        return cls(kind, settings)

    @property
    def varies(self) -> bool:
        """Whether there is more than one value."""
        return self.kind != "constant" and (not self.kind.startswith("categorical") or len(self.settings["values"]) > 1)

    def check_finite(self, key: str) -> None:
        """Refuse a distribution that a grid cannot go through."""
        if self.kind not in _FINITE:
            raise MisconfigurationException(
                f"`{key}`: a grid takes value, values, int_uniform and q_uniform, not {self.kind}. List `values`, or"
                " use method: random."
            )

    def values(self) -> list[Any]:
        """All values, of a finite distribution."""
        s = self.settings
        if self.kind == "constant":
            return [s["value"]]
        if self.kind == "int_uniform":
            return list(range(s["min"], s["max"] + 1))
        if self.kind == "q_uniform":
            return [*np.arange(s["min"], s["max"], s["q"]).tolist()]
        # As W&B's grid has it: what is there twice counts once, and 3.0 is 3.
        same = {yaml.safe_dump(int(v) if isinstance(v, float) and v.is_integer() else v): v for v in s["values"]}
        return list(same.values())

    def draw(self, rng: random.Random) -> Any:
        """One value."""
        value, q = _KINDS[self.kind.removeprefix("q_")][1](rng, self.settings), self.settings.get("q")
        return value if q is None else round(value / q) * q


def _inferred(spec: Mapping[str, Any], key: str) -> str:
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    if set(spec) >= _BOUNDS:
        return "int_uniform" if all(type(spec[name]) is int for name in _BOUNDS) else "uniform"
    raise MisconfigurationException(f"`{key}` says nothing to take: give value, values, or min and max.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_values(settings: Mapping[str, Any], key: str) -> None:
    values, weights = settings["values"], settings.get("probabilities", [])
    if not isinstance(values, list) or not values:
        raise MisconfigurationException(f"`{key}.values` must be a list with something in it, found {values!r}.")
    if "probabilities" in settings:
        numbers = isinstance(weights, list) and all(_is_number(weight) and weight >= 0 for weight in weights)
        if not numbers or len(weights) != len(values) or abs(sum(weights) - 1) > 1e-5:
            what = f"{len(values)} numbers whose sum is 1, found {weights!r}"
            raise MisconfigurationException(f"`{key}.probabilities` must be {what}.")


def _check_numbers(kind: str, settings: Mapping[str, Any], key: str) -> None:
    for name, value in settings.items():
        if not _is_number(value) or (kind == "int_uniform" and not isinstance(value, int)):
            what = f"a {'whole ' * (kind == 'int_uniform')}number for {kind}"
            raise MisconfigurationException(f"`{key}.{name}` must be {what}, found {value!r}; YAML wants 1.0e-3.")
        if name in ("sigma", "a", "b") and value < 0:
            raise MisconfigurationException(f"`{key}.{name}` must not be below 0, found {value}.")
    if "min" in settings and not settings["min"] < settings["max"]:
        raise MisconfigurationException(f"`{key}`: min {settings['min']} is not below max {settings['max']}.")
    if kind.endswith("values") and settings["min"] <= 0:
        raise MisconfigurationException(f"`{key}.min` must be above 0 for {kind}, found {settings['min']}.")
    if settings.get("q", 1) <= 0:
        raise MisconfigurationException(f"`{key}.q` must be above 0, found {settings['q']}.")


def check_keys(content: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not known, and name the nearest that is."""
    known = sorted(known)
    for key in content:
        if key not in known:
            name = f"{where}.{key}" if where else str(key)
            near = nearest(str(key), known) or f"; known are {', '.join(known)}"
            raise MisconfigurationException(f"`{name}` is not known{near}")
