"""Example neurons: the best, median and worst scores of every layer, with excerpts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cratelm.activations.records import Excerpt, read_records
from cratelm.interpretation.protocols import draw, protocol
from cratelm.interpretation.scoring.correlation import LayerScores
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey

Rank = Literal["best", "median", "worst"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronExample:
    """One neuron with some of the excerpts it was explained from and scored on."""

    rank: Rank
    layer: int
    index: int
    correlation: float
    """The score: Pearson correlation of activation and simulation over the scored excerpts, in [-1, 1]."""
    tokens: int
    """Number of tokens of the scored excerpts."""
    explanation: str
    density: float
    """Share of all collected tokens on which the neuron is active."""
    maximum: float
    """The neuron's largest activation in the collected text, in the model's own units."""
    explained: tuple[Excerpt, ...] = field(repr=False)
    scored: tuple[Excerpt, ...] = field(repr=False)


def examples_of(path: Path, layers: Sequence[LayerScores], key: SetKey) -> Iterator[NeuronExample]:
    """The best, median and worst scored neurons of every layer; one of each if there are more than 3 layers.

    `layers` are the scores of the sets of `key`, whose layer is a placeholder.
    """
    counts: dict[Rank, int] = (
        {"best": 3, "median": 2, "worst": 2} if len(layers) <= 3 else dict.fromkeys(("best", "median", "worst"), 1)
    )
    asked = protocol(key.protocol, key.mode)
    store = Store.open(path)
    for scores in layers:
        chosen = [(rank, row) for rank, rows in _ranked(scores.correlation, counts).items() for row in rows]
        if not chosen:
            continue
        records = read_records(path, scores.layer, mode=key.mode, tap=key.tap)
        texts = store.texts(replace(key, layer=scores.layer))
        for rank, row in chosen:
            index = int(scores.neuron[row])
            neuron = records.rows(slice(index, index + 1))  # drawing the excerpts of a whole layer is slow
            explained, scored = draw(neuron, asked.explain, "explain"), draw(neuron, asked.score, "score")
            by_strength = _strongest_first(scored.of(0))
            yield NeuronExample(
                rank=rank, layer=scores.layer, index=index, correlation=float(scores.correlation[row]),
                tokens=int(scores.tokens[row]), explanation=texts.get(index, ""),
                density=float(records.statistics["density"][index]),
                maximum=float(records.statistics["maximum"][index]),
                explained=tuple(_strongest_first(explained.of(0))[:2]),
                scored=(*by_strength[:3], *by_strength[3:][-1:]),
            )  # fmt: skip


def _ranked(correlation: np.ndarray, counts: Mapping[Rank, int]) -> dict[Rank, list[int]]:
    """Rows of the best, median and worst scores, without overlap; neurons without a score are left out."""
    order = [int(row) for row in np.argsort(-correlation, kind="stable") if not np.isnan(correlation[row])]
    best, worst = order[: counts["best"]], order[max(counts["best"], len(order) - counts["worst"]) :]
    between = order[len(best) : len(order) - len(worst)]
    first = max(0, (len(order) - counts["median"] + 1) // 2 - len(best))
    return {"best": best, "median": between[first : first + counts["median"]], "worst": worst}


def _strongest_first(excerpts: Iterator[Excerpt]) -> list[Excerpt]:
    return sorted(excerpts, key=lambda excerpt: -float(excerpt.activations.max(initial=-np.inf)))
