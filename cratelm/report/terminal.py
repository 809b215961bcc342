"""Neurons on a terminal: excerpts with each token on the colour of its activation, or marked without colours."""

import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cratelm.activations.records import Excerpt
from cratelm.interpretation.lookup.tables import legible
from cratelm.report.neuron_table import NeuronTable
from cratelm.report.shown_text import visible

HEAT = ("#fff3bf", "#ffd875", "#ffab49", "#f77f4f")
"""Backgrounds by quarters of the neuron's largest activation; black text is readable on all of them."""
STRONG = 0.3
"""Share of the neuron's largest activation from which a token is marked on a terminal without colours."""
NUMBERS, EXPLANATIONS, STATUS = 60, 80, 100
"""Width of the terminal (columns) from which density and maximum, explanations, and the status are shown."""
LONGEST_STATUS = 11


def shows_colours(console: Console) -> bool:
    """Whether the console shows colours: not in a pipe, nor with NO_COLOR."""
    return console.color_system is not None and not console.no_color


def excerpt_text(excerpt: Excerpt, strings: Sequence[str], maximum: float, *, colours: bool) -> Text:
    """The tokens of an excerpt, coloured by activation, or the strong ones as «token»."""
    text = Text()
    for token, activation in zip(excerpt.tokens.tolist(), excerpt.activations.tolist(), strict=True):
        shown, share = visible(strings[token]), activation / maximum if maximum > 0 else 0.0
        if colours and share > 0:
            text.append(shown, style=f"#000000 on {HEAT[min(len(HEAT), math.ceil(len(HEAT) * share)) - 1]}")
        else:
            text.append(f"«{shown}»" if share >= STRONG and not colours else shown)
    return text


def legend(*, colours: bool) -> Text:
    """How to read an excerpt."""
    if not colours:
        return Text(f"«token»: at least {STRONG:.0%} of the neuron's largest activation")
    text = Text("colour: share of the neuron's largest activation, up to ")
    for level, background in enumerate(HEAT, start=1):
        text.append(f" {level / len(HEAT):.0%} ", style=f"#000000 on {background}")
    return text.append("; without colour: 0 or less")


def layer_table(table: NeuronTable, rows: Sequence[int], columns: int) -> Table:
    """A table of some neurons of a layer for a terminal of this width; a narrow one shows fewer columns."""
    numbers, explanations, status = (columns >= least for least in (NUMBERS, EXPLANATIONS, STATUS))
    explanations = explanations and bool(table.explanations)
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, width=columns)
    for head in ("neuron", *(("density %", "max") if numbers else ())):
        grid.add_column(head, justify="right", no_wrap=True)
    grid.add_column("score", justify="right", no_wrap=True, max_width=LONGEST_STATUS)
    if status:
        grid.add_column("status", no_wrap=True, max_width=LONGEST_STATUS)
    grid.add_column("strongest tokens", ratio=2, no_wrap=True, overflow="ellipsis")
    if explanations:
        grid.add_column("explanation", ratio=3, no_wrap=True, overflow="ellipsis")
    density, maximum, score = (table.column(name) for name in ("density", "max", "score"))
    strongest = table.strongest(np.array(rows, dtype=np.int64))
    for index, tokens in zip(rows, strongest, strict=True):
        cells = [str(index)]
        cells += [_short(density[index]), _short(maximum[index])] if numbers else []
        unscored = "-" if status else table.status[index]
        cells.append(unscored if np.isnan(score[index]) else f"{score[index]:z.1f}")
        cells += [table.status[index]] if status else []
        cells.append(" ".join(visible(legible(token)) for token in tokens))
        cells += [visible(table.explanations.get(index, ""))] if explanations else []
        grid.add_row(*map(Text, cells))
    return grid


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"
