"""List the neurons of a layer, or show one neuron: its excerpts, statistics, scores and explanations.

    cratelm neurons runs/demo/crate-2l --layer 1 --sort score
    cratelm neurons runs/demo/crate-2l --filter "density<1" "max>2" "token=return"
    cratelm neurons runs/demo/crate-2l --layer 1 --neuron 17

Needs the records that `cratelm collect` wrote; scores and explanations need `cratelm interpret`. Density is in percent
of all tokens, a score in points (100 is perfect, 0 is chance), all other columns in activation units. In a pipe or with
NO_COLOR, tokens with a strong activation are marked «like this»; COLUMNS=200 makes the table wider.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cratelm.activations.records import Mode
from cratelm.activations.row_beginning import lines_on_beginning
from cratelm.report.neuron_table import NeuronTable, SortColumn, open_table
from cratelm.report.shown_text import visible
from cratelm.workflows.options.arguments import RunPath
from cratelm.workflows.recorded import find_layers, layer_spans

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
"""Name of a list in the files of `cratelm directions` -> its heading."""
SHOWN_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which neurons to show."""

    run: RunPath
    """Run directory with the records that `cratelm collect` wrote."""
    layer: int | None = None
    """Zero-based layer; by default the first that has records."""
    neuron: int | None = None
    """Zero-based neuron to show with its excerpts; by default the layer is listed."""
    sort: SortColumn = "neuron"
    """Column to sort by: neuron by index, other columns from the highest value down."""
    reverse: bool = False
    """Reverse the order."""
    filter: tuple[str, ...] = ()
    """Conditions that must all hold, in quotes: "score>50", "density<0.1", "status=dead", "token=return"."""
    protocol: str = ""
    """Protocol of the scores and explanations; by default the first that is scored."""
    limit: int = 20
    """List at most N neurons; 0 for all."""
    excerpts: int = 5
    """With --neuron: show N excerpts of each kind; 0 for all."""
    width: int | None = None
    """With --neuron: length of the excerpts in tokens; by default the longest that is recorded."""
    mode: Mode = "fixed"
    """Mode of the records."""
    tap: str = "neurons"
    """Tap of the records: neurons, sae-NAME, or another tap given to `cratelm collect --tap`."""
    explainer: str = "lookup"
    """Explainer of the explanations to show: lookup, or the name of a language model."""


def run(options: Options) -> None:
    """Print the list, or one neuron."""
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


def _list(console: Console, table: NeuronTable, options: Options, layers: Sequence[int]) -> None:
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
    console.print(f"{len(shown)} of {len(rows)} neurons{passed}{more}. Show one with --neuron")
    for line in lines_on_beginning(options.run, options.mode, table.strings):
        console.print(visible(line))
    if table.hint:
        print(table.hint)


def _look(console: Console, table: NeuronTable, options: Options, index: int) -> None:
    from cratelm.report.export.neuronrecord import choose_width
    from cratelm.report.terminal import excerpt_text, legend, shows_colours

    record, colours = table.records[index], shows_colours(console)
    width = choose_width(table.records, options.width)
    total = table.records.num_neurons
    console.print(f"{options.run.name}, layer {table.records.layer}, neuron {index} (of 0 to {total - 1})")
    beginning = map(visible, lines_on_beginning(options.run, options.mode, table.strings))
    for line in (*_facts(table, index), *_directions(options.run, table, index), *beginning):
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
    names = ("density", "max", "min", "mean", "variance", "skewness", "kurtosis")
    values = {name: float(table.column(name)[index]) for name in names}
    yield ", ".join(f"{name} {value:.3g}{' %' if name == 'density' else ''}" for name, value in values.items())
    for name, interpretation in table.interpretations.items():
        scores = interpretation.scores
        if scores is None:
            score = "not scored"
        elif scores.reason[index]:
            score = f"no score: {scores.reason[index]}"
        else:
            score = f"{100 * scores.correlation[index]:z.1f} points over {scores.tokens[index]} tokens"
        explanation = interpretation.explanations.get(index)
        yield f"{name}: {score}" + (f"; {visible(explanation)}" if explanation else "")
    for name, (indices, closeness) in NEIGHBOUR_LISTS.items():
        if indices in table.records.tables:
            pairs = zip(table.records.tables[indices][index], table.records.tables[closeness][index], strict=True)
            yield f"{name}: " + ", ".join(f"{other} ({value:.2f})" for other, value in list(pairs)[:SHOWN_NEIGHBOURS])


def _directions(run: Path, table: NeuronTable, index: int) -> Iterator[str]:
    """The lists that `cratelm directions` wrote for the neuron, one per line; a hint if there are none."""
    from cratelm.activations.direction_files import TOKEN_LISTS, directions_file, read_directions

    tap, layer = table.records.tap, table.records.layer
    if not directions_file(run, layer, tap).exists():
        if tap == "neurons":
            yield f"what it reads and writes: cratelm directions {run}"
        return
    directions = read_directions(run, layer, tap=tap)
    for name in directions.lists:
        heading = DIRECTIONS[name].format(before=layer - 1, after=layer + 1)
        if name in TOKEN_LISTS:
            shown = (f"«{visible(table.strings[token])}»" for token, _ in directions.ranked(name, index)[:SHOWN_TOKENS])
        else:
            pairs = directions.ranked(name, index)[:SHOWN_NEIGHBOURS]
            shown = (f"{other} ({value:.2f})" for other, value in pairs)
        yield f"{heading}: {' '.join(shown) or 'none'}"
    for name, shares in directions.head_shares(index).items():
        heading = "fed by heads of this layer" if name == "heads_in" else f"read by heads of layer {layer + 1}"
        kind = name.partition(".")[2].replace("shared", "")
        yield f"{heading}{f' ({kind})' if kind else ''}: " + ", ".join(f"{share:.0%}" for share in shares)


def _strongest_kind_first(item: tuple[tuple[int, str, str], object]) -> tuple[int, str]:
    (_, split, kind), _excerpts = item
    return ("top", "quantile", "random").index(kind), split


def _spread(excerpts: Sequence, count: int) -> Iterator:
    """`count` items, evenly spaced from the first (weakest) to the last (strongest)."""
    for i in range(count):
        yield excerpts[round(i * (len(excerpts) - 1) / max(count - 1, 1))]
