"""A prefix index over tokens and explanations, in chunks: a search reads the few that can hold what was typed.

Terms are sorted and cut into chunks of about equal size; the directory holds the first term of each, so a browser finds
the right one by bisection. A term's neurons come best match first: the more strongly a neuron fires on a token, the
earlier, and among equals the better explained one.
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
"""Neurons kept of one term; how many there are in all is said beside them."""
NEURON_BITS = 20
"""An entry is the number of the layer times 2^20, and the neuron."""
IN_EXPLANATION = 100.0
"""Rank of a word that stands in an explanation only: behind every token."""


class SearchIndex:
    """Collects the terms of one layer after the other."""

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
        """The first term of each chunk, and the layers by their numbers."""
        return {"first": [chunk["terms"][0] for chunk in chunks], "places": self._places}

    def add(self, place: int, texts: Mapping[str, Any], scores: Sequence[float], explainers: Sequence[str]) -> None:
        """Take in a chunk of `texts_value`; `scores` is of all neurons of the layer, `explainers` of its sets."""
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
        """The chunks in order. An order of UTF-16 units, because a browser compares so."""
        terms: list[str] = []
        totals: list[int] = []
        found: list[dict[str, str]] = []
        size = 0
        for term in sorted(self._entries, key=lambda term: term.encode("utf-16-be", "surrogatepass")):
            ranks, neurons = self._entries[term]
            order = np.argsort(np.frombuffer(ranks), kind="stable")[:MOST_NEURONS]
            terms.append(term)
            totals.append(len(neurons))
            found.append(pack(np.frombuffer(neurons, dtype=np.uint32)[order], "u32"))
            size += len(found[-1]["u32"]) + len(term.encode("utf-8", "surrogatepass")) + 20
            if size >= CHUNK_BYTES:
                yield {"terms": terms, "totals": totals, "neurons": found}
                terms, totals, found, size = [], [], [], 0
        if terms:
            yield {"terms": terms, "totals": totals, "neurons": found}


def _terms(tokens: Sequence[str], explanations: Sequence[Sequence[Any]], explainers: Sequence[str]) -> dict[str, float]:
    """Term -> rank, the lowest where there are several."""
    found: dict[str, float] = {}
    for rank, token in enumerate(tokens):
        found.setdefault(as_term(token), float(rank))
    for text, sets in explanations:
        by_lookup = all(explainers[number] == EXPLAINER for number in sets)
        words = re.findall(r'"(.+?)" \(', text) if by_lookup else re.findall(r"\w+", text)
        for word in words:
            found.setdefault(as_term(word), IN_EXPLANATION)
    found.pop("", None)
    return found


def as_term(text: str) -> str:
    """A token or word as it is searched for: without white space around it and without upper case."""
    shown = text.strip(" ") or "␣" * len(text)
    return shown.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥").lower()[:LONGEST_TERM]
