"""What the command line says about input that it cannot read: short, and with the nearest name."""

import difflib
import importlib
import re
from collections.abc import Iterable
from pathlib import Path

_NOISE = re.compile(
    r"(-? ?Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value( type)?: .*"
    r"|- Expected a <class 'NoneType'>.*|- Expected a path but .* either not accessible or invalid"
    r"|Subclass types expect one of:|- a class path \(str\)|- a dict with(out)? .*)"
)


def readable(message: str) -> str:
    """The lines of an argument parser's message that say what is wrong, each once."""
    lines = [line for line in message.splitlines() if line.strip() and not _NOISE.fullmatch(line.strip())]
    seen: dict[str, str] = {}
    for line in lines:
        seen.setdefault(line.strip(), line)
    return "\n".join(seen.values()) or message


def suggestions(message: str, keys: Iterable[str], classes: Iterable[str]) -> list[str]:
    """A sentence for each name in a message that nothing is known by.

    Args:
        message: what the parser says.
        keys: the keys that there are.
        classes: the names of classes that there are.
    """
    found = [_key(word, sorted(keys)) for word in _words(message, _KEYS)]
    found += [_class(word, sorted(classes)) for word in _words(message, _CLASSES)]
    for module, name in re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        near = difflib.get_close_matches(name, dir(importlib.import_module(module)), 1, 0.6)
        found.append(f"did you mean {f'{module}.{near[0]}'!r}?" if near else "")
    return list(dict.fromkeys(sentence for sentence in found if sentence and sentence not in message))


_KEYS = [
    r"[Uu]nrecognized arguments:.*?--([\w.]+)",
    r"[Kk]ey '([\w.]+)' is not expected",
    r"[Oo]ption '([\w.]+)' is not accepted",
    r"does not accept (?:option|nested key) '([\w.]+)'",
]
_CLASSES = [r"import path string: ([\w./-]+)", r"import path format: ([\w./-]+)"]


def _words(message: str, patterns: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(word for pattern in patterns for word in re.findall(pattern, message)))


def _near(word: str, known: list[str], cutoff: float) -> list[str]:
    """The nearest name, and a second one that is about as near."""
    best = difflib.get_close_matches(word, known, 2, cutoff)
    ratios = [difflib.SequenceMatcher(None, word, name).ratio() for name in best]
    return [name for name, ratio in zip(best, ratios, strict=True) if ratio > ratios[0] - 0.05]


def _key(word: str, keys: list[str]) -> str:
    near = [k for k in keys if k.startswith(word)][:2] or _near(word, keys, 0.7)
    first, _, rest = word.partition(".")
    if not near and rest:  # a section may be misspelt, or a key that another section has
        near = _near(first, keys, 0.7)
        leaf = difflib.get_close_matches(word.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in keys], 1, 0.7)
        near = near if near and near[0] != first else [k for k in keys if k.rsplit(".", 1)[-1] in leaf][:2]
    return f"{word!r} is not known; did you mean {' or '.join(map(repr, near))}?" if near and word not in near else ""


def _class(word: str, classes: list[str]) -> str:
    if "/" in word or word.endswith((".yaml", ".yml")):
        return f"there is no file {str(Path(word).absolute())!r}"
    near = _near(word, classes, 0.6)
    if near:
        return f"{word!r} is not known; did you mean {' or '.join(map(repr, near))}?"
    return f"{word!r} is no class that is known by a short name; give its import path, as my_module.{word}"
