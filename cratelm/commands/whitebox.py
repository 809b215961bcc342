"""Look inside each layer: coding rates before and after attention, sparsity, the LASSO objective, the dictionary.

    cratelm whitebox runs/crate-2l runs/gpt2-2l runs/crate-2l-random --data tokens

CRATE is derived from an objective, sparse rate reduction; this measures it. For every layer: how many nats the tokens
take, as a whole and in the heads' subspaces, before and after attention; how sparse the code is after each ISTA step,
how far the steps come with their LASSO objective, and whether steps of this size suit the dictionary.
GPT-2 has the first two. Written to whitebox.json in each run, with tables and figures in the report's folder, where
`cratelm report` shows them too; along a training with `cratelm train --measure whitebox`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cratelm.errors import CrateError
from cratelm.runtime import DeviceName, progress_bar, select_device

if TYPE_CHECKING:
    from rich.console import Console

    from cratelm.report.tables.form import Table


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm whitebox`."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    """Run directories; name random-init controls along with their models."""
    data: Path
    """Token directory to read."""
    tokenizer: str | None = None
    """Tokenizer of a nanoGPT directory, which has no tokens.json."""
    split: str = "val"
    """Split to read; held-out text by default."""
    tokens: str = "32k"
    """Read so many tokens, as in 32k or 1M, in whole sets."""
    epsilon: float = 0.1
    """Precision of the coding rates, in units of the tokens."""
    tolerance: float = 1e-3
    """Codes up to this count as zero in the share that is given within tolerance."""
    out: Path | None = None
    """Folder of tables and figures; left out, `report` in the folder that holds the runs, or in a single run."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Measure each run, then write and print what all have."""
    from cratelm.commands.collect import read_count
    from cratelm.commands.report import default_folder
    from cratelm.report.figures.form import write_figures
    from cratelm.report.figures.whitebox import whitebox_figures
    from cratelm.report.results.whitebox import open_views
    from cratelm.report.tables.form import write_tables
    from cratelm.report.tables.whitebox import whitebox_tables
    from cratelm.whitebox.coding_rate import EPSILON_RANGE

    if not options.runs:
        raise CrateError("no run directory was named. Run: cratelm whitebox RUN --data DIR")
    least, most = EPSILON_RANGE
    if not least <= options.epsilon <= most:
        raise CrateError(f"--epsilon is {options.epsilon:g}, it must be between {least:g} and {most:g}")
    if not 0 <= options.tolerance < math.inf:
        raise CrateError(f"--tolerance is {options.tolerance:g}, it must be a number, 0 or more")
    count = read_count(options.tokens)
    for one in options.runs:
        whitebox_run(one, options, count)
    views = open_views(options.runs)
    tables = whitebox_tables(views)
    out = options.out or default_folder(options.runs)
    write_tables(tables, out)
    write_figures(whitebox_figures(views), out)
    show(tables)
    print(f"\n{(out / 'whitebox.svg') if not out.is_relative_to('..') else (out / 'whitebox.svg').resolve()}")


def whitebox_run(folder: Path, options: Options, count: int | None) -> None:
    """Measure one run and write its whitebox.json."""
    from cratelm.commands.collect import open_tokens
    from cratelm.model.weights import weights_hash
    from cratelm.report.results.whitebox import FILE
    from cratelm.rundir import claim, origin, write_json
    from cratelm.whitebox.measure import MeasureConfig, measure
    from cratelm.workflows.opening import open_own

    model, tokenizer = open_own(folder)
    data = open_tokens(options.data, options.tokenizer, tokenizer, folder)
    if data.vocab_size > model.config.vocab_size:
        raise CrateError(
            f"the tokens of {options.data} are of {data.vocab_size} kinds, the model of {folder} knows "
            f"{model.config.vocab_size}. Tokenize with the model's own tokenizer"
        )
    tokens = data.tokens(options.split)
    config = MeasureConfig(
        tokens=len(tokens) if count is None else count, epsilon=options.epsilon, tolerance=options.tolerance
    )
    model.to(select_device(options.device))
    with claim(folder), progress_bar(f"whitebox {folder.name}", total=min(config.tokens, len(tokens))) as bar:
        found = measure(model, tokens, config, bar=bar)
        identity = {"model_hash": weights_hash(model), "data_hash": data.splits[options.split].sha256}
        write_json(folder / FILE, {"split": options.split, **identity, **found, "origin": origin()})


def show(tables: "tuple[Table, ...]") -> None:
    """Print the tables, a model's name before its first row; on a narrow terminal each number on a line of its own."""
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    from cratelm.report.tables.form import written

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
    """Widths at which no word of a heading or a name breaks, and no number; None where there is no room for that.

    What is left goes to the names first, then to the headings that wrap most.
    """
    columns = list(zip(*rows, strict=True)) or [()] * len(headings)
    words = [[*heading.split(), *cells] for heading, cells in zip(headings, columns, strict=True)]
    words[0] = [word for text in words[0] for word in text.split()]
    found = [max(map(len, one)) for one in words]
    free = width - sum(found) - (len(found) - 1)
    if free < 0:
        return None
    longest = max(map(len, (headings[0], *columns[0])))
    wider = min(free, longest - found[0])
    found[0] += wider
    for _ in range(free - wider):
        needs = [len(heading) / size for heading, size in zip(headings, found, strict=True)]
        if max(needs) <= 1:
            break
        found[needs.index(max(needs))] += 1
    return found


def _show_lines(console: "Console", headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Each row as a block of lines: a value and what it is."""
    from cratelm.report.tables.form import ABSENT

    for row in rows:
        console.print(f"{row[0]}, {headings[1].lower()} {row[1]}")
        for heading, value in zip(headings[2:], row[2:], strict=True):
            if value != ABSENT:
                console.print(f"  {value:>9}  {heading}", soft_wrap=True)
        console.print()
