"""The contents of the pages of one layer and one neuron as JSON values, for a folder and for a server."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from cratelm.activations.records import LayerRecords, read_records, records_strings
from cratelm.interpretation.explainers.explanation import DEAD
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.protocols import PROTOCOLS
from cratelm.interpretation.scoring.correlation import NOT_CHOSEN, SCORE_MEASURES, LayerScores
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.listing import sets_of
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.browser.catalogue import Layer
from cratelm.report.browser.chunks import pack
from cratelm.report.browser.excerpts import ChunkStrings, Predicted, excerpt_groups, group_value, open_predicted
from cratelm.report.browser.measures import Measures, open_measures
from cratelm.report.browser.weights import Weights, number, open_weights
from cratelm.report.neuron_table import NO_RECORD, NOT_SCORED, SCORED, strongest_tokens

STATISTICS = ("density", "maximum", "minimum", "mean", "variance", "skewness", "kurtosis")
NEURONS_EACH, TEXTS_EACH = 16, 256
"""Neurons per chunk: with the contents of their pages, and with their rows in a list."""
NEIGHBOURS = 10
NEIGHBOUR_TABLES = {"similar": "cosine", "cofiring": "jaccard"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Explained:
    """One set of explanations of a layer, and all its scores."""

    key: SetKey
    texts: Mapping[int, str]
    """By neuron."""
    scores: Mapping[SetKey, LayerScores]
    """A row for every neuron of the layer; the reason of a neuron that the set leaves out is `NOT_CHOSEN`."""


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """All data of one layer."""

    layer: Layer
    records: LayerRecords
    strings: Sequence[str]
    """Text of each token id."""
    explained: tuple[Explained, ...]
    weights: Weights | None
    """The directions, if `cratelm directions` was run."""
    measures: Measures
    predicted: Predicted | None
    """The predictions of one set of explanations on the scored excerpts."""

    @cached_property
    def status(self) -> tuple[str, ...]:
        """For each neuron: `scored` if any set scores it, or why it has no score."""
        by_set = [scores.reason for explained in self.explained for scores in explained.scores.values()]
        status = []
        for index, maximum in enumerate(self.records.statistics["maximum"]):
            reasons = [set_reasons[index] for set_reasons in by_set if set_reasons[index] != NOT_CHOSEN]
            without = NO_RECORD if np.isnan(maximum) else DEAD if maximum <= 0 else NOT_SCORED
            status.append(SCORED if "" in reasons else next(iter(reasons), without))
        return tuple(status)


def open_layer(layer: Layer, strings: Sequence[str] | None = None) -> LayerView:
    """Read a layer's records and interpretations."""
    strings = records_strings(layer.run, layer.mode) if strings is None else strings
    records = read_records(layer.run, layer.layer, mode=layer.mode, tap=layer.tap)
    store = Store.open(layer.run) if Store(layer.run).path.exists() else None
    explained = () if store is None else tuple(_explained(layer, store, records.num_neurons))
    return LayerView(
        layer=layer, records=records, strings=strings, weights=open_weights(layer), explained=explained,
        predicted=open_predicted(store, [key for each in explained for key in each.scores], records),
        measures=Measures(firing={}, judged=()) if store is None else open_measures(layer, store),
    )  # fmt: skip


def _explained(layer: Layer, store: Store, neurons: int) -> Iterator[Explained]:
    place: dict[str, Any] = {"mode": layer.mode, "tap": layer.tap, "layer": layer.layer}
    scored = sorted((key for key in sets_of(store, "score", **place) if not key.control), key=_order)
    for key in sorted(sets_of(store, "explain", **place), key=_order):
        scores = {other: store.scores(other) for other in scored if other.explained == key}
        # Without the sums for intervals, which no page shows.
        spread = {other: replace(made, sums=made.sums[:, :0]).of_layer(neurons) for other, made in scores.items()}
        yield Explained(key=key, texts=store.texts(key), scores=spread)


def _order(key: SetKey) -> tuple:
    """Language models before lookup, protocols in the paper's order."""
    place = PROTOCOLS.index(key.protocol) if key.protocol in PROTOCOLS else len(PROTOCOLS)
    return key.explainer == EXPLAINER, key.explainer, key.simulator, place, key.protocol, key.sample


