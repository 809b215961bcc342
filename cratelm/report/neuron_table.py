"""What is known about every neuron of one layer, as a table: statistics, strongest tokens, scores, explanations.

`cratelm neurons` prints it, `cratelm export --format csv` writes it. It works before anything is scored.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from cratelm.activations.records import Excerpts, LayerRecords, Mode, join, read_records, records_tokenizer
from cratelm.data.tokenizer import load_tokenizer, token_strings
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.explanation import DEAD
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.protocols import PROTOCOLS
from cratelm.interpretation.scoring.correlation import LayerScores
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey

Column = Literal["neuron", "score", "density", "max", "min", "mean", "variance", "skewness", "kurtosis"]
STATISTICS = {"max": "maximum", "min": "minimum"}
"""Columns that records name otherwise."""
STRONGEST = 5
"""Tokens named per neuron."""
NUMBERS = ("correlation", "spearman", "auroc")
"""Scores of a neuron that are written out."""
SCORED, NOT_SCORED, NO_RECORD = "scored", "not scored", "no record"
CHUNK = 256
"""Neurons at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpretation:
    """What one protocol says about the neurons of a layer."""

    explanations: Mapping[int, str]
    """By neuron index."""
    scores: LayerScores | None


@dataclass(frozen=True, kw_only=True)
class NeuronTable:
    """The neurons of one layer."""

    records: LayerRecords
    strings: Sequence[str]
    """Text of each token id."""
    interpretations: Mapping[str, Interpretation]
    """By protocol, in the paper's order; empty before anything is explained."""
    protocol: str
    """The protocol whose scores and explanations the table shows."""
    hint: str
    """What to run where there are no scores; empty where there are."""

    @property
    def scores(self) -> LayerScores | None:
        """Scores of the protocol shown."""
        return self.interpretations[self.protocol].scores if self.protocol in self.interpretations else None

    @property
    def explanations(self) -> Mapping[int, str]:
        """Explanations of the protocol shown."""
        return self.interpretations[self.protocol].explanations if self.protocol in self.interpretations else {}

    def column(self, name: str) -> Float[np.ndarray, " neurons"]:
        """A column of numbers: density in percent, score in points, all else in the model's own units."""
        count = self.records.num_neurons
        if name == "neuron":
            return np.arange(count, dtype=np.float64)
        if name == "score":
            return np.full(count, np.nan) if self.scores is None else 100 * self.scores.correlation
        values = self.records.statistics[STATISTICS.get(name, name)].astype(np.float64)
        return 100 * values if name == "density" else values

    @cached_property
    def status(self) -> tuple[str, ...]:
        """Of each neuron: `scored`, why it has no score, or `not scored` yet."""
        if self.scores is not None:
            return tuple(reason or SCORED for reason in self.scores.reason)
        maximum = self.records.statistics["maximum"]
        return tuple(NO_RECORD if np.isnan(m) else DEAD if m <= 0 else NOT_SCORED for m in maximum)

    @cached_property
    def _top(self) -> Excerpts:
        width = max(width for width, _, _ in self.records.sets)
        return join([self.records.excerpts(*one) for one in self.records.sets if one[0] == width and one[2] == "top"])

    def strongest(self, rows: Integer[np.ndarray, " chosen"]) -> list[list[str]]:
        """The different tokens with the highest activations in the top excerpts of some neurons, strongest first."""
        found: list[list[str]] = []
        for start in range(0, len(rows), CHUNK):
            some = self._top.rows(rows[start : start + CHUNK])
            activations = some.activations.reshape(len(some.activations), -1)
            tokens = some.tokens.reshape(activations.shape)
            order = np.argsort(-activations, axis=1, kind="stable")
            for row, ranked in enumerate(order):
                positive = ranked[activations[row, ranked] > 0]
                distinct = dict.fromkeys(tokens[row, positive].tolist())
                found.append([self.strings[token] for token in list(distinct)[:STRONGEST]])
        return found

    def choose(self, filters: Sequence[str], sort: Column, *, reverse: bool = False) -> Int[np.ndarray, " chosen"]:
        """Indices of the neurons that pass every filter, sorted: by index, or from the highest value down.

        A neuron without a value comes last either way.
        """
        keep = np.ones(self.records.num_neurons, dtype=bool)
        for text in filters:
            keep &= self._passes(text)
        values = self.column(sort)
        ascending = (sort == "neuron") != reverse
        order = np.argsort(values if ascending else -values, kind="stable")  # NaN sorts last
        return order[keep[order]]

    def _passes(self, text: str) -> Bool[np.ndarray, " neurons"]:
        numbers = ("neuron", "score", "density", *STATISTICS, "mean", "variance", "skewness", "kurtosis")
        words: Mapping[str, Callable[[], Sequence[str]]] = {
            "status": lambda: self.status,
            "token": lambda: [" ".join(tokens) for tokens in self.strongest(np.arange(self.records.num_neurons))],
            "explanation": lambda: [self.explanations.get(i, "") for i in range(self.records.num_neurons)],
        }
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>|=)\s*(.+?)\s*", text)
        if match and match[1] in words and match[2] == "=":
            asked = match[3].casefold()
            return np.array([asked in value.casefold() for value in words[match[1]]()], dtype=bool)
        if match and match[1] in numbers and _is_number(match[3]):
            value, limit = self.column(match[1]), float(match[3])
            compare = {"<": np.less, ">": np.greater, "<=": np.less_equal, ">=": np.greater_equal, "=": np.equal}
            return np.asarray(compare[match[2]](value, limit))
        raise CrateError(
            f"the filter {text!r} is not understood. Write NAME<NUMBER, NAME>NUMBER or NAME=NUMBER with one of "
            f"{', '.join(numbers)}, or NAME=TEXT with one of {', '.join(words)}; in quotes"
        )


