"""The paper's tables, performance and interpretability, and one row per layer, as Markdown, CSV and LaTeX.

A table is columns and rows of plain values; how a value is written depends on its column and on the format alone, so
that every format shows the same numbers. CSV keeps them unrounded.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cratelm.interpretation.scoring.correlation import LayerAggregate, ModelAggregate
from cratelm.report.results.gather import Results, RunResult
from cratelm.rundir import write_text
from cratelm.runtime import human

Style = Literal["text", "count", "human", "0.1", "0.01", "0.001", "interval", "share"]
Cell = str | int | float | tuple[float, float] | tuple[int, int] | None
ABSENT = "\N{EN DASH}"  # where there is no number


@dataclass(frozen=True, slots=True)
class Column:
    """One column: what it is, how its values are written, and their unit."""

    title: str
    style: Style = "text"
    unit: str = ""

    @property
    def heading(self) -> str:
        """Title and unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A caption, columns, and rows of as many cells."""

    name: str
    """Name of its files, without suffix."""
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    """Sentences below the table."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"ragged rows in table {self.name}"


LOSS = Column("Loss", "0.001", "nats/token")
PARAMETERS, FLOPS = Column("Parameters", "human"), Column("FLOPs", "human", "per token")
COST = (LOSS, PARAMETERS, FLOPS)
"""What stands beside every interpretability number."""
SCORED = Column("Scored", "share", "of those chosen")
CONTROLS = (Column("Shuffled", "0.1", "points"), Column("Random-init", "0.1", "points"))
INTERVAL = Column("95 % interval", "interval", "points")
ORDER = (Column("Spearman", "0.1", "points"), Column("AUROC", "0.1", "%"))

COUNTING = (
    "Parameters leave position embeddings out and count the tied head once; FLOPs are those of a forward pass per "
    "token at full context, 2 per multiply-add."
)


def tables(results: Results) -> tuple[Table, ...]:
    """All tables of a report."""
    return performance(results), interpretability(results), by_layer(results)


CONTROL_ROWS = ("random-init", "shuffled")  # as `summary` names the controls below their model


def summary(results: Results) -> Table:
    """What fits a terminal and opens the page: a row per model with its controls below, a column per protocol."""

    def row(name: str, scores: Mapping[str, ModelAggregate], cost: tuple[Cell, ...]) -> tuple[Cell, ...]:
        return (name, *(_with_interval(scores, one) for one in results.protocols), *cost)

    rows = []
    for model in results.models:
        rows.append(row(model.title, model.scores, _cost_cells(model)))
        if (control := model.random_init) is not None:
            rows.append(row(CONTROL_ROWS[0], control.scores, _cost_cells(control)))
        if model.shuffled or model.shuffled_elsewhere:
            rows.append(row(CONTROL_ROWS[1], model.shuffled, (None, None, None)))
    return Table(
        name="summary", caption=f"Mean score over layers, with 95 % intervals ({results.mode} mode)",
        columns=(Column("Model"), *(Column(name, "0.1", "points") for name in results.protocols), *COST),
        rows=tuple(rows), notes=results.of_other_neurons,
    )  # fmt: skip


def _with_interval(scores: Mapping[str, ModelAggregate], protocol: str) -> Cell:
    if protocol not in scores:
        return None
    mean, interval = scores[protocol].mean, _interval(scores[protocol])
    return written(mean, "0.1") + ("" if interval is None else f" {written(interval, 'interval')}")


