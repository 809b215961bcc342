"""Tables: columns and rows of plain values, written as Markdown, CSV and LaTeX.

Rounding depends on the column only, so every format shows the same numbers; CSV is not rounded.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cratelm.rundir import write_text
from cratelm.runtime import human

Style = Literal["text", "count", "human", "0.1", "0.01", "0.001", "interval", "share"]

Cell = str | int | float | tuple[float, float] | tuple[int, int] | None

ABSENT = "\N{EN DASH}"
"""Stands for a missing number."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column: title, format of its values, and unit."""

    title: str
    style: Style = "text"
    unit: str = ""

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A caption, columns, and rows with a cell for each column."""

    name: str
    """Name of its files, without suffix."""
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    """Sentences below the table."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"ragged rows in table {self.name}"


def without_columns(table: Table, *titles: str) -> Table:
    """The table without the columns of these titles."""
    remaining = [i for i, column in enumerate(table.columns) if column.title not in titles]
    columns = tuple(table.columns[i] for i in remaining)
    return replace(table, columns=columns, rows=tuple(tuple(row[i] for i in remaining) for row in table.rows))


def written(cell: Cell, style: Style) -> str:
    """A cell as text: rounded, with a typographic minus, an interval in brackets, a dash for a missing number."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, tuple):
        if style == "share":
            return "/".join(written(part, "count") for part in cell)
        return f"[{written(cell[0], '0.1')}, {written(cell[1], '0.1')}]"
    if cell is None or not math.isfinite(cell):
        return ABSENT
    if style == "human":
        return human(float(cell))
    digits = len(style) - 2 if style.startswith("0.") else 0
    text = f"{cell:,.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text.replace(",", "")) else text.lstrip("-")


def as_markdown(table: Table) -> str:
    """The table as GitHub's Markdown, numbers right-aligned."""
    rule = ["---" if column.style == "text" else "---:" for column in table.columns]
    lines = [[_markdown(column.heading) for column in table.columns], rule]
    lines += [[_markdown(text) for text in row] for row in texts(table)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"\n{_markdown(note)}\n" for note in table.notes)
    return f"**{_markdown(table.caption)}**\n\n{body}\n{notes}"


def as_csv(table: Table) -> str:
    """The table as CSV: unrounded numbers, an interval in two columns, an empty field for a missing number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([heading for column in table.columns for heading in _csv_headings(column)])
    for row in table.rows:
        cells = zip(row, table.columns, strict=True)
        writer.writerow([value for cell, column in cells for value in _csv_values(cell, column)])
    return out.getvalue()


def as_latex(table: Table) -> str:
    """The table as LaTeX for the booktabs package; all special characters are escaped."""
    alignment = "".join("l" if column.style == "text" else "r" for column in table.columns)
    head = " & ".join(_latex(column.heading) for column in table.columns)
    body = [" & ".join(_latex(text) for text in row) + r" \\" for row in texts(table)]
    notes = [rf"\par\smallskip\footnotesize {_latex(' '.join(table.notes))}"] if table.notes else []
    lines = [
        "% needs \\usepackage{booktabs,graphicx}", r"\begin{table}", r"\centering",
        rf"\caption{{{_latex(table.caption)}}}", rf"\label{{tab:{table.name}}}", r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", head + r" \\", r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}}", *notes, r"\end{table}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Table], str]] = {"md": as_markdown, "csv": as_csv, "tex": as_latex}
"""File suffix -> writer."""


def write_tables(tables: Sequence[Table], out: Path) -> list[Path]:
    """Write each table in each format."""
    paths = []
    for table in tables:
        for suffix, write in FORMATS.items():
            paths.append(out / f"{table.name}.{suffix}")
            write_text(paths[-1], write(table))
    return paths


def texts(table: Table) -> Iterator[list[str]]:
    """The rows as text."""
    for row in table.rows:
        yield [written(cell, column.style) for cell, column in zip(row, table.columns, strict=True)]


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _markdown(text: str) -> str:
    escaped = re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", _one_line(text))
    return escaped.replace("&", "&amp;")


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "\N{MINUS SIGN}": "$-$", ABSENT: "--",
    "²": r"\textsuperscript{2}", "ᶜ": r"\textsuperscript{c}", "×": r"$\times$", "‖": r"$\|$", "[": "{[}", "]": "{]}",
} | {letter: "\\" + letter for letter in "&%$#_{}"}  # fmt: skip


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in _one_line(text))


_ENDS: dict[Style, tuple[str, str]] = {"interval": ("low", "high"), "share": ("neurons", "of")}
"""The titles of a pair's two columns in CSV."""


def _csv_headings(column: Column) -> list[str]:
    return [f"{column.heading}, {end}" for end in _ENDS[column.style]] if column.style in _ENDS else [column.heading]


def _csv_values(cell: Cell, column: Column) -> list[str | int | float]:
    if column.style in _ENDS:
        return list(cell) if isinstance(cell, tuple) else ["", ""]
    if isinstance(cell, str):
        # A spreadsheet runs a text with such a prefix as a formula.
        return [f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell]
    assert not isinstance(cell, tuple)
    return ["" if cell is None or not math.isfinite(cell) else cell]


def points(value: float | None) -> str:
    """Points to 0.1, or `undefined`."""
    return "undefined" if value is None else written(value, "0.1")
