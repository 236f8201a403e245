"""A study: the YAML that ``wandb sweep`` takes, read and checked; a parameter may be any of W&B's distributions."""

import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.cli.configs import mistakes
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


_DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
_STUDY_KEYS = frozenset({
    "apiVersion", "kind", "controller", "description", "program", "job", "image_uri", "entity", "project", "method",
    "command", "name", "run_cap", "metric", "metrics", "scheduler", "early_terminate", "parameters",
})  # fmt: skip
_METHODS = ("grid", "random")
_OURS = ("ckpt_path", "config", "print_config")
_PARAMETER_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Study:
    """What to run.

    Attributes:
        command: the command of a run, with W&B's macros.
        program: what ``${program}`` stands for.
        parameters: a distribution by the path of its name; a path has several parts where parameters are nested.
        metric: what W&B would optimise; shown when a run ends.
        early_terminate: whether the YAML asks for runs to be stopped early, which only W&B does.
    """

    name: str
    method: Literal["grid", "random"]
    command: tuple[str, ...]
    program: str | None
    parameters: Mapping[tuple[str, ...], Distribution]
    metric: str | None = None
    run_cap: int | None = None
    early_terminate: bool = False


def load_study(path: Path) -> Study:
    """Read and check a study; an error names the file, and the key that is wrong."""
    try:
        content, wrong = yaml.safe_load(text := path.read_text()), mistakes(text)
    except OSError as error:
        raise MisconfigurationException(f"The study {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MisconfigurationException(f"The study {path} is no YAML: {error}") from error
    if wrong:
        raise MisconfigurationException(f"The study {path}: {'; '.join(wrong)}.")
    if not isinstance(content, dict):
        raise MisconfigurationException(f"The study {path} is no mapping: it needs `method` and `parameters`.")
    try:
        return _study(content, path.stem)
    except MisconfigurationException as error:
        raise MisconfigurationException(f"{path}: {error}") from error


def _study(content: dict[str, Any], default_name: str) -> Study:
    check_keys(content, _STUDY_KEYS, "")
    command, program = content.get("command") or list(_DEFAULT_COMMAND), content.get("program")
    if isinstance(command, str) or not isinstance(command, list):
        raise MisconfigurationException(f"`command` must be a list of words, found {command!r}.")
    words = tuple(str(word) for word in command)
    if "fit" not in words and not str(program or "").endswith(" fit"):
        right = "Write command: [fedlight, fit, -c, CONFIG.yaml, '${args}']."
        raise MisconfigurationException(f"`command` runs no `fit`: {' '.join(words)}. {right}")
    if not any("${args" in word for word in words):
        raise MisconfigurationException(f"`command` passes no parameters on: {' '.join(words)}. Add '${{args}}' to it.")
    method = _method(content.get("method"))
    parameters = dict(_parameters(content.get("parameters"), ()))
    if method == "grid":
        for names, distribution in parameters.items():
            distribution.check_finite("parameters." + ".parameters.".join(names))
    metric = content.get("metric")
    return Study(
        name=str(content.get("name") or default_name),
        method=method,
        command=words,
        program=None if program is None else str(program),
        parameters=parameters,
        metric=str(metric["name"]) if isinstance(metric, dict) and "name" in metric else None,
        run_cap=_run_cap(content.get("run_cap")),
        early_terminate="early_terminate" in content,
    )


def _method(method: Any) -> Literal["grid", "random"]:
    if method in ("bayes", "custom"):
        who = "which W&B does: start it with `wandb sweep` and `wandb agent`. `fedlight study` does grid and random."
        raise MisconfigurationException(f"`method: {method}` chooses runs by the results of earlier ones, {who}")
    if method not in _METHODS:
        near = nearest(str(method), _METHODS)
        raise MisconfigurationException(f"`method: {method}` is not known; it must be grid or random{near}")
    return "grid" if method == "grid" else "random"


def _parameters(content: Any, above: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Distribution]]:
    where = "".join(f"parameters.{name}." for name in above) + "parameters"
    if not isinstance(content, dict) or not content:
        raise MisconfigurationException(f"`{where}` must map names to what they take, found {content!r}.")
    for name in sorted(content, key=str):  # the order in which agents pass them
        key, spec = f"{where}.{name}", content[name]
        if not isinstance(name, str) or not _PARAMETER_NAME.fullmatch(name):
            raise MisconfigurationException(f"`{key}` is no name of a parameter.")
        if not above and name in _OURS:
            raise MisconfigurationException(f"`{key}`: a study sets {name} itself; it cannot be a parameter.")
        if not isinstance(spec, dict):
            raise MisconfigurationException(f"`{key}` must be a mapping, as {{value: {spec!r}}}.")
        if "parameters" in spec:
            check_keys(spec, ("parameters",), key)
            yield from _parameters(spec["parameters"], (*above, name))
        else:
            yield (*above, name), Distribution.of(spec, key, nested=bool(above))


def _run_cap(run_cap: Any) -> int | None:
    if run_cap is not None and (not isinstance(run_cap, int) or isinstance(run_cap, bool) or run_cap < 1):
        raise MisconfigurationException(f"`run_cap` must be a whole number of at least 1, found {run_cap!r}.")
    return run_cap