def layer_value(view: LayerView) -> dict[str, Any]:
    """The numbers of all neurons of a layer, to sort, filter and plot."""
    reasons: dict[str, int] = {"": 0}
    sets = []
    for place, explained in enumerate(view.explained):
        for key, scores in explained.scores.items():
            without = (NOT_SCORED if reason == NOT_CHOSEN else reason for reason in scores.reason)
            codes = np.array([reasons.setdefault(reason, len(reasons)) for reason in without])
            numbers = {"correlation": pack(scores.correlation, "f32"), "reason": pack(codes, "u8")}
            sets.append(_named(key) | {"explained": place} | numbers)
    status = np.array([reasons.setdefault(reason, len(reasons)) for reason in view.status])
    return {
        "of": _of(view.layer), "neurons": view.records.num_neurons, "neurons_each": NEURONS_EACH,
        "texts_each": TEXTS_EACH, "reasons": list(reasons), "status": pack(status, "u8"), "sets": sets,
        "predicted": None if view.predicted is None else _named(view.predicted.key),
        "explained": [_named(explained.key) for explained in view.explained],
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
    """The strongest tokens and distinct explanations of `TEXTS_EACH` neurons (the last chunk has fewer)."""
    stop = min(start + TEXTS_EACH, view.records.num_neurons)
    tokens = strongest_tokens(view.records.rows(slice(start, stop)), view.strings, np.arange(stop - start))
    texts = []
    for index in range(start, stop):
        sets: dict[str, list[int]] = {}
        for place, explained in enumerate(view.explained):
            if index in explained.texts:
                sets.setdefault(explained.texts[index], []).append(place)
        texts.append(list(sets.items()))
    return {"of": _of(view.layer), "start": start, "tokens": tokens, "texts": texts}


def neurons_value(view: LayerView, start: int) -> dict[str, Any]:
    """The contents of the pages of `NEURONS_EACH` neurons (the last chunk has fewer)."""
    stop = min(start + NEURONS_EACH, view.records.num_neurons)
    strings = ChunkStrings(view.strings)
    groups = list(excerpt_groups(view.records.rows(slice(start, stop))))
    neurons = []
    for index in range(start, stop):
        predicted = view.predicted.of(view.records, index) if view.predicted else {}
        excerpts = [group_value(group, index - start, strings, predicted) for group in groups]
        neurons.append(_facts(view, index) | {"excerpts": [group for group in excerpts if group["items"]]})
    return {"of": _of(view.layer), "start": start, "strings": strings.used, "neurons": neurons}


def _facts(view: LayerView, index: int) -> dict[str, Any]:
    statistics, tables = view.records.statistics, view.records.tables
    return {
        "index": index, "status": view.status[index],
        "statistics": {name: number(statistics[name][index]) for name in STATISTICS if name in statistics},
        "histogram": _histogram(tables["histogram"][index]) if "histogram" in tables else None,
        "neighbours": {name: _nearest(tables, name, value, index) for name, value in NEIGHBOUR_TABLES.items()},
        "explanations": _explanations(view, index),
        "judged": view.measures.judged_of(index),
        "directions": None if view.weights is None else view.weights.of(index),
    }  # fmt: skip


def _nearest(tables: Mapping[str, np.ndarray], name: str, value: str, index: int) -> list[tuple[int, float | None]]:
    if f"{name}_neuron" not in tables:
        return []
    neurons, values = (tables[f"{name}_{column}"][index, :NEIGHBOURS] for column in ("neuron", value))
    return [(int(neuron), number(value)) for neuron, value in zip(neurons, values, strict=True) if neuron >= 0]


def _histogram(counts: Int[np.ndarray, " bins"]) -> dict[str, Any]:
    """The counts without the empty bins at both ends, and the number of the first of these bins."""
    occupied = np.flatnonzero(counts)
    first, last = (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, 0)
    return {"first": first, "counts": counts[first:last].tolist()}


def _explanations(view: LayerView, index: int) -> list[dict[str, Any]]:
    """Each distinct text of an explainer with all its scores; the text is None for a neuron without an explanation."""
    entries: dict[tuple[str, int, str | None], dict[str, Any]] = {}
    for explained in view.explained:
        key, text = explained.key, explained.texts.get(index)
        entry = entries.setdefault((key.explainer, key.sample, text), {
            "text": text, "explainer": key.explainer, "sample": key.sample, "protocols": [], "scores": []
        })  # fmt: skip
        entry["protocols"].append(key.protocol)
        entry["scores"] += [
            _score(view, set_key, scores, index) for set_key, scores in explained.scores.items()
            if scores.reason[index] != NOT_CHOSEN
        ]  # fmt: skip
    return list(entries.values())


def _score(view: LayerView, key: SetKey, scores: LayerScores, index: int) -> dict[str, Any]:
    return {name: number(getattr(scores, name)[index]) for name in SCORE_MEASURES} | {
        "protocol": key.protocol, "simulator": key.simulator, "reason": scores.reason[index],
        "tokens": int(scores.tokens[index]), "excerpts": int(scores.excerpts[index]),
        "firing": view.measures.firing_of(key, index),
    }  # fmt: skip
