"""What the command line says about input that it cannot read: short, and with the nearest name."""

import difflib
import importlib
import inspect
import os
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Trainer

from fedlight.cli.classes import taking
from fedlight.cli.configs import configs, nearest
from fedlight.data.federated import FEDERATED_YAML
from fedlight.run.lightning_names import HERE, NO_COUNTERPART
from fedlight.written import arguments

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


def suggestions(message: str, keys: Collection[str], classes: Mapping[str, str]) -> list[str]:
    """A sentence for each unknown name in a parser's message; ``classes`` has the key that each belongs under."""
    message = re.sub(r"Group '([\w.]+)' does not accept option '", r"does not accept option '\1.", message)
    inner = re.findall(r"Got value: Namespace\(class_path='([\w.]+)'", message)
    owner = next(iter(inner or re.findall(r"given class_path '([\w.]+)'", message)[::-1]), None)
    taken = sorted(keys) if owner is None else _parameters(owner)
    section = next(iter(re.findall(r'Parser key "([\w.]+)"', message)), "")
    found = [_key(word, taken, owner, section) for word in _words(message, _KEYS)]
    found += [_class(word, classes) for word in _words(message, _CLASSES)]
    for module, name in re.findall(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        near = difflib.get_close_matches(name, dir(importlib.import_module(module)), 1, 0.6)
        found.append(f"did you mean {f'{module}.{near[0]}'!r}?" if near else "")
    found += ["`class_path` names the class, `init_args` holds its settings"] * ("an instantiatable class" in message)
    found += ["settings stand below `init_args`, not beside `class_path`"] * ("Option 'class_path' is not" in message)
    found += ["YAML is indented with spaces, not with tabs"] * (r"'\t' that cannot start any token" in message)
    for value in re.findall(r"Expected a <class 'str'>\. Got value: (\S+)", message):
        found.append(f"YAML reads {value.lower()} as another thing than a word: write it in quotes")
    for word in re.findall(r"nrecognized arguments: [-–—]?(\w[\w./-]*)", message):
        is_file = word.endswith((".yaml", ".yml")) or word in configs()
        found += [f"-c reads a configuration: -c {word}"] * is_file
        found += [f"two hyphens begin an option: --{word}"] * (not is_file and ("." in word or word in keys))
    found += [nearest(os.path.relpath(path)) for path in re.findall(r"File does not exist: '(.+)'", message)]
    for path in re.findall(r"Import path ([\w.]+) does not correspond to a subclass of FederatedDataModule", message):
        found.append(f"a LightningDataModule is divided among clients by `{FEDERATED_YAML % path}`")
    return list(dict.fromkeys(sentence for sentence in found if sentence and sentence not in message))


_KEYS = [
    r"[Uu]nrecognized arguments:.*?--([\w.]+)",
    r"[Kk]ey '([\w.]+)' is not expected",
    r"[Oo]ption '([\w.]+)' is not accepted",
    r"does not accept (?:option|nested key) '([\w.]+)'",
]
_CLASSES = [r"import path string: ([\w./-]+)", r"import path format: ([\w./-]+)", r"class_path '([\w.-]+\.ya?ml)'"]


def _words(message: str, patterns: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(word for pattern in patterns for word in re.findall(pattern, message)))


def _near(word: str, known: list[str], cutoff: float) -> list[str]:
    """The nearest name, and a second one that is about as near."""
    best = difflib.get_close_matches(word, known, 2, cutoff)
    ratios = [difflib.SequenceMatcher(None, word, name).ratio() for name in best]
    return [name for name, ratio in zip(best, ratios, strict=True) if ratio > ratios[0] - 0.05]


_ELSEWHERE = {f"trainer.{key}": f"trainer.{here}" for key, here in HERE.items()}
_ELSEWHERE |= {key: f"model.{key}" for key in ("optimizer", "lr_scheduler")}
_ELSEWHERE |= {"trainer.resume_from_checkpoint": "ckpt_path"}
_ELSEWHERE |= dict.fromkeys(("seed", "trainer.seed"), "seed_everything")
"""What Lightning's users write, and what it is here; a key may go on with a dot."""
_LOGGERS = {"wandb": "WandbLogger", "tensorboard": "TensorBoardLogger", "csv": "CSVLogger"}


def _parameters(class_path: str) -> list[str]:
    """What a class takes; arguments that it hands on to its bases included."""
    module, _, name = class_path.rpartition(".")
    with suppress(ImportError, AttributeError, ValueError, TypeError):  # what is given may be no class
        return [argument for argument in arguments(getattr(importlib.import_module(module), name)) if argument != "*"]
    return []


def _key(word: str, keys: list[str], owner: str | None, section: str) -> str:
    if word == "not_written":
        return "a Python program wrote this file, and lists there what is missing: add that, and remove `not_written`"
    start = next((k for k in _ELSEWHERE if f"{word}.".startswith(f"{k}.")), "") if owner is None else ""
    if start:
        return f"{word!r} is not known; did you mean '{_ELSEWHERE[start]}{word[len(start) :]}'?"
    if word.partition("trainer.")[2] in inspect.signature(Trainer).parameters:
        return NO_COUNTERPART.format(word)
    if word in ("lr", "weight_decay", "momentum") and "optimizer" in keys:
        return f"{word!r} is the optimizer's; did you mean 'optimizer.{word}'?"
    near = [k for k in keys if k.rpartition(".")[2] == word.rpartition(".")[2]][:2]  # in another section
    near = near or [k for k in keys if k.startswith(word)][:2] or _near(word, keys, 0.7)
    first, _, rest = word.partition(".")
    if not near and rest:  # a section may be misspelt, or a key that another section has
        near = _near(first, keys, 0.7)
        leaf = difflib.get_close_matches(word.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in keys], 1, 0.7)
        near = near if near and near[0] != first else [k for k in keys if k.rsplit(".", 1)[-1] in leaf][:2]
    if not near and owner is not None:
        others = taking(section, word)
        if others:
            one = f"{section}: {{class_path: {others[0]}, init_args: {{{word}: ...}}}}"
            return f"{owner} has no {word!r}; of {', '.join(others)} name one, as `{one}`"
        return f"{owner} takes {', '.join(keys) or 'nothing'}; `class_path` names another class"
    return f"{word!r} is not known; did you mean {' or '.join(map(repr, near))}?" if near and word not in near else ""


def _class(word: str, classes: Mapping[str, str]) -> str:
    if "/" in word or word.endswith((".yaml", ".yml")):
        return f"there is no file {str(Path(word).absolute())!r}"
    if word in _LOGGERS:
        return f"settings of a logger go to its class: --trainer.logger {_LOGGERS[word]} --trainer.logger.<setting>"
    if word in classes:
        return f"{word!r} belongs under another key: --{classes[word]} {word}"
    near = _near(word, sorted(classes), 0.65)
    if near:
        return f"{word!r} is not known; did you mean {' or '.join(map(repr, near))}?"
    return f"{word!r} is no class that is known by a short name; give its import path, as my_module.{word}"
