"""What the pages show of one layer and of one neuron, as values for JSON: the same for a folder and for a server."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cratelm.activations.records import LayerRecords, read_records, records_tokenizer
from cratelm.data.tokenizer import load_tokenizer, token_strings
from cratelm.interpretation.explainers.explanation import DEAD
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.protocols import PROTOCOLS
from cratelm.interpretation.scoring.correlation import LayerScores
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.listing import sets_of
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.browser.catalogue import Layer
from cratelm.report.browser.chunks import pack
from cratelm.report.browser.excerpts import ChunkStrings, Predicted, excerpt_groups, group_value, open_predicted
from cratelm.report.browser.measures import Measures, open_measures
from cratelm.report.browser.weights import Weights, number, open_weights
from cratelm.report.neuron_table import NO_RECORD, NOT_SCORED, SCORED, NeuronTable

STATISTICS = ("density", "maximum", "minimum", "mean", "variance", "skewness", "kurtosis")
NEURONS_EACH, TEXTS_EACH = 16, 256
"""Neurons to a chunk with all there is of them, and with what a list shows of them."""
NEIGHBOURS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """One set of explanations of a layer, and all scores that these explanations got."""

    key: SetKey
    texts: Mapping[int, str]
    """By neuron."""
    scores: tuple["Scored", ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One set of scores of a layer; an explainer that costs something may have been asked about some neurons only."""

    key: SetKey
    scores: LayerScores
    row: Mapping[int, int]
    """Neuron -> its row in `scores`."""

    def spread(self, neurons: int) -> tuple[Float[np.ndarray, " neurons"], tuple[str, ...]]:
        """Of every neuron of the layer the correlation, NaN where there is none, and the reason why there is none."""
        correlation, reason = np.full(neurons, np.nan), [NOT_SCORED] * neurons
        correlation[self.scores.neuron] = self.scores.correlation
        for index, row in self.row.items():
            reason[index] = self.scores.reason[row]
        return correlation, tuple(reason)


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """Everything that is known about one layer. Reading it takes a second at most; a server keeps it."""

    layer: Layer
    records: LayerRecords
    strings: Sequence[str]
    """Text of each token id."""
    explained: tuple[Explained, ...]
    weights: Weights | None
    """What the weights say, where `cratelm directions` was run."""
    measures: Measures
    predicted: Predicted | None
    """What explanations predict on the excerpts they are scored on, of one set."""

    @cached_property
    def scored(self) -> tuple[Scored, ...]:
        """All sets of scores, the one shown first in front."""
        return tuple(scored for one in self.explained for scored in one.scores)

    @cached_property
    def status(self) -> tuple[str, ...]:
        """Of each neuron: `scored` if any set scores it, or why it has no score."""
        ranked = [one.spread(self.records.num_neurons)[1] for one in self.scored]
        maximum = self.records.statistics["maximum"]
        found = []
        for index, reasons in enumerate(zip(*ranked, strict=True) if ranked else [()] * len(maximum)):
            silent = NO_RECORD if np.isnan(maximum[index]) else DEAD if maximum[index] <= 0 else NOT_SCORED
            asked = [reason for reason in reasons if reason != NOT_SCORED]
            found.append(SCORED if "" in asked else asked[0] if asked else silent)
        return tuple(found)


def open_layer(layer: Layer, strings: Sequence[str] | None = None) -> LayerView:
    """Read a layer's records and interpretations."""
    strings = token_strings(load_tokenizer(records_tokenizer(layer.run, layer.mode))) if strings is None else strings
    records = read_records(layer.run, layer.layer, mode=layer.mode, tap=layer.tap)
    store = Store.open(layer.run) if Store(layer.run).path.exists() else None
    explained = () if store is None else tuple(_explained(layer, store))
    return LayerView(
        layer=layer, records=records, strings=strings, weights=open_weights(layer), explained=explained,
        predicted=open_predicted(store, [scored.key for one in explained for scored in one.scores], records),
        measures=Measures(firing={}, judged=()) if store is None else open_measures(layer, store),
    )  # fmt: skip


def _explained(layer: Layer, store: Store) -> Iterator[Explained]:
    place: dict[str, Any] = {"mode": layer.mode, "tap": layer.tap, "layer": layer.layer}
    scored = [key for key in sets_of(store, "score", **place) if not key.control]
    for key in sorted(sets_of(store, "explain", **place), key=_order):
        yield Explained(
            key=key,
            texts=store.texts(key),
            scores=tuple(
                Scored(key=one, scores=found, row={int(neuron): row for row, neuron in enumerate(found.neuron)})
                for one in sorted(scored, key=_order)
                if one.explained == key
                for found in (store.scores(one),)
            ),
        )  # fmt: skip


def _order(key: SetKey) -> tuple:
    """What language models said before lookup, and protocols in the paper's order."""
    place = PROTOCOLS.index(key.protocol) if key.protocol in PROTOCOLS else len(PROTOCOLS)
    return key.explainer == EXPLAINER, key.explainer, key.simulator, place, key.protocol, key.sample


