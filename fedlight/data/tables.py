"""Tables of samples, by column: read from CSV, JSON, LEAF's JSON, and Hugging Face's datasets."""

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor

from fedlight.checks import path_of
from fedlight.data.folders import in_order, read_tree, split_of
from fedlight.data.reading import is_hf

Table = dict[str, list[Any]]
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t"}
"""What may part the columns of a file; of several, what the header holds most of."""
_WHOLE = re.compile(r"^(\d+)(?:\.0+)?$")
"""A whole number, also as pandas writes it beside empty cells: ``3.0``."""


def read_tables(source: Any, test_fraction: float = 0.2) -> dict[str, Table]:
    """The table of each split, ``train`` and where the source has them ``val`` and ``test``.

    The source is a file; a folder with a file for each split, or of LEAF, or with ``<label>/*.txt``, or that a dataset
    of Hugging Face was saved to; or such a dataset, or a mapping with one for each split.
    """
    if isinstance(source, str | Path):
        path = path_of("data.source", source)
        files = sorted(path.glob("*")) if path.is_dir() else [path]
        named = {file.name: file for file in files if ending_of(file) in (*DELIMITERS, ".jsonl", ".ndjson", ".parquet")}
        named |= {file.name: file for file in files if file.suffix == ".json" and split_of(file.name)[0]}
        if {"state.json", "dataset_dict.json"} & {file.name for file in files}:
            from datasets import load_from_disk

            return read_tables(load_from_disk(path))
        if is_leaf(path):
            return read_leaf(path)
        if path.is_dir() and not named:
            return _texts(path, test_fraction)
        source = named if path.is_dir() else {"train": path}
    held = source if isinstance(source, Mapping) else {"train": source}
    splits = [(split_of(str(name))[0], name) for name in held]
    found = {split: name for split, name in splits if split}
    other = [str(name) for split, name in splits if not split]
    if "train" not in found or len(found) + len(other) < len(held):
        raise ValueError(f"`data.source` needs one table for training, and may have one for val and test: {[*held]}.")
    if other:
        rank_zero_info(f"`data.source`: {', '.join(other)} is none of train, val and test, and left out.")
    return {split: read_table(held[name]) for split, name in found.items()}


def _texts(root: Path, test_fraction: float) -> dict[str, Table]:
    """The files of ``<label>/*.txt`` and ``<client>/<label>/*.txt``, with and without splits."""
    train, test, said = read_tree(root, {".txt"}, None, test_fraction)
    rank_zero_info(f"`data.source` ({root}): {said}.")
    tables: dict[str, Table] = {}
    for split, files in (("train", train), ("test", test)):
        tables[split] = {"text": [_text(f.path) for f in files], "label": [f.label for f in files]}
        if empty := [f.path for f, text in zip(files, tables[split]["text"], strict=True) if not text.strip()]:
            raise ValueError(f"`data.source`: {len(empty)} texts are empty, the first is {empty[0]}. Remove them.")
        tables[split] |= {"client": [f.domain for f in files]} if any(f.domain for f in files) else {}
    return tables


def _text(path: Path) -> str:
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            return str(file.read())
    except (OSError, EOFError, UnicodeError) as error:
        raise ValueError(f"`data.source`: {path} is not readable as UTF-8: {error}. Write it anew as UTF-8.") from error


def read_table(source: Any) -> Table:
    """The columns of a CSV or TSV file with a header, of JSON lines or Parquet, or of a Hugging Face dataset."""
    if is_hf(source):
        return {name: list(source.with_format(None)[name]) for name in source.column_names}
    if (ending := ending_of(source)) == ".parquet":
        try:
            import pyarrow.parquet as parquet

            return dict(parquet.read_table(source).to_pydict())
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(f"`data.source` ({source}): {error}. Parquet needs pyarrow; or write CSV.") from error
    text = _text(source)
    try:
        if ending in DELIMITERS:
            rows: Any = _csv_rows(text, DELIMITERS[ending])
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = json.loads("[" + ",\n".join(line for line in text.split("\n") if line.strip()) + "]")
        names = dict.fromkeys(name for row in rows for name in row.keys())  # noqa: SIM118
    except (AttributeError, csv.Error, ValueError, TypeError) as error:
        what = "no table, with an object or row for each sample (.csv, .tsv, .json, .jsonl, .parquet)"
        raise ValueError(f"`data.source` ({source}) is {what}: {error}") from error
    if not rows:
        raise ValueError(f"`data.source` ({source}) holds no samples.")
    first = {name: [*held.values()] if isinstance(held, dict) else held for name, held in rows[0].items()}
    lists = len(rows) == 1 and all(isinstance(held, list) for held in first.values())
    if lists and len({*map(len, first.values())}) == 1:
        return first  # the columns, as pandas writes them
    return {str(name): [row.get(name) for row in rows] for name in names}


