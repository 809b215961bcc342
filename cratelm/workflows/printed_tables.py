"""Tables of the report, printed to fit the terminal."""

from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from cratelm.report.tables.form import ABSENT, Table, written


def print_tables(tables: tuple[Table, ...]) -> None:
    """Print tables with each model's name before its first row; on a narrow terminal one number per line."""
    console = Console(highlight=False, markup=False, emoji=False)
    for table in tables:
        console.print(Text(table.caption.removeprefix("White-box view: ").capitalize(), style="bold"))
        shown = [column for column in table.columns if column.title not in ("Tokens per set", "Sets")]
        rows = [[written(cell, column.style) for cell, column in zip(row, shown, strict=False)] for row in table.rows]
        widths = _column_widths([column.heading for column in shown], rows, console.width)
        if widths is None:
            _show_lines(console, [column.heading for column in shown], rows)
            continue
        grid = Grid(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for column, width in zip(shown, widths, strict=True):
            side: Literal["left", "right"] = "left" if column.style == "text" else "right"
            grid.add_column(Text(column.heading), justify=side, width=width)
        for row, before in zip(rows, [None, *rows], strict=False):
            grid.add_row(*map(Text, ["" if before and before[0] == row[0] else row[0], *row[1:]]))
        console.print(grid)
        console.print()


def _column_widths(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Column widths that break no number and no word of a heading or a name; None if the terminal is too narrow.

    Spare columns go to the names first, then to the headings that wrap most.
    """
    columns = list(zip(*rows, strict=True)) or [()] * len(headings)
    words = [[*heading.split(), *cells] for heading, cells in zip(headings, columns, strict=True)]
    words[0] = [word for text in words[0] for word in text.split()]
    sizes = [max(map(len, column)) for column in words]
    free = width - sum(sizes) - (len(sizes) - 1)
    if free < 0:
        return None
    longest = max(map(len, (headings[0], *columns[0])))
    wider = min(free, longest - sizes[0])
    sizes[0] += wider
    for _ in range(free - wider):
        needs = [len(heading) / size for heading, size in zip(headings, sizes, strict=True)]
        if max(needs) <= 1:
            break
        sizes[needs.index(max(needs))] += 1
    return sizes


def _show_lines(console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print each row as a block of lines: a value and its heading."""
    for row in rows:
        console.print(f"{row[0]}, {headings[1].lower()} {row[1]}")
        for heading, value in zip(headings[2:], row[2:], strict=True):
            if value != ABSENT:
                console.print(f"  {value:>9}  {heading}", soft_wrap=True)
        console.print()
