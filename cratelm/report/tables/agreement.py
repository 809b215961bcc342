"""The table that validates the other scorers: do they rank neurons as simulation does?"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from cratelm.interpretation.scorers.agreement import Pair, rank_agreement
from cratelm.interpretation.scorers.registry import SCORERS
from cratelm.interpretation.scoring.statistics import generator
from cratelm.interpretation.stages.judge import judged, judged_sets
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.results.gather import Results, RunResult
from cratelm.report.tables.form import Cell, Column, Table

AGREEMENT_COLUMNS = (
    Column("Scorer"), Column("Model"), Column("Explained by"), Column("Asked"), Column("Simulated by"),
    Column("Rank correlation", "0.1", "%"), Column("95 % interval", "interval", "%"), Column("Neurons", "count"),
)  # fmt: skip


def agreement_tables(results: Results) -> tuple[Table, ...]:
    """One table of all scorers that test explanations; empty where no explanation was both judged and simulated."""
    rows = [row for run in results.rows for row in _rows(run, results)]
    if not rows:
        return ()
    order = list(SCORERS)
    notes = (
        "Spearman's correlation of a scorer's numbers and the correlations of simulations of the same explanations, "
        "over the neurons that have both, with ranks taken within each layer; intervals by bootstrap over neurons. It "
        "says how well a cheaper scorer can stand in for simulation here.",
    )
    ordered = tuple(sorted(rows, key=lambda row: order.index(str(row[0]))))
    caption = "Scorers compared with simulation"
    return (Table(name="scorer_agreement", caption=caption, columns=AGREEMENT_COLUMNS, rows=ordered, notes=notes),)


def _rows(run: RunResult, results: Results) -> Iterator[tuple[Cell, ...]]:
    store = Store.open(run.path)
    mine = [(key, scorer) for key, scorer in judged_sets(store) if (key.mode, key.tap) == (results.mode, run.tap)]
    kinds: dict[tuple[str, SetKey, str], list[Pair]] = {}
    for key, scorer in mine:
        if not SCORERS[scorer].explained or key.control:
            continue
        for simulated in store.scored():
            if simulated.explained == key.explained and not simulated.control:
                compared = (scorer, replace(key, layer=0), simulated.simulator)
                kinds.setdefault(compared, []).append(_pair(store, key, scorer, simulated))
    for (scorer, kind, simulator), pairs in kinds.items():
        agreement = rank_agreement(pairs, generator(0, f"agreement {scorer} {kind.protocol}", 0))
        if agreement is not None:
            explained = ", ".join(filter(None, [kind.explainer, kind.protocol]))
            ends = (100 * agreement.low, 100 * agreement.high)
            head = (scorer, run.title, explained, kind.judge, simulator or "lookup")
            yield (*head, 100 * agreement.correlation, ends, agreement.neurons)


def _pair(store: Store, key: SetKey, scorer: str, simulated: SetKey) -> Pair:
    """The scorer's number and the correlation of each neuron of a layer that was judged; NaN if it has none."""
    scores = store.scores(simulated)
    correlations = dict(zip(scores.neuron.tolist(), scores.correlation.tolist(), strict=True))
    results = judged(store, key, scorer)
    number = SCORERS[scorer].number
    first = [results[neuron].numbers().get(number, np.nan) for neuron in results]
    return np.array(first), np.array([correlations.get(neuron, np.nan) for neuron in results])
