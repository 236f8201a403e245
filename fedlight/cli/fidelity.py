"""``fedlight check-fidelity``: every method against a slow twin of its equations, in float64."""

import argparse
import difflib
import importlib
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fedlight.run.folder import place

TOLERANCE = 1e-10
"""The largest error, relative to the largest entry of the twin's models, that is one of rounding."""
HEAD = ("method", "twin written from", "problem", "rounds", "largest relative error", "verdict")


def twins() -> ModuleType:
    """The twins that are shipped: in the package that is installed, among the tests in a checkout."""
    package = Path(__file__).parents[1]
    folder = next(f for f in (package / "twins", package.parent / "tests" / "algorithms") if f.is_dir())
    parent = sys.modules.setdefault("fedlight_twins", ModuleType("fedlight_twins"))
    parent.__path__ = [str(folder)]
    return importlib.import_module("fedlight_twins.cases")


def chosen(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The comparisons of the methods that are named, in any case, with those of their settings; without words all."""
    methods = {name.split(",")[0].lower(): name.split(",")[0] for name in names}
    for word in words:
        if word.lower() not in methods:
            near = difflib.get_close_matches(word.lower(), methods, 1, 0.5)
            hint = f"did you mean {methods[near[0]]}?" if near else f"known are {', '.join(methods.values())}."
            raise ValueError(f"check-fidelity: no method {word!r}; {hint}")
    wanted = {word.lower() for word in words} or set(methods)
    return [name for name in names if name.split(",")[0].lower() in wanted]


def table(rows: Iterable[dict[str, Any]], widths: Sequence[int] = (0, 0)) -> Iterator[str]:
    """The lines of a table of Markdown, each as soon as its row is there; the first columns have these widths."""
    wide = [max(len(h), w) for h, w in zip(HEAD, (*widths, 12, 0, 0, 0), strict=True)]

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(c.ljust(n) for c, n in zip(cells, wide, strict=True))} |"

    yield from (line(HEAD), line("-" * n for n in wide))
    for row in rows:
        verdict = "agrees" if row["ok"] else "DIFFERS"
        yield line((row["method"], row["twin"], row["problem"], str(row["rounds"]), f"{row['error']:.0e}", verdict))


def main(args: Sequence[str]) -> int:
    """The command; the exit code is 1 where a method is not its twin."""
    parser = argparse.ArgumentParser("fedlight check-fidelity", description=str(__doc__).split(": ", 1)[1])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="algorithms and perturbations; by default all")
    parser.add_argument("--engine", default="eager", help="what trains: eager (the default), vmap or cuda_graph")
    parser.add_argument("--json", type=place, metavar="FILE", help="write the rows to a file as well")
    given = parser.parse_args(args)
    if given.json and not given.json.absolute().parent.is_dir():
        parser.error(f"--json {given.json}: there is no folder {given.json.absolute().parent}")
    cases = twins()
    names = chosen(given.methods, list(cases.comparisons()))
    rows: list[dict[str, Any]] = []

    def compare() -> Iterator[dict[str, Any]]:
        for name in names:
            rows.append(cases.compare(name, TOLERANCE, given.engine))
            yield rows[-1]

    logging.disable(logging.INFO)  # what a run says of itself
    try:
        with warnings.catch_warnings(action="ignore"):
            for text in table(compare(), (max(map(len, names)), max(len(cases.source(n)) for n in names))):
                print(text, flush=True)
    finally:
        logging.disable(logging.NOTSET)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n")
    agree = sum(row["ok"] for row in rows)
    print(f"\n{agree} of {len(rows)} agree within {TOLERANCE:.0e}, in float64, engine {given.engine}.")
    return int(agree < len(rows))
