"""What the pages show of one layer and of one neuron, as values for JSON: the same for a folder and for a server."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cratelm.activations.records import ABSENT, Excerpts, LayerRecords, read_records, records_tokenizer
from cratelm.data.tokenizer import load_tokenizer, token_strings
from cratelm.interpretation.explain import DEAD
from cratelm.interpretation.listing import sets_of
from cratelm.interpretation.lookup import EXPLAINER
from cratelm.interpretation.protocols import PROTOCOLS, QUANTILES_RECORDED
from cratelm.interpretation.schema import SetKey
from cratelm.interpretation.score import LayerScores
from cratelm.interpretation.store import Store
from cratelm.report.catalogue import Layer
from cratelm.report.chunks import pack, pack_ids, pack_sparse
from cratelm.report.neuron_table import NO_RECORD, NOT_SCORED, SCORED, NeuronTable
from cratelm.report.weights import Weights, number, open_weights

STATISTICS = ("density", "maximum", "minimum", "mean", "variance", "skewness", "kurtosis")
NEURONS_EACH, TEXTS_EACH = 16, 256
"""Neurons to a chunk with all there is of them, and with what a list shows of them."""
SHOWN: Mapping[str, Mapping[str, int]] = {
    "explain": {"top": 6, "random": 0, "quantile": 1}, "score": {"top": 5, "random": 5, "quantile": 1},
    "all": {"top": 10, "random": 6, "quantile": 2},
}  # fmt: skip
"""Excerpts that are shown of each half (`all` in `compat` mode); quantile ones of each interval."""
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
    return LayerView(
        layer=layer, records=records, strings=strings, explained=tuple(_explained(layer)), weights=open_weights(layer)
    )  # fmt: skip


def _explained(layer: Layer) -> Iterator[Explained]:
    if not Store(layer.run).path.exists():
        return
    store = Store.open(layer.run)
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
    strings = _Strings(view.strings)
    groups = list(_excerpt_groups(view, slice(start, stop)))
    neurons = [
        _facts(view, index) | {"excerpts": [group for one in groups if (group := _group(one, index - start, strings))]}
        for index in range(start, stop)
    ]
    return {"of": _of(view.layer), "start": start, "strings": strings.used, "neurons": neurons}


class _Strings:
    """The strings of a chunk, numbered as they come."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._numbers = strings, dict[int, int]()

    def numbers(self, tokens: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
        return np.array([self._numbers.setdefault(one, len(self._numbers)) for one in tokens.tolist()], dtype=np.int64)

    @property
    def used(self) -> list[str]:
        return [self._strings[token] for token in self._numbers]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """The excerpts of one kind and half that are shown of some neurons."""

    kind: str
    part: str
    width: int
    intervals: tuple[int, ...]
    """Of quantile excerpts, the interval of each; empty for others."""
    excerpts: Excerpts


def _excerpt_groups(view: LayerView, neurons: slice) -> Iterator[_Group]:
    """The widest excerpts there are, top ones first."""
    records = view.records.rows(neurons)
    widest = max((width for width, _, _ in records.sets), default=0)
    sets = [one for one in records.sets if one[0] == widest and one[1] in SHOWN]
    for width, part, kind in sorted(sets, key=lambda one: (("top", "random", "quantile").index(one[2]), one[1])):
        count, each = SHOWN[part][kind], QUANTILES_RECORDED[records.mode]
        held = records.arrays[f"{width}.{part}.{kind}.position"].shape[1]
        intervals = range(max(held // each, 1)) if kind == "quantile" else range(1)
        picks = [interval * each + item for interval in intervals for item in range(count)]
        picks = [pick for pick in picks if pick < held]
        if picks:
            yield _Group(
                kind=kind, part=part, width=width, excerpts=records.excerpts(width, part, kind).take(picks),
                intervals=tuple(pick // each for pick in picks) if kind == "quantile" else (),
            )  # fmt: skip


def _group(group: _Group, row: int, strings: _Strings) -> dict[str, Any] | None:
    excerpts, items = group.excerpts, []
    for place in np.flatnonzero(excerpts.position[row] != ABSENT).tolist():
        length = int((excerpts.tokens[row, place] != ABSENT).sum())
        items.append({
            "document": int(excerpts.document[row, place]), "position": int(excerpts.position[row, place]),
            "tokens": pack_ids(strings.numbers(excerpts.tokens[row, place, :length])),
            "values": pack_sparse(excerpts.activations[row, place, :length]),
            **({"interval": group.intervals[place]} if group.intervals else {}),
        })  # fmt: skip
    return {"kind": group.kind, "part": group.part, "items": items} if items else None


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
        entry["scores"] += [_score(scored, index) for scored in one.scores if index in scored.row]
    return list(found.values())


def _score(scored: Scored, index: int) -> dict[str, Any]:
    scores, row = scored.scores, scored.row[index]
    return {
        "protocol": scored.key.protocol, "simulator": scored.key.simulator,
        "correlation": number(scores.correlation[row]), "reason": scores.reason[row],
        "r_squared": number(scores.r_squared[row]), "absolute_deviation": number(scores.absolute_deviation[row]),
        "spearman": number(scores.spearman[row]), "auroc": number(scores.auroc[row]),
        "tokens": int(scores.tokens[row]), "excerpts": int(scores.excerpts[row]),
    }  # fmt: skip
