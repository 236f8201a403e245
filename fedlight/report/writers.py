"""What a report consists of, and how it is written: as Markdown, as one HTML file, a table for LaTeX."""

import base64
import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedlight.run.folder import atomic_write


class Cell(NamedTuple):
    """A cell of a table; what is best in its column is bold."""

    text: str
    bold: bool = False


class Heading(NamedTuple):
    """A heading: level 1 is the title."""

    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph; a warning stands out."""

    text: str
    warning: bool = False


class Table(NamedTuple):
    """A table; the first column is text, the others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


class Picture(NamedTuple):
    """A picture in a file, with a caption."""

    path: Path
    caption: str


Block = Heading | Text | Table | Picture
"""A document is a list of these."""


def cells(*texts: str) -> list[Cell]:
    """A row of plain cells."""
    return [Cell(text) for text in texts]


_CSS = """
body { font: 15px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; color: #111; background: #fff;
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
h3 { font-size: 1.05rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92em; margin: 0.6rem 0; }
th, td { padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #111; } tbody tr { border-bottom: 1px solid #ddd; }
table.text th, table.text td { text-align: left; }
p.note, figcaption { color: #444; font-size: 0.88em; margin-top: 0; }
p.warning { border-left: 4px solid #111; background: #f2f2f2; padding: 0.5rem 0.8rem; }
figure { display: inline-block; vertical-align: top; width: 34rem; max-width: 100%; margin: 1rem 1rem 0 0; }
img { max-width: 100%; height: auto; }
""".strip()


def write_markdown(document: Sequence[Block], path: Path) -> None:
    """Write GitHub's Markdown; pictures are linked by their path beside the file."""
    parts = []
    for block in document:
        if isinstance(block, Heading):
            parts.append("#" * block.level + " " + _markdown(block.text))
        elif isinstance(block, Text):
            parts.append(("> " if block.warning else "") + _markdown(block.text))
        elif isinstance(block, Table):
            parts.append(_markdown_table(block))
        else:
            link = os.path.relpath(block.path, path.parent).replace(os.sep, "/").replace(" ", "%20")
            parts.append(f"![{_markdown(block.caption)}]({link})\n\n{_markdown(block.caption)}")
    _write(path, "\n\n".join(parts) + "\n")


def _markdown_table(table: Table) -> str:
    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    rows = [[f"**{_markdown(c.text)}**" if c.bold else _markdown(c.text) for c in row] for row in table.rows]
    rule = ["---", *("---" if _is_text(table) else "---:" for _ in table.header[1:])]
    lines = [line([_markdown(h) for h in table.header]), line(rule), *(line(row) for row in rows)]
    return "\n".join(lines) + (f"\n\n{_markdown(table.note)}" if table.note else "")


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", text).replace("\n", " ")


def _is_text(table: Table) -> bool:
    """Whether the cells behind the first column are words rather than numbers."""
    behind = [cell.text for row in table.rows for cell in row[1:] if cell.text not in ("", "–")]
    numbers = sum(re.match(r"[+>~]? ?-?\d", text) is not None for text in behind)
    return numbers * 2 < len(behind)


def write_html(document: Sequence[Block], path: Path) -> None:
    """Write one file that needs no other: pictures are part of it."""
    title = next((b.text for b in document if isinstance(b, Heading)), "report")
    body = "\n".join(_html(block) for block in document)
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>\n{_CSS}\n</style>'
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    page = f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n{viewport}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    _write(path, page)


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f'<p class="{"warning" if block.warning else "text"}">{html.escape(block.text)}</p>'
    if isinstance(block, Table):
        return _html_table(block)
    caption, data = html.escape(block.caption), base64.b64encode(block.path.read_bytes()).decode()
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _html_table(table: Table) -> str:
    def cell(cell: Cell) -> str:
        text = html.escape(cell.text)
        return f"<td><strong>{text}</strong></td>" if cell.bold else f"<td>{text}</td>"

    head = "".join(f"<th>{html.escape(h)}</th>" for h in table.header)
    rows = "\n".join("<tr>" + "".join(cell(c) for c in row) + "</tr>" for row in table.rows)
    kind = ' class="text"' if _is_text(table) else ""
    note = f'\n<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    body = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
    return f'<div class="scroll"><table{kind}>{body}</table></div>{note}'


def write_latex(table: Table, path: Path) -> None:
    """Write a table that needs the package booktabs."""
    columns = "l" + "r" * (len(table.header) - 1)
    lines = [r"% \usepackage{booktabs}", f"% {table.note}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(_latex(h) for h in table.header) + r" \\", r"\midrule"]
    for row in table.rows:
        lines.append(" & ".join(rf"\textbf{{{_latex(c.text)}}}" if c.bold else _latex(c.text) for c in row) + r" \\")
    _write(path, "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n")


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "–": "--", ">": "$>$", "<": "$<$",
}  # fmt: skip
_GREEK = "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi omega"
_LATEX |= {letter: rf"$\{name}$" for letter, name in zip("αβγδεζηθκλμνξπρστφχψω", _GREEK.split(), strict=True)}
_LATEX |= {letter.upper(): rf"$\{_LATEX[letter][2].upper()}{_LATEX[letter][3:]}" for letter in "γδθλξπσφψω"}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text.encode())
