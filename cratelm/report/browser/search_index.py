"""A prefix index over tokens and explanations, in chunks; a search reads only the chunks with matching terms.

Terms are sorted and cut into chunks of about equal size; the directory lists the first term of each chunk, so that a
browser finds a term by bisection. The neurons of a term are sorted by how strongly they fire on the token, then by
score.
"""

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.report.browser.catalogue import Layer
from cratelm.report.browser.chunks import pack, unpack

CHUNK_BYTES = 48_000
LONGEST_TERM = 40
MOST_NEURONS = 2000
"""Neurons listed per term; the total is stored next to the list."""
NEURON_BITS = 20
"""An entry is the number of the layer times 2^20 plus the neuron."""
IN_EXPLANATION = 100.0
"""Rank of a word of an explanation: after every token."""


class SearchIndex:
    """Collects the terms of layers."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[array, array]] = {}
        self._places: list[dict[str, Any]] = []

    def add_layer(self, layer: Layer, numbers: Mapping[str, Any], chunks: Iterable[Mapping[str, Any]]) -> None:
        """Add a layer: `numbers` is its `layer_value`, `chunks` its `texts_value` from the first neuron to the last."""
        sets = numbers["sets"]
        scores = unpack(sets[0]["correlation"]) if sets else np.full(numbers["neurons"], np.nan)
        for chunk in chunks:
            self.add(len(self._places), chunk, scores.tolist(), [one["explainer"] for one in numbers["explained"]])
        self._places.append({"model": layer.model, "tap": layer.tap_slug, "layer": layer.layer})

    def directory(self, chunks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The first term of each chunk, and the layers by number."""
        return {"first": [chunk["terms"][0] for chunk in chunks], "places": self._places}

    def add(self, place: int, texts: Mapping[str, Any], scores: Sequence[float], explainers: Sequence[str]) -> None:
        """Add a chunk of `texts_value`. `scores`: of all neurons of the layer; `explainers`: of its sets."""
        assert place < 1 << (32 - NEURON_BITS), "too many layers for one index"
        for row, (tokens, explanations) in enumerate(zip(texts["tokens"], texts["texts"], strict=True)):
            neuron = texts["start"] + row
            # Between 0 for the best explained neuron and 1 for one without a score.
            tie = 0.5 - 0.5 * scores[neuron] if scores[neuron] == scores[neuron] else 1.0
            for term, rank in _terms(tokens, explanations, explainers).items():
                ranks, neurons = self._entries.setdefault(term, (array("d"), array("I")))
                ranks.append(rank + tie / 2)
                neurons.append((place << NEURON_BITS) | neuron)

    def chunks(self) -> Iterator[dict[str, Any]]:
        """The chunks in the order of UTF-16 units, in which a browser compares strings."""
        terms: list[str] = []
        totals: list[int] = []
        packed: list[dict[str, str]] = []
        size = 0
        for term in sorted(self._entries, key=lambda term: term.encode("utf-16-be", "surrogatepass")):
            ranks, neurons = self._entries[term]
            order = np.argsort(np.frombuffer(ranks), kind="stable")[:MOST_NEURONS]
            terms.append(term)
            totals.append(len(neurons))
            packed.append(pack(np.frombuffer(neurons, dtype=np.uint32)[order], "u32"))
            size += len(packed[-1]["u32"]) + len(term.encode("utf-8", "surrogatepass")) + 20
            if size >= CHUNK_BYTES:
                yield {"terms": terms, "totals": totals, "neurons": packed}
                terms, totals, packed, size = [], [], [], 0
        if terms:
            yield {"terms": terms, "totals": totals, "neurons": packed}


def _terms(tokens: Sequence[str], explanations: Sequence[Sequence[Any]], explainers: Sequence[str]) -> dict[str, float]:
    """Term -> its lowest rank."""
    ranks: dict[str, float] = {}
    for rank, token in enumerate(tokens):
        ranks.setdefault(as_term(token), float(rank))
    for text, sets in explanations:
        by_lookup = all(explainers[number] == EXPLAINER for number in sets)
        words = re.findall(r'"(.+?)" \(', text) if by_lookup else re.findall(r"\w+", text)
        for word in words:
            ranks.setdefault(as_term(word), IN_EXPLANATION)
    ranks.pop("", None)
    return ranks


def as_term(text: str) -> str:
    """A token or word as a search term: stripped and in lower case."""
    shown = text.strip(" ") or "␣" * len(text)
    return shown.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥").lower()[:LONGEST_TERM]
