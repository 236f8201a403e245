"""Names that tell of splits, of folders and of arrays: train, val and test in their usual spellings."""

import re
from collections.abc import Collection

_SPELLINGS = {
    "train": "training|train|trn",
    "val": "validation|validating|validate|valid|val|development|devel|dev|evaluation|eval",
    "test": "testing|tests|test|tst",
}
FILLERS = "sets?|data(?:sets?)?|images?|imgs?|splits?|samples?|folder|dir|the|my"
_WORD = re.compile(rf"({FILLERS}|x|y)??({'|'.join(_SPELLINGS.values())})({FILLERS}|x|y|labels?)?")


def split_of(name: str) -> tuple[str | None, list[str]]:
    """Which split a name tells of: ``train``, ``val``, ``test`` or None; and its other words, lower case, no digits."""
    kinds, rest = [], []
    for word in re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)):
        found = _WORD.fullmatch(word.lower())
        rest += [part for part in (found.group(1, 3) if found else [word.lower()]) if part]
        kinds += [kind for kind, words in _SPELLINGS.items() if found and re.fullmatch(words, found[2])]
    return (kinds[0] if len(kinds) == 1 else None), rest


def splits_among(names: Collection[str]) -> dict[str, str]:
    """The split of each folder that is one: called just that, or as another but for it (`seg_train`, `seg_test`)."""
    kinds = {name: split_of(name)[0] for name in names}
    rest = {name: [word for word in split_of(name)[1] if not re.fullmatch(FILLERS, word)] for name in names}
    alike = {name: {kinds[other] for other in names if rest[other] == rest[name]} - {None} for name in names}
    return {name: kind for name, kind in kinds.items() if kind and (not rest[name] or len(alike[name]) > 1)}