def layer_value(view: LayerView) -> dict[str, Any]:
    """The numbers of all neurons of a layer: what is sorted, filtered and drawn."""
    reasons: dict[str, int] = {"": 0}
    sets = []
    for place, one in ((place, one) for place, made in enumerate(view.explained) for one in made.scores):
        correlation, said = one.spread(view.records.num_neurons)
        codes = np.array([reasons.setdefault(reason, len(reasons)) for reason in said])
        sets.append({
            **_named(one.key), "explained": place, "correlation": pack(correlation, "f32"), "reason": pack(codes, "u8")
        })  # fmt: skip
    status = np.array([reasons.setdefault(one, len(reasons)) for one in view.status])
    return {
        "of": _of(view.layer), "neurons": view.records.num_neurons, "neurons_each": NEURONS_EACH,
        "texts_each": TEXTS_EACH, "reasons": list(reasons), "status": pack(status, "u8"), "sets": sets,
        "predicted": None if view.predicted is None else _named(view.predicted.key),
        "explained": [_named(one.key) for one in view.explained],
        "statistics": {
            name: pack(view.records.statistics[name], "f32") for name in STATISTICS if name in view.records.statistics
        },
    }  # fmt: skip


def _of(layer: Layer) -> dict[str, Any]:
    return {"model": layer.model, "tap": layer.tap_slug, "layer": layer.layer}


def _named(key: SetKey) -> dict[str, Any]:
    return {
        "explainer": key.explainer, "protocol": key.protocol, "simulator": key.simulator, "sample": key.sample
    }  # fmt: skip


def texts_value(view: LayerView, start: int) -> dict[str, Any]:
    """Of `TEXTS_EACH` neurons, or as many as are left: their strongest tokens, and every different explanation."""
    stop = min(start + TEXTS_EACH, view.records.num_neurons)
    table = NeuronTable(
        records=view.records.rows(slice(start, stop)), strings=view.strings, interpretations={}, protocol="", hint=""
    )
    texts = []
    for index in range(start, stop):
        found: dict[str, list[int]] = {}
        for place, one in enumerate(view.explained):
            if index in one.texts:
                found.setdefault(one.texts[index], []).append(place)
        texts.append(list(found.items()))
    return {"of": _of(view.layer), "start": start, "tokens": table.strongest(np.arange(stop - start)), "texts": texts}


def neurons_value(view: LayerView, start: int) -> dict[str, Any]:
    """Of `NEURONS_EACH` neurons, or as many as are left: all that their pages show."""
    stop = min(start + NEURONS_EACH, view.records.num_neurons)
    strings = ChunkStrings(view.strings)
    groups = list(excerpt_groups(view.records.rows(slice(start, stop))))
    neurons = []
    for index in range(start, stop):
        predicted = view.predicted.of(view.records, index) if view.predicted else {}
        shown = [group_value(one, index - start, strings, predicted) for one in groups]
        neurons.append(_facts(view, index) | {"excerpts": [one for one in shown if one["items"]]})
    return {"of": _of(view.layer), "start": start, "strings": strings.used, "neurons": neurons}


def _facts(view: LayerView, index: int) -> dict[str, Any]:
    statistics, tables = view.records.statistics, view.records.tables
    neighbours = {
        name: [[int(other), number(value)] for other, value in zip(of, values, strict=True) if other >= 0]
        for name, of, values in (
            ("similar", *_nearest(tables, "similar_neuron", "similar_cosine", index)),
            ("cofiring", *_nearest(tables, "cofiring_neuron", "cofiring_jaccard", index)),
        )
    }
    return {
        "index": index, "status": view.status[index],
        "statistics": {name: number(statistics[name][index]) for name in STATISTICS if name in statistics},
        "histogram": _histogram(tables["histogram"][index]) if "histogram" in tables else None,
        "neighbours": neighbours, "explanations": _explanations(view, index),
        "judged": view.measures.judged_of(index),
        "directions": None if view.weights is None else view.weights.of(index),
    }  # fmt: skip


def _nearest(tables: Mapping[str, np.ndarray], neurons: str, values: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    if neurons not in tables:
        return np.empty(0, dtype=np.int64), np.empty(0)
    return tables[neurons][index, :NEIGHBOURS], tables[values][index, :NEIGHBOURS]


def _histogram(counts: Int[np.ndarray, " bins"]) -> dict[str, Any]:
    """The counts without the empty bins at both ends, and the number of the first bin that is left."""
    there = np.flatnonzero(counts)
    first, last = (int(there[0]), int(there[-1]) + 1) if len(there) else (0, 0)
    return {"first": first, "counts": counts[first:last].tolist()}


def _explanations(view: LayerView, index: int) -> list[dict[str, Any]]:
    """Each different text of an explainer once, with all scores it got; without a text where there is but a reason."""
    found: dict[str, dict[str, Any]] = {}
    for one in view.explained:
        text = one.texts.get(index)
        key = json.dumps([one.key.explainer, one.key.sample, text])
        entry = found.setdefault(key, {
            "text": text, "explainer": one.key.explainer, "sample": one.key.sample, "protocols": [], "scores": []
        })  # fmt: skip
        entry["protocols"].append(one.key.protocol)
        entry["scores"] += [_score(view, scored, index) for scored in one.scores if index in scored.row]
    return list(found.values())


def _score(view: LayerView, scored: Scored, index: int) -> dict[str, Any]:
    scores, row = scored.scores, scored.row[index]
    return {
        "protocol": scored.key.protocol, "simulator": scored.key.simulator,
        "correlation": number(scores.correlation[row]), "reason": scores.reason[row],
        "r_squared": number(scores.r_squared[row]), "absolute_deviation": number(scores.absolute_deviation[row]),
        "spearman": number(scores.spearman[row]), "auroc": number(scores.auroc[row]),
        "tokens": int(scores.tokens[row]), "excerpts": int(scores.excerpts[row]),
        "firing": view.measures.firing_of(scored.key, index),
    }  # fmt: skip
