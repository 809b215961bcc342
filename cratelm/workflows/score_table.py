"""The tables of scores that `interpret` and `score` print: by protocol and layer, 80 columns wide."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cratelm.activations.records import recorded_layers
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.scoring.correlation import (
    NO_EXPLANATION,
    NO_SIMULATION,
    LayerAggregate,
    ModelAggregate,
    aggregate,
)
from cratelm.interpretation.scoring.small_samples import few_neurons
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.runtime import progress_bar
from cratelm.workflows.options.selection import Selection, chosen_layers, chosen_protocols

Columns = dict[str, tuple[str, ...]]
LOOKUP_COLUMNS: Columns = {
    "dead": ("dead",), "rare": ("too rare",), "const a": ("constant activations",), "const s": ("constant simulation",),
}  # fmt: skip
"""Heading of a column -> the reasons for a missing score that the column counts."""
LLM_COLUMNS: Columns = {
    "dead": ("dead",), "rare": ("too rare",), "const": ("constant activations", "constant simulation"),
    "failed": (NO_EXPLANATION, NO_SIMULATION),
}  # fmt: skip
"""The same for sets of a language model, which may have given an unusable answer."""


def print_scores(run: Path, selection: Selection, templates: Sequence[SetKey]) -> None:
    """Print a table for each kind of set: a template is a key whose layer and protocol are placeholders."""
    store, layers, names = Store.open(run), chosen_layers(run, selection), chosen_protocols(selection)
    for template in templates:
        models = []
        with progress_bar(f"intervals {run.name}", total=len(names), unit="protocols") as bar:
            for name in names:
                keys = [replace(template, layer=layer, protocol=name) for layer in layers]
                models.append(aggregate([store.scores(key) for key in keys], protocol=name))
                bar.advance(1)
        print("\n" + "\n".join(heading(run, template)))
        all_layers = recorded_layers(run, mode=selection.mode, tap=selection.tap)
        columns = LLM_COLUMNS if template.explainer != EXPLAINER or template.simulator else LOOKUP_COLUMNS
        print("\n".join(score_lines(models, whole_model=layers == all_layers, columns=columns)))


def heading(run: Path, key: SetKey) -> list[str]:
    """Run, mode, explainer and simulator of a table, in lines of 80 columns."""
    of_tap = "" if key.tap == "neurons" else f", {key.tap}"
    return set_words([f"{run.name}{of_tap} ({key.mode} mode", *set_parts(key)])


def set_parts(key: SetKey) -> Iterator[str]:
    """Explainer, simulator, sample and control of a set, in the parts of a heading."""
    if key.explainer:
        yield f"explained by {key.explainer}"
    if key.simulator and not key.judge:
        yield f"simulated by {key.simulator}"
    if key.sample:
        yield f"explanation {key.sample + 1}"
    if key.control:
        yield f"control: {key.control} explanations"


def set_words(parts: Sequence[str]) -> list[str]:
    """Join the parts with commas into lines of 80 columns and close the bracket that the first part opens."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) > 76:
            lines[-1] += ","
            lines.append(f"  {part}")
        else:
            lines[-1] += f", {part}"
    lines[-1] += ")"
    return lines


def score_lines(models: Sequence[ModelAggregate], *, whole_model: bool, columns: Columns = LOOKUP_COLUMNS) -> list[str]:
    """Lines of the printed table, with the mean over layers if the whole model was scored."""
    lines = [line_of("protocol", "layer", "points", "95 % interval", "scored", *columns)]
    for model in models:
        lines += [_layer_row(model.protocol if i == 0 else "", layer, columns) for i, layer in enumerate(model.layers)]
        if whole_model and model.mean is not None:
            note = f"  variance {model.variance:.2f}" + ("; no last layer" if len(model.layers) >= 6 else "")
            lines.append(line_of("", "mean", f"{model.mean:z.2f}", interval_text(model.interval)) + note)
    return [*lines, *warning_of_few(layer.scored for model in models for layer in model.layers)]


def warning_of_few(counts: Iterable[int]) -> list[str]:
    """The warning about means over few neurons, if there is one, in lines of 80 columns."""
    return [line for note in few_neurons(counts) for line in textwrap.wrap(note, 80)]


def _layer_row(name: str, line: LayerAggregate, columns: Columns) -> str:
    points = "-" if line.points is None else f"{line.points:z.1f}"
    counts = [str(sum(line.undefined.get(reason, 0) for reason in reasons)) for reasons in columns.values()]
    scored = f"{line.scored}/{line.total}"
    return line_of(name, str(line.layer), points, interval_text(line.interval), scored, *counts)


def interval_text(ends: tuple[float, float] | None) -> str:
    """A confidence interval."""
    return "-" if ends is None else f"[{ends[0]:z.1f}, {ends[1]:z.1f}]"


def line_of(name: str, *cells: str) -> str:
    """A line of a table."""
    widths = (6, 7, 15, 12, 5, 5, 8, 8)
    return f"{name:<14}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
