"""The scorers beside the correlation in a report: what was asked of whom about which model, and what came of it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from cratelm.interpretation.scorers.registry import SCORERS, ScorerAggregate
from cratelm.interpretation.scorers.windows import TOO_FEW
from cratelm.interpretation.scoring.statistics import shown_layers
from cratelm.interpretation.stages.judge import aggregate_judged, judged_sets
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.results.gather import Results, RunResult
from cratelm.report.tables.form import Cell, Column, Table

COLUMNS = (
    Column("Scorer"), Column("Model"), Column("Explained by"), Column("Asked"), Column("Layer"),
    Column("Score", "0.1", "%"), Column("95 % interval", "interval", "%"), Column("Chance", "0.1", "%"),
    Column("AUC", "0.1", "%"), Column("F1", "0.1", "%"), Column("Judged", "share", "of those asked about"),
    Column("Too few excerpts", "count"), Column("Failed", "count"), Column("Answers", "count"),
    Column("Unreadable", "count"),
)  # fmt: skip
NOTES = (
    "Score: {numbers}, as a "
    "mean over neurons; intervals of a layer by two-level bootstrap, over neurons and over the items of each. Means "
    "over layers leave the last one out from 6 layers on, as the paper does.",
    "Too few excerpts: neurons without enough windows on which they fire, or on which they are silent. Failed: neurons "
    "about which nothing readable was said, or too little. Unreadable: single answers of another form, refusals among "
    "them; they count in no score.",
)


def judged_tables(results: Results) -> tuple[Table, ...]:
    """One table of all scorers, by layer and over layers; none where no run was judged."""
    rows = [row for run in results.rows for row in _of_run(run, results)]
    if not rows:
        return ()
    order = {name: place for place, name in enumerate(SCORERS)}
    ordered = tuple(sorted(rows, key=lambda row: order[str(row[0])]))
    return (
        Table(
            name="scorers",
            caption="Other scorers",
            columns=COLUMNS,
            rows=ordered,
            notes=(NOTES[0].format(numbers=_numbers()), *NOTES[1:]),
        ),
    )


def _numbers() -> str:
    names: dict[str, list[str]] = {}
    for scorer in SCORERS.values():
        names.setdefault(scorer.number.replace("_", " ").replace("auc", "AUC"), []).append(scorer.name)
    return "; ".join(f"{number} of {', '.join(named)}" for number, named in names.items())


def _of_run(run: RunResult, results: Results) -> Iterator[tuple[Cell, ...]]:
    store = Store.open(run.path)
    kinds: dict[tuple[str, SetKey], list[SetKey]] = {}
    for key, scorer in judged_sets(store):
        if (key.mode, key.tap) == (results.mode, run.tap):
            kinds.setdefault((scorer, replace(key, layer=0)), []).append(key)
    for (scorer, kind), keys in kinds.items():
        found = {key.layer: aggregate_judged(store, key, scorer) for key in keys}
        head = (scorer, run.title, _explained(kind), kind.judge)
        for layer, one in sorted(found.items()):
            ends = None if one.low is None or one.high is None else (one.low, one.high)
            yield (*head, str(layer), one.mean, ends, *_cells([one]))
        if len(found) == run.num_layers > 1:
            shown = [one for _, one in sorted(found.items())][: shown_layers(run.num_layers)]
            means = [one.mean for one in shown if one.mean is not None]
            yield (*head, "mean", float(np.mean(means)) if means else None, None, *_cells(shown))


def _explained(kind: SetKey) -> str:
    """Who explained what is tested, on which protocol; nobody for scorers that need no explanation."""
    if not kind.explainer:
        return "–"
    parts = [kind.explainer, kind.protocol, kind.control, f"explanation {kind.sample + 1}" if kind.sample else ""]
    return ", ".join(part for part in parts if part)


def _cells(found: Sequence[ScorerAggregate]) -> tuple[Cell, ...]:
    def mean(name: str) -> float | None:
        values = [one.others[name] for one in found if name in one.others]
        return float(np.mean(values)) if values else None

    few = sum(one.undefined.get(TOO_FEW, 0) for one in found)
    return (
        found[0].chance, mean("auc"), mean("f1"), (sum(one.judged for one in found), sum(one.total for one in found)),
        few, sum(sum(one.undefined.values()) for one in found) - few, sum(one.items for one in found),
        sum(one.failed for one in found),
    )  # fmt: skip