def _is_number(text: str) -> bool:
    try:
        return not np.isnan(float(text))
    except ValueError:
        return False


def open_table(
    run: Path, layer: int, *, mode: Mode = "fixed", tap: str = "neurons", protocol: str = "", explainer: str = EXPLAINER
) -> NeuronTable:
    """Everything about one layer. `protocol` is the one shown: empty for the first that has scores."""
    if protocol and protocol not in PROTOCOLS:
        raise CrateError(f"there is no protocol {protocol!r}. Use one of: {', '.join(PROTOCOLS)}")
    records = read_records(run, layer, mode=mode, tap=tap)
    found = dict(_interpretations(run, records, explainer))
    scored = [name for name, one in found.items() if one.scores is not None]
    shown = protocol or [*scored, *found, PROTOCOLS[0]][0]
    return NeuronTable(
        records=records, strings=token_strings(load_tokenizer(records_tokenizer(run, mode))),
        interpretations=found, protocol=shown,
        hint="" if shown in scored else _hint(
            run, SetKey(mode=mode, tap=tap, layer=layer, protocol=shown, explainer=explainer)
        ),
    )  # fmt: skip


def _interpretations(run: Path, records: LayerRecords, explainer: str) -> Iterator[tuple[str, Interpretation]]:
    if not Store(run).path.exists():
        return
    store = Store.open(run)
    for name in PROTOCOLS:
        key = SetKey(mode=records.mode, tap=records.tap, layer=records.layer, protocol=name, explainer=explainer)
        scored = [one for one in store.scored() if replace(one, simulator="") == key]
        if store.is_done(key, "explain"):
            made = store.explanations(key)
            texts = dict(zip(made.neuron.tolist(), made.texts, strict=True))
            current = [one for one in scored if store.is_done(one, "score")]
            scores = store.scores(current[0]).of_layer(records.num_neurons) if current else None
            yield name, Interpretation(explanations=texts, scores=scores)


def _hint(run: Path, key: SetKey) -> str:
    """Why there is no score, and the command that makes one."""
    if not Store(run).path.exists():
        return f"no neuron is scored yet. Run: cratelm interpret {run}" + " --mode compat" * (key.mode == "compat")
    try:
        Store.open(run).check(key, "score", verb="interpret")
    except CrateError as error:
        return str(error)
    raise AssertionError("scores that are there and of these records need no hint")


def as_csv(table: NeuronTable) -> str:
    """The whole layer, unrounded: density as a share, correlations in [-1, 1], strongest tokens as a JSON list."""
    statistics = table.records.statistics
    heads = ["layer", "neuron", *statistics, "strongest_tokens"]
    for name in table.interpretations:
        heads += [f"{name} {part}" for part in (*NUMBERS, "status", "explanation")]
    everyone = np.arange(table.records.num_neurons)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for index, tokens in enumerate(table.strongest(everyone)):
        row: list[object] = [table.records.layer, index]
        row += [_plain(values[index]) for values in statistics.values()]
        row.append(json.dumps(tokens, ensure_ascii=False))
        for one in table.interpretations.values():
            reason = NOT_SCORED if one.scores is None else one.scores.reason[index] or SCORED
            numbers = ("",) * 3 if one.scores is None else [_plain(getattr(one.scores, n)[index]) for n in NUMBERS]
            row += [*numbers, reason, one.explanations.get(index, "")]
        writer.writerow(row)
    return out.getvalue()


def _plain(value: np.floating | float) -> str:
    return "" if np.isnan(value) else str(value)