def performance(results: Results) -> Table:
    """The paper's performance table: what each model costs and how well it predicts held-out text."""
    columns = (
        Column("Model"), Column("Layers", "count"), PARAMETERS, FLOPS, Column("Training tokens", "human"), LOSS,
        Column("Standard error", "0.001", "nats/token"), Column("Perplexity", "0.1"), Column("Bits per byte", "0.001"),
        Column("Held-out tokens", "human"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for run in results.rows:
        cost = (run.title, run.num_layers, run.parameters, run.flops_per_token, run.training_tokens or 0)
        loss = run.loss
        if loss is None:
            rows.append((*cost, "not evaluated", None, None, None, None))
        else:
            rows.append(
                (*cost, loss.nats_per_token, loss.standard_error, loss.perplexity, loss.bits_per_byte, loss.tokens)
            )
    splits = sorted({run.loss.split for run in results.rows if run.loss is not None})
    notes = [COUNTING]
    if splits:
        notes.insert(0, f"Loss on the {' and '.join(splits)} split; its standard error is over documents.")
    return Table(
        name="performance", caption="Performance", columns=columns, rows=tuple(rows),
        notes=(*notes, *(line for line in results.missing if "not evaluated" in line)),
    )  # fmt: skip


def interpretability(results: Results) -> Table:
    """The paper's interpretability table: mean and variance over layers, per protocol and model, with controls."""
    columns = (
        Column("Protocol"), Column("Model"), Column("Mean", "0.01", "points"), INTERVAL,
        Column("Variance", "0.01", "points²"), Column("Mean, all layers", "0.01", "points"),
        Column("Variance, all layers", "0.01", "points²"), Column("Undefined = 0", "0.01", "points"),
        *ORDER, SCORED, *CONTROLS, *COST,
    )  # fmt: skip
    rows = [
        (name, run.title, *_aggregate_cells(run.scores[name]), *_control_cells(run, name), *_cost_cells(run))
        for name in results.protocols
        for run in results.rows
        if name in run.scores
    ]
    table = Table(
        name="interpretability", caption=f"Interpretability ({results.mode} mode, {results.described})",
        columns=columns, rows=tuple(rows), notes=(*_interpretability_notes(results), *results.of_other_neurons),
    )  # fmt: skip
    shallow = all(run.num_layers < 6 for run in results.rows)
    return without_columns(table, "Mean, all layers", "Variance, all layers") if shallow else table


def by_layer(results: Results) -> Table:
    """One row per protocol, model and layer."""
    columns = (
        Column("Protocol"), Column("Model"), Column("Layer", "count"), Column("Mean", "0.1", "points"), INTERVAL,
        Column("SD over neurons", "0.1", "points"), Column("Undefined = 0", "0.1", "points"), *ORDER, SCORED,
        Column("Dead", "count"), Column("Too rare", "count"), Column("Otherwise", "count"), *CONTROLS, *COST,
    )  # fmt: skip
    rows = [
        (name, run.title, *_layer_cells(run, name, layer), *_cost_cells(run))
        for name in results.protocols
        for run in results.rows
        if name in run.scores
        for layer in run.scores[name].layers
    ]
    caption, notes = "Interpretability by layer", results.of_other_neurons
    return Table(name="layers", caption=caption, columns=columns, rows=tuple(rows), notes=notes)


def _aggregate_cells(scores: ModelAggregate) -> tuple[Cell, ...]:
    return (
        scores.mean, _interval(scores), scores.variance, scores.mean_all_layers, scores.variance_all_layers,
        scores.mean_undefined_zero, scores.spearman, scores.auroc,
        (sum(layer.scored for layer in scores.layers), sum(layer.total for layer in scores.layers)),
    )  # fmt: skip


def _control_cells(run: RunResult, name: str) -> tuple[Cell, Cell]:
    """Means of the shuffled explanations and of the random-init model, by the same rule as the mean beside."""
    shuffled = run.shuffled.get(name)
    random_init = run.random_init.scores.get(name) if run.random_init is not None else None
    return (None if shuffled is None else shuffled.mean, None if random_init is None else random_init.mean)


def _cost_cells(run: RunResult) -> tuple[Cell, Cell, Cell]:
    loss = "not evaluated" if run.loss is None else run.loss.nats_per_token
    return loss, run.parameters, run.flops_per_token


def _layer_cells(run: RunResult, name: str, layer: LayerAggregate) -> tuple[Cell, ...]:
    dead, rare = layer.undefined.get("dead", 0), layer.undefined.get("too rare", 0)
    return (
        layer.layer, layer.points, _interval(layer), layer.deviation, layer.points_undefined_zero,
        layer.spearman, layer.auroc, (layer.scored, layer.total), dead, rare,
        sum(layer.undefined.values()) - dead - rare,
        _points_of(run.shuffled.get(name), layer.layer),
        _points_of(run.random_init.scores.get(name) if run.random_init is not None else None, layer.layer),
    )  # fmt: skip


def _points_of(scores: ModelAggregate | None, layer: int) -> float | None:
    return next((one.points for one in scores.layers if one.layer == layer), None) if scores is not None else None


def _interval(scores: ModelAggregate | LayerAggregate) -> tuple[float, float] | None:
    if scores.low is None or scores.high is None or math.isnan(scores.low) or math.isnan(scores.high):
        return None
    return scores.low, scores.high


def _interpretability_notes(results: Results) -> tuple[str, ...]:
    notes = [
        "Points are 100 times the Pearson correlation of a neuron's activations with those simulated from its "
        "explanation, averaged over the scored neurons of a layer; mean and population variance are over the layers' "
        "means, each rounded to 0.1 as in the paper. Intervals are by two-level bootstrap, over neurons and over the "
        "excerpts of each.",
        "Spearman (100 x the correlation of ranks) and AUROC (how often an active token has the higher simulation than "
        "a silent one; 50 is chance) ask for the right order alone.",
        "Undefined = 0 is the mean with every neuron without a score (dead, too rare, constant) counted as zero. "
        "Shuffled and random-init are the controls' means: explanations of other neurons of the layer, and the same "
        "architecture with random weights.",
    ]
    if any(tap != "neurons" for tap in results.taps):
        notes.append(
            "Loss, parameters and FLOPs are the model's, also in the rows of another tap than its neurons: what reads "
            "that tap, such as a sparse autoencoder, costs more."
        )
    if any(run.num_layers >= 6 for run in results.rows):
        notes.append("From 6 layers on, mean and variance leave the last layer out, as the paper does.")
    return tuple(notes)


def without_columns(table: Table, *titles: str) -> Table:
    """The table with some columns left out."""
    kept = [i for i, column in enumerate(table.columns) if column.title not in titles]
    columns = tuple(table.columns[i] for i in kept)
    return replace(table, columns=columns, rows=tuple(tuple(row[i] for i in kept) for row in table.rows))


def written(cell: Cell, style: Style) -> str:
    """A cell as text: rounded, with a typographic minus, an interval in brackets, a dash where there is nothing."""
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
    lines += [[_markdown(text) for text in row] for row in _texts(table)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = "".join(f"\n{_markdown(note)}\n" for note in table.notes)
    return f"**{_markdown(table.caption)}**\n\n{body}\n{notes}"


def as_csv(table: Table) -> str:
    """The table as CSV: unrounded numbers, an interval in two columns, nothing where there is no number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([heading for column in table.columns for heading in _csv_headings(column)])
    for row in table.rows:
        cells = zip(row, table.columns, strict=True)
        writer.writerow([value for cell, column in cells for value in _csv_values(cell, column)])
    return out.getvalue()


def as_latex(table: Table) -> str:
    """The table as LaTeX for the booktabs package; every character of a text stands for itself."""
    alignment = "".join("l" if column.style == "text" else "r" for column in table.columns)
    head = " & ".join(_latex(column.heading) for column in table.columns)
    body = [" & ".join(_latex(text) for text in row) + r" \\" for row in _texts(table)]
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


def write_tables(found: Sequence[Table], out: Path) -> list[Path]:
    """Write each table in each format."""
    paths = []
    for table in found:
        for suffix, write in FORMATS.items():
            paths.append(out / f"{table.name}.{suffix}")
            write_text(paths[-1], write(table))
    return paths


def _texts(table: Table) -> Iterator[list[str]]:
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
"""The two columns that a pair has in CSV."""


def _csv_headings(column: Column) -> list[str]:
    return [f"{column.heading}, {end}" for end in _ENDS[column.style]] if column.style in _ENDS else [column.heading]


def _csv_values(cell: Cell, column: Column) -> list[str | int | float]:
    if column.style in _ENDS:
        return list(cell) if isinstance(cell, tuple) else ["", ""]
    if isinstance(cell, str):
        # A spreadsheet takes a text that begins so for a formula and runs it.
        return [f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell]
    assert not isinstance(cell, tuple)
    return ["" if cell is None or not math.isfinite(cell) else cell]
