"""List the neurons of a layer, or look at one: what it fires on, how strongly, and how well that is explained.

    cratelm neurons runs/demo/crate-2l --layer 1 --sort score
    cratelm neurons runs/demo/crate-2l --filter "density<1" "max>2" "token=return"
    cratelm neurons runs/demo/crate-2l --layer 1 --neuron 17

Needs the records that `cratelm collect` wrote; scores and explanations are shown where `cratelm interpret` made them.
Density is in percent of all tokens, a score in points (100 is perfect, 0 is chance), all else in the model's own
units. Through a pipe or with NO_COLOR, strong tokens are marked «so»; COLUMNS=200 makes the table wider.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from cratelm.activations.records import Mode
from cratelm.report.neuron_table import Column, NeuronTable, open_table
from cratelm.workflows.recorded import find_layers, layer_spans

if TYPE_CHECKING:
    from rich.console import Console


NEIGHBOUR_LISTS = {
    "nearest by what they write (cosine)": ("similar_neuron", "similar_cosine"),
    "nearest by when they fire (Jaccard)": ("cofiring_neuron", "cofiring_jaccard"),
}
SHOWN_NEIGHBOURS = 5
DIRECTIONS = {
    "tokens_in": "tokens in (their embedding drives it)", "tokens_alone": "tokens that drive it alone in a document",
    "tokens_out": "tokens out (its direction makes them probable)",
    "predecessors": "driven by neurons of layer {before}", "successors": "drives neurons of layer {after}",
}  # fmt: skip
"""List of a neuron's directions -> how it is introduced."""
SHOWN_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which neurons to show."""

    run: tyro.conf.Positional[Path]
    """Run directory with the records that `cratelm collect` wrote."""
    layer: int | None = None
    """Zero-based layer; the first that has records if left out."""
    neuron: int | None = None
    """Zero-based neuron to look at, with its excerpts; left out, the layer is listed."""
    sort: Column = "neuron"
    """Column to sort by: neuron by index, all others from the highest value down."""
    reverse: bool = False
    """Sort the other way."""
    filter: tuple[str, ...] = ()
    """Conditions that must all hold, in quotes: "score>50", "density<0.1", "status=dead", "token=return"."""
    protocol: str = ""
    """Protocol whose scores and explanations to show; the first that is scored if left out."""
    limit: int = 20
    """List at most N neurons; 0 for all."""
    excerpts: int = 5
    """With --neuron: show N excerpts of each kind; 0 for all."""
    width: int | None = None
    """With --neuron: length of the excerpts in tokens; the longest recorded if left out."""
    mode: Mode = "fixed"
    """Which records."""
    tap: str = "neurons"
    """Which place of the model the records are of."""
    explainer: str = "lookup"
    """Who made the explanations to show."""


def run(options: Options) -> None:
    """Print the list, or one neuron."""
    from rich.console import Console

    layers = find_layers(options.run, options.mode, options.tap)
    wanted = () if options.layer is None else (options.layer,)
    layer = find_layers(options.run, options.mode, options.tap, wanted)[0]
    table = open_table(
        options.run, layer, mode=options.mode, tap=options.tap, protocol=options.protocol, explainer=options.explainer
    )
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if options.neuron is None:
        _list(console, table, options, layers)
    else:
        _look(console, table, options, options.neuron)


def _list(console: "Console", table: NeuronTable, options: Options, layers: Sequence[int]) -> None:
    from cratelm.report.terminal import layer_table

    rows = table.choose(options.filter, options.sort, reverse=options.reverse)
    shown = rows[: options.limit] if options.limit > 0 else rows
    total = table.records.num_neurons
    console.print(
        f"{options.run.name}, layer {table.records.layer}: {total} neurons (layers with records: {layer_spans(layers)})"
    )
    if table.scores is not None:
        console.print(f"scores and explanations: {table.protocol}, by {options.explainer}")
    console.print()
    console.print(layer_table(table, shown.tolist(), console.width))
    console.print()
    passed = f" that pass {' and '.join(options.filter)}" if options.filter else ""
    more = "" if len(shown) == len(rows) else "; --limit 0 shows all"
    console.print(f"{len(shown)} of {len(rows)} neurons{passed}{more}. Look at one with --neuron")
    if table.hint:
        print(table.hint)


def _look(console: "Console", table: NeuronTable, options: Options, index: int) -> None:
    from cratelm.report.export.neuronrecord import choose_width
    from cratelm.report.terminal import excerpt_text, legend, shows_colours

    record, colours = table.records[index], shows_colours(console)
    width = choose_width(table.records, options.width)
    total = table.records.num_neurons
    console.print(f"{options.run.name}, layer {table.records.layer}, neuron {index} (of 0 to {total - 1})")
    for line in (*_facts(table, index), *_directions(options.run, table, index)):
        console.print(line)
    if table.hint:
        print(table.hint)
    console.print()
    console.print(legend(colours=colours))
    maximum = record.statistics["maximum"]
    for (wide, split, kind), excerpts in sorted(record.excerpts.items(), key=_strongest_kind_first):
        if wide != width:
            continue
        count = len(excerpts) if options.excerpts <= 0 else min(options.excerpts, len(excerpts))
        purpose = {"explain": " for explaining", "score": " for scoring"}.get(split, "")
        console.print(f"\n{kind} excerpts{purpose}: {count} of {len(excerpts)}, {wide} tokens each")
        for excerpt in _spread(excerpts, count) if kind == "quantile" else excerpts[:count]:
            peak = max(excerpt.activations.tolist(), default=0.0)
            console.print(f"\n  document {excerpt.document}, at most {peak:.3g}")
            console.print(excerpt_text(excerpt, table.strings, maximum, colours=colours))


def _facts(table: NeuronTable, index: int) -> Iterator[str]:
    """Statistics, scores and explanations of one neuron, a line each."""
    from cratelm.report.shown_text import visible

    names = ("density", "max", "min", "mean", "variance", "skewness", "kurtosis")
    values = {name: float(table.column(name)[index]) for name in names}
    yield ", ".join(f"{name} {value:.3g}{' %' if name == 'density' else ''}" for name, value in values.items())
    for name, one in table.interpretations.items():
        if one.scores is None:
            score = "not scored"
        elif one.scores.reason[index]:
            score = f"no score: {one.scores.reason[index]}"
        else:
            score = f"{100 * one.scores.correlation[index]:z.1f} points over {one.scores.tokens[index]} tokens"
        said = one.explanations.get(index)
        yield f"{name}: {score}" + (f"; {visible(said)}" if said else "")
    for name, (indices, closeness) in NEIGHBOUR_LISTS.items():
        if indices in table.records.tables:
            pairs = zip(table.records.tables[indices][index], table.records.tables[closeness][index], strict=True)
            yield f"{name}: " + ", ".join(f"{other} ({value:.2f})" for other, value in list(pairs)[:SHOWN_NEIGHBOURS])


def _directions(run: Path, table: NeuronTable, index: int) -> Iterator[str]:
    """What its weights say, a line for each list; nothing before `cratelm directions` or at another tap."""
    from cratelm.activations.direction_files import TOKEN_LISTS, directions_file, read_directions
    from cratelm.report.shown_text import visible

    tap, layer = table.records.tap, table.records.layer
    if not directions_file(run, layer, tap).exists():
        if tap == "neurons":
            yield f"what it reads and writes: cratelm directions {run}"
        return
    found = read_directions(run, layer, tap=tap)
    for name in found.lists:
        said = DIRECTIONS[name].format(before=layer - 1, after=layer + 1)
        if name in TOKEN_LISTS:
            shown = (f"«{visible(table.strings[token])}»" for token, _ in found.ranked(name, index)[:SHOWN_TOKENS])
        else:
            pairs = found.ranked(name, index)[:SHOWN_NEIGHBOURS]
            shown = (f"{other} ({value:.2f})" for other, value in pairs)
        yield f"{said}: {' '.join(shown) or 'none'}"
    for name, shares in found.head_shares(index).items():
        said = "fed by heads of this layer" if name == "heads_in" else f"read by heads of layer {layer + 1}"
        kind = name.partition(".")[2].replace("shared", "")
        yield f"{said}{f' ({kind})' if kind else ''}: " + ", ".join(f"{share:.0%}" for share in shares)


def _strongest_kind_first(item: tuple[tuple[int, str, str], object]) -> tuple[int, str]:
    (_, split, kind), _excerpts = item
    return ("top", "quantile", "random").index(kind), split


def _spread(excerpts: Sequence, count: int) -> Iterator:
    """`count` items, evenly spaced from the first (weakest) to the last (strongest)."""
    for i in range(count):
        yield excerpts[round(i * (len(excerpts) - 1) / max(count - 1, 1))]