def ending_of(file: Path) -> str:
    """``.csv`` of ``A.CSV`` and of ``a.csv.gz``."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _csv_rows(text: str, delimiters: str) -> list[dict[str, str | None]]:
    """The rows by the names of the header; cells that are empty are None, as those that are not there."""
    csv.field_size_limit(sys.maxsize)  # texts are longer than the csv module expects
    delimiter = max(delimiters, key=text.lstrip().partition("\n")[0].count)
    # Where every line is a row by itself, a quotation mark that its cell does not close begins none of many lines.
    stray = delimiter == "\t" and len({line.count("\t") for line in text.split("\n") if line.strip()}) == 1
    stray = stray and re.search(r'(?m)(^|\t)"(?![^\t\n]*"(\t|$))', text) is not None
    how: Any = {"quoting": csv.QUOTE_NONE if stray else csv.QUOTE_MINIMAL, "skipinitialspace": delimiter == ","}
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, **how)
    names = [*filter(None, rows.fieldnames or ())]
    if len({*names}) < len(names):
        raise ValueError(f"two columns have one name: {', '.join(names)}")
    out = []
    for row in rows:
        if rows.restkey in row:
            raise ValueError(f"line {rows.line_num} has more cells than the header; quote what holds a {delimiter!r}")
        out.append({name: (cell or "").strip() or None for name, cell in row.items()})
    return out


def is_leaf(path: Path) -> bool:
    """Whether a folder is laid out as LEAF's: ``train/*.json`` and ``test/*.json``."""
    return any((path / "train").glob("*.json"))


def read_leaf(path: Path) -> dict[str, Table]:
    """The columns ``text`` (x), ``label`` (y) and ``client`` of all files; a user of several files is one client.

    Source of the layout: Caldas et al., "LEAF: A Benchmark for Federated Settings", arXiv:1812.01097.
    """
    tables: dict[str, Table] = {}
    for file in sorted([*path.glob("train/*.json"), *path.glob("test/*.json")]):
        table = tables.setdefault(file.parent.name, {"text": [], "label": [], "client": []})
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
            for user, count in zip(held["users"], held["num_samples"], strict=True):
                x, y = (held["user_data"][user][name] for name in "xy")
                if not len(x) == len(y) == count:
                    raise ValueError(f"{user} has {len(x)} x and {len(y)} y, but num_samples is {count}")
                numbers = count and isinstance(x[0], list)  # arrays need a tenth of the room
                if numbers and any(isinstance(value, str) for value in x[0]):
                    raise ValueError(f"x of {user} are lists with texts; write one text for each sample, or numbers")
                table["text"] += list(np.asarray(x, np.float32)) if numbers else x
                table["label"] += y
                table["client"] += [str(user)] * count
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = "no file of LEAF, with users, num_samples and user_data"
            raise ValueError(f"`data.source`: {file} is {what}: {type(error).__name__}: {error}") from error
    return tables


def column(table: Table, name: str, key: str, where: str = "") -> list[Any]:
    """A column by its name; errors name the columns that there are, or the first sample without it."""
    if name not in table:
        found = ", ".join(filter(None, table))
        raise ValueError(f"`data.{key}` is {name!r}, but the columns of `data.source`{where} are {found}.")
    if lacking := [row for row, v in enumerate(table[name]) if v is None or isinstance(v, list | dict) or v != v]:
        what = f"{len(lacking)} samples have no {name!r}; the first is sample {lacking[0]}"
        raise ValueError(f"`data.{key}`: {what}: {table[name][lacking[0]]!r} is not one value.")
    return [_WHOLE.sub(r"\1", str(v)) for v in table[name]] if key.endswith("client") else table[name]


def coded(values: Sequence[Any], known: Collection[str], what: str) -> tuple[Tensor, list[str]]:
    """Labels as numbers ``[n]`` int64, and the names of the classes, which are those ``known`` of training samples.

    Whole numbers from 0 on are what they are, with few gaps; all else is numbered as it sorts. Errors name ``what``.
    """
    words = [str(value) for value in values]
    if all(_WHOLE.fullmatch(word) for word in known):
        known, words = {_WHOLE.sub(r"\1", word) for word in known}, [_WHOLE.sub(r"\1", word) for word in words]
    names = in_order(known)
    if names[0] == "0" and all(word.isdecimal() and word == str(int(word)) for word in names):
        if (count := int(names[-1]) + 1) > 1000 * len(names):
            why = f"which would be {count} classes. Number them anew, or give them names."
            raise ValueError(f"{what}: labels are {len(names)} different whole numbers from 0 to {names[-1]}, {why}")
        names = [str(number) for number in range(count)]
    number = {name: i for i, name in enumerate(names)}
    if strange := sorted({*words} - {*names}):
        raise ValueError(f"{what}: held-out samples have labels that no training sample has: {strange[:5]}.")
    return torch.tensor([number[word] for word in words]), names
