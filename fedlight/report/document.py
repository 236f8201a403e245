"""What a report consists of, before it is written as Markdown or HTML."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what stands in it.
        bold: whether it is the best of its column.
    """

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading: level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; a warning stands out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, the others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture in a file, with a caption."""

    path: Path
    caption: str


Block = Heading | Text | Table | Picture
"""A document is a list of these."""


def cells(*texts: str) -> list[Cell]:
    """A row of plain cells."""
    return [Cell(text) for text in texts]
