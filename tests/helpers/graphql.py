"""What a GraphQL server does with a query: it answers the fields that were asked, by the names that were asked for."""

import re
from typing import Any

Selection = dict[str, tuple[str, "Selection | None"]]
"""By the name in the answer: the field, and what is asked of it."""


def operation(query: str) -> str:
    """The name of a query's operation."""
    found = re.search(r"(?:query|mutation)\s+(\w+)", query)
    return "" if found is None else found[1]


def answer(query: str, data: dict[str, Any]) -> Any:
    """The part of ``data`` that a query asks for; null where there is none.

    Raises:
        AssertionError: if the data has other shapes than what is asked for.
    """
    text = re.sub(r"#[^\n]*", "", query)
    while (shorter := re.sub(r"\([^()]*\)", "", text)) != text:  # arguments
        text = shorter
    tokens = re.findall(r"\.\.\.|[{}:]|\w+", re.sub(r"@\w+", "", text))
    fragments: dict[str, Selection] = {}
    asked: Selection = {}
    while tokens:
        head = tokens[: tokens.index("{")]
        del tokens[: len(head)]
        selected = _selection(tokens)
        if head[:1] == ["fragment"]:
            fragments[head[1]] = selected
        else:
            asked = selected
    return _pick(asked, data, fragments)


def _selection(tokens: list[str]) -> Selection:
    selected: Selection = {}
    assert tokens.pop(0) == "{"
    while (name := tokens.pop(0)) != "}":
        if name == "...":
            name = tokens.pop(0)
            if name == "on":
                tokens.pop(0)
                selected |= _selection(tokens)
            else:
                selected[f"...{name}"] = (name, None)
            continue
        field = name
        if tokens[0] == ":":
            field = tokens[1]
            del tokens[:2]
        selected[name] = (field, _selection(tokens) if tokens[0] == "{" else None)
    return selected


def _pick(asked: Selection | None, data: Any, fragments: dict[str, Selection]) -> Any:
    if data is None:
        return None
    if isinstance(data, list):
        return [_pick(asked, entry, fragments) for entry in data]
    if asked is None:
        assert not isinstance(data, dict), f"a whole object was answered where a value is asked for: {data}"
        return data
    assert isinstance(data, dict), f"{list(asked)} are asked of {data!r}"
    out: dict[str, Any] = {}
    for name, (field, below) in asked.items():
        if name.startswith("..."):
            out |= _pick(fragments[field], data, fragments)
        else:
            out[name] = _pick(below, data.get(field), fragments)
    return out
