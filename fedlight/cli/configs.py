"""``fedlight configs``: the configurations that come with fedlight, by name. Nothing heavy is loaded here."""

import difflib
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

FOLDERS: dict[str, tuple[str, ...]] = {
    **{key: (f"{key}/",) for key in ("model", "data", "algorithm", "perturbation")},
    "trainer.callbacks": ("callbacks/", "analysis/"),
    **{f"trainer.{key}": (f"{key}/",) for key in ("transforms", "aggregator", "personal")},
}
"""Where parts lie, by the key that they belong under; there the name of the folder may be left out."""


def shipped(kind: str) -> Path:
    """A folder that is shipped: in the package that is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next(folder for folder in (package / kind, package.parent / kind) if folder.is_dir())


@cache
def configs() -> dict[str, Path]:
    """The files by name: ``quickstart``, ``paper/cifar100``, ``algorithm/feddyn``."""
    root = shipped("configs")
    files = sorted(root.rglob("*.yaml"), key=lambda path: (path.parent != root, path))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


@cache
def part_names() -> dict[str, str]:
    """The short names of parts, and the key that each belongs under."""
    both = ((key, folder) for key, folders in FOLDERS.items() for folder in folders)
    return {name.removeprefix(f): key for key, f in both for name in configs() if name.startswith(f)}


def resolve(value: Any, key: str) -> Any:
    """The path of the packaged configuration that a value names, or a list with such; any other value as it is.

    A ``key`` is ``config``, ``algorithm``, ``trainer.callbacks`` ...; a name that a file has is that file.
    """
    if isinstance(value, list):
        return [resolve(item, key) for item in value]
    if not isinstance(value, str) or key not in (*FOLDERS, "config", "trainer.logger") or Path(value).is_file():
        return value
    known = configs()
    return next((str(known[n]) for f in (*FOLDERS.get(key, ()), "") if (n := f + value) in known), value)


def resolve_arguments(args: Sequence[str]) -> list[str]:
    """A command line with the paths of packaged configurations in the place of their names."""
    out, key = [], ""
    for argument in args:
        option, equals, value = argument.partition("=") if argument.startswith("-") else (key, "", argument)
        key = {"c": "config"}.get(name := option.lstrip("-").removesuffix("+"), name)
        given = resolve(value, key)
        out.append(f"{option}={given}" if equals else given if not argument.startswith("-") else argument)
    return out


def resolve_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same in the content of a configuration, without keys as ``_base``, which are there for anchors alone."""
    out = {key: resolve(value, key) for key, value in config.items() if not str(key).startswith(("_", "."))}
    if isinstance(trainer := config.get("trainer"), dict):
        out["trainer"] = {key: resolve(value, f"trainer.{key}") for key, value in trainer.items()}
    return out


def nearest(name: str) -> str:
    """A sentence with the packaged configurations whose names are near, if there are any."""
    stem, known = Path(name).with_suffix("").as_posix().removeprefix("configs/"), configs()
    near = [stem] if stem in known else difflib.get_close_matches(stem, known, 2, 0.6)
    near = near or [n for n in known if n.endswith(f"/{stem}")]
    return f"did you mean {' or '.join(map(repr, near))}? " * bool(near) + "`fedlight configs` lists what there is"


_BESIDE = "class_path", "init_args", "dict_kwargs", "<<"
_MISREAD = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)")
"""Numbers with a zero in front, to base 8, and with colons, to base 60."""


def mistakes(content: str) -> list[str]:
    """What a YAML text says that would be lost or read as something else, a sentence each.

    A mapping has a key twice, and would keep the last; a key stands beside ``class_path`` and not below ``init_args``;
    what holds keys is empty or a list; a number is one to base 8 or 60.
    """
    import yaml

    found: list[str] = []

    def look(node: Any, above: str) -> None:
        if isinstance(node, yaml.ScalarNode) and node.style is None and _MISREAD.fullmatch(node.value):
            value = yaml.safe_load(node.value)
            if not isinstance(value, str) and (":" in node.value or value != int(node.value.replace("_", ""))):
                found.append(f"{above.rstrip('.')}: {node.value} is {value} in YAML: write that, or quotes around it")
        pairs = [(str(key.value), value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []
        names = [key for key, _ in pairs]
        for key in dict.fromkeys(names):
            if names.count(key) > 1 and key != "<<":
                found.append(f"{above}{key} is there twice, of which the last alone would count: join them")
            elif "class_path" in names and "init_args." not in above and key not in _BESIDE:  # there it may be a dict
                found.append(f"{above}{key} stands beside class_path: put it below {above}init_args")
        for value in node.value if isinstance(node, yaml.SequenceNode) else []:
            look(value, above)
        for key, value in pairs:
            holds_keys = key == "init_args" or (not above and key in ("trainer", *FOLDERS) and "." not in key)
            empty = value.tag.endswith(":null") and key in ("init_args", "trainer")
            if holds_keys and (empty or isinstance(value, yaml.SequenceNode)):
                found.append(f"{above}{key} holds no keys, but {'nothing: remove it' if empty else 'a list'}")
            look(value, f"{above}{key}.")

    look(yaml.compose(content, Loader=yaml.SafeLoader), "")
    return found


def main(args: Sequence[str]) -> int:
    """List the configurations, or those of a folder, or print one."""
    known, name = configs(), " ".join(a for a in args if a not in ("-h", "--help")).removesuffix("/")
    if name in known:
        sys.stdout.write(known[name].read_text())
        return 0
    if not (listed := {n: path for n, path in known.items() if not name or n.startswith(f"{name}/")}):
        print(f"fedlight: error: {name!r} is no packaged configuration; {nearest(name)}.", file=sys.stderr)
        return 2
    for n, path in listed.items():
        print(f"{n:<{max(map(len, listed))}}  {path.read_text().splitlines()[0].lstrip('# ')}")
    print("\nfedlight fit -c quickstart --algorithm feddyn\nfedlight configs quickstart > my.yaml")
    return 0
