"""Keys and values on the command line."""

import ast
import json


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
