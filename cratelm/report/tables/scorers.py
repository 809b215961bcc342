"""The table of the scorers other than correlation: scorer, judge, model, and results."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from cratelm.interpretation.scorers.registry import SCORERS, ScorerAggregate
from cratelm.interpretation.scorers.windows import TOO_FEW
from cratelm.interpretation.scoring.small_samples import few_neurons
from cratelm.interpretation.scoring.statistics import shown_layers
from cratelm.interpretation.stages.judge import aggregate_judged, judged_sets
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.results.gather import Results, RunResult
from cratelm.report.tables.form import Cell, Column, Table

SCORER_COLUMNS = (
    Column("Scorer"), Column("Model"), Column("Explained by"), Column("Asked"), Column("Layer"),
    Column("Score", "0.1", "%"), Column("95 % interval", "interval", "%"), Column("Chance", "0.1", "%"),
    Column("AUC", "0.1", "%"), Column("F1", "0.1", "%"), Column("Judged", "share", "of those asked about"),
    Column("Too few excerpts", "count"), Column("Failed", "count"), Column("Answers", "count"),
    Column("Unreadable", "count"),
)  # fmt: skip
JUDGED = [column.title for column in SCORER_COLUMNS].index("Judged")


def judged_tables(results: Results) -> tuple[Table, ...]:
    """One table of all scorers, by layer and over layers; empty where no run was judged."""
    rows = [row for run in results.rows for row in _rows(run, results)]
    if not rows:
        return ()
    notes = (
        f"Score: {_numbers()}, as a mean over neurons; intervals of a layer by two-level bootstrap, over neurons and "
        "over the items of each neuron. Means over layers leave out the last layer from 6 layers on, as in the paper.",
        "Too few excerpts: neurons without enough windows in which they fire, or in which they are silent. Failed: "
        "neurons without enough readable answers. Unreadable: answers in a wrong format and refusals; no score counts "
        "them.",
        *few_neurons(int(neurons[0]) for row in rows if isinstance(neurons := row[JUDGED], tuple)),
    )
    order = list(SCORERS)
    ordered = tuple(sorted(rows, key=lambda row: order.index(str(row[0]))))
    return (Table(name="scorers", caption="Other scorers", columns=SCORER_COLUMNS, rows=ordered, notes=notes),)


def _numbers() -> str:
    """The score of each scorer in words."""
    names: dict[str, list[str]] = {}
    for scorer in SCORERS.values():
        names.setdefault(scorer.number.replace("_", " ").replace("auc", "AUC"), []).append(scorer.name)
    return "; ".join(f"{number} of {', '.join(scorers)}" for number, scorers in names.items())


def _rows(run: RunResult, results: Results) -> Iterator[tuple[Cell, ...]]:
    store = Store.open(run.path)
    kinds: dict[tuple[str, SetKey], list[SetKey]] = {}
    for key, scorer in judged_sets(store):
        if (key.mode, key.tap) == (results.mode, run.tap):
            kinds.setdefault((scorer, replace(key, layer=0)), []).append(key)
    for (scorer, kind), keys in kinds.items():
        layers = {key.layer: aggregate_judged(store, key, scorer) for key in sorted(keys, key=lambda key: key.layer)}
        head = (scorer, run.title, _explained(kind), kind.judge)
        for number, layer in layers.items():
            yield (*head, str(number), layer.mean, layer.interval, *_cells([layer]))
        if len(layers) == run.num_layers > 1:
            shown = list(layers.values())[: shown_layers(run.num_layers)]
            means = [layer.mean for layer in shown if layer.mean is not None]
            yield (*head, "mean", _mean(means), None, *_cells(shown))


def _explained(kind: SetKey) -> str:
    """Explainer and protocol of the tested explanations; a dash for scorers without explanations."""
    if not kind.explainer:
        return "–"
    parts = [kind.explainer, kind.protocol, kind.control, f"explanation {kind.sample + 1}" if kind.sample else ""]
    return ", ".join(filter(None, parts))


def _cells(layers: Sequence[ScorerAggregate]) -> tuple[Cell, ...]:
    auc, f1 = (
        _mean([layer.others[name] for layer in layers if name in layer.others]) for name in ("auc", "f1")
    )  # fmt: skip
    few = sum(layer.undefined.get(TOO_FEW, 0) for layer in layers)
    return (
        layers[0].chance, auc, f1, (sum(layer.judged for layer in layers), sum(layer.total for layer in layers)),
        few, sum(sum(layer.undefined.values()) for layer in layers) - few, sum(layer.items for layer in layers),
        sum(layer.failed for layer in layers),
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
