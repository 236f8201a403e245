"""A study: the YAML that ``wandb sweep`` takes, read and checked."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fedlight.cli.configs import mistakes
from fedlight.run.names import nearest
from fedlight.studies.distributions import Distribution, check_keys

_DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
_KEYS = frozenset({
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
    check_keys(content, _KEYS, "")
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
