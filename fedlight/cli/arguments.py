"""Keys and values on the command line."""

import ast
import json
from collections.abc import Mapping
from typing import Any


def yaml_argument(argument: str) -> str:
    """``--key=value`` with a value that YAML reads, where Python's ``None`` stands in it.

    Sweep agents write values with Python's ``str``. YAML reads numbers, booleans, lists and dictionaries the same way,
    but ``None`` as a word.
    """
    key, equals, value = argument.partition("=")
    if not equals or not key.startswith("-") or "None" not in value:
        return argument
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return argument  # a string, such as a path
    return argument if isinstance(parsed, str | bytes) else f"{key}={json.dumps(parsed)}"


def dotted(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """A nested configuration by the keys of the command line: ``{"trainer": {"name": "a"}}`` by ``trainer.name``.

    Lists stay as they are; an empty mapping is a value.
    """
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            out |= dotted(value, f"{above}{key}.")
        else:
            out[f"{above}{key}"] = value
    return out
