"""The neurons of one layer as a table: statistics, strongest tokens, scores, explanations.

`cratelm neurons` prints it, `cratelm export --format csv` writes it. It does not need scores.
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

from cratelm.activations.records import (
    LayerRecords,
    Mode,
    join,
    read_collection,
    read_records,
    records_strings,
)
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.explanation import DEAD
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.protocols import PROTOCOLS
from cratelm.interpretation.scoring.correlation import LayerScores
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey

SortColumn = Literal["neuron", "score", "density", "max", "min", "mean", "variance", "skewness", "kurtosis"]
RECORDED_AS = {"max": "maximum", "min": "minimum"}
"""Columns with another name in the records."""
STRONGEST = 5
"""Tokens listed per neuron."""
MEASURES_WRITTEN = ("correlation", "spearman", "auroc")
"""Scores of a neuron in the CSV file."""
SCORED, NOT_SCORED, NO_RECORD = "scored", "not scored", "no record"
_CHUNK = 256
"""Neurons at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpretation:
    """Explanations and scores of the neurons of a layer by one protocol."""

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
    """By protocol, in the paper's order; empty without explanations."""
    protocol: str
    """The protocol of the scores and explanations that the table shows."""
    hint: str
    """The command to run if there are no scores; empty with scores."""

    @property
    def scores(self) -> LayerScores | None:
        """Scores by `protocol`."""
        return self.interpretations[self.protocol].scores if self.protocol in self.interpretations else None

    @property
    def explanations(self) -> Mapping[int, str]:
        """Explanations by `protocol`."""
        return self.interpretations[self.protocol].explanations if self.protocol in self.interpretations else {}

    def column(self, name: str) -> Float[np.ndarray, " neurons"]:
        """A column of numbers: density in percent, score in points, others in the model's units."""
        count = self.records.num_neurons
        if name == "neuron":
            return np.arange(count, dtype=np.float64)
        if name == "score":
            return np.full(count, np.nan) if self.scores is None else 100 * self.scores.correlation
        values = self.records.statistics[RECORDED_AS.get(name, name)].astype(np.float64)
        return 100 * values if name == "density" else values

    @cached_property
    def status(self) -> tuple[str, ...]:
        """For each neuron: `scored`, the reason why it has no score, or `not scored`."""
        if self.scores is not None:
            return tuple(reason or SCORED for reason in self.scores.reason)
        maximum = self.records.statistics["maximum"]
        return tuple(NO_RECORD if np.isnan(m) else DEAD if m <= 0 else NOT_SCORED for m in maximum)

    def strongest(self, rows: Integer[np.ndarray, " chosen"]) -> list[list[str]]:
        """`strongest_tokens` of some neurons."""
        return strongest_tokens(self.records, self.strings, rows)

    def choose(self, filters: Sequence[str], sort: SortColumn, *, reverse: bool = False) -> Int[np.ndarray, " chosen"]:
        """Indices of the neurons that pass every filter, sorted by index or from the highest value down.

        Neurons without a value come last in both directions.
        """
        keep = np.ones(self.records.num_neurons, dtype=bool)
        for text in filters:
            keep &= self._passes(text)
        values = self.column(sort)
        ascending = (sort == "neuron") != reverse
        order = np.argsort(values if ascending else -values, kind="stable")  # NaN sorts last
        return order[keep[order]]

    def _passes(self, text: str) -> Bool[np.ndarray, " neurons"]:
        numbers = ("neuron", "score", "density", *RECORDED_AS, "mean", "variance", "skewness", "kurtosis")
        texts: Mapping[str, Callable[[], Sequence[str]]] = {
            "status": lambda: self.status,
            "token": lambda: [" ".join(tokens) for tokens in self.strongest(np.arange(self.records.num_neurons))],
            "explanation": lambda: [self.explanations.get(i, "") for i in range(self.records.num_neurons)],
        }
        match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>|=)\s*(.+?)\s*", text)
        if match and match[1] in texts and match[2] == "=":
            part = match[3].casefold()
            return np.array([part in text.casefold() for text in texts[match[1]]()], dtype=bool)
        if match and match[1] in numbers and _is_number(match[3]):
            value, limit = self.column(match[1]), float(match[3])
            compare = {"<": np.less, ">": np.greater, "<=": np.less_equal, ">=": np.greater_equal, "=": np.equal}
            return np.asarray(compare[match[2]](value, limit))
        raise CrateError(
            f"a filter must be NAME<NUMBER, NAME>NUMBER or NAME=NUMBER with one of {', '.join(numbers)}, or NAME=TEXT "
            f"with one of {', '.join(texts)}, in quotes; got {text!r}"
        )


def strongest_tokens(
    records: LayerRecords, strings: Sequence[str], rows: Integer[np.ndarray, " chosen"]
) -> list[list[str]]:
    """The distinct tokens with the highest activations in the top excerpts of some neurons, strongest first."""
    width = max(width for width, _, _ in records.sets)
    tops = join([records.excerpts(*key) for key in records.sets if key[0] == width and key[2] == "top"])
    strongest: list[list[str]] = []
    for start in range(0, len(rows), _CHUNK):
        some = tops.rows(rows[start : start + _CHUNK])
        activations = some.activations.reshape(len(some.activations), -1)
        tokens = some.tokens.reshape(activations.shape)
        order = np.argsort(-activations, axis=1, kind="stable")
        for row, ranked in enumerate(order):
            positive = ranked[activations[row, ranked] > 0]
            distinct = dict.fromkeys(tokens[row, positive].tolist())
            strongest.append([strings[token] for token in list(distinct)[:STRONGEST]])
    return strongest


def _is_number(text: str) -> bool:
    try:
        return not np.isnan(float(text))
    except ValueError:
        return False


def open_table(
    run: Path, layer: int, *, mode: Mode = "fixed", tap: str = "neurons", protocol: str = "", explainer: str = EXPLAINER
) -> NeuronTable:
    """Read one layer. `protocol` selects the scores to show; empty for the first protocol with scores."""
    if protocol and protocol not in PROTOCOLS:
        raise CrateError(f"the protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    records = read_records(run, layer, mode=mode, tap=tap)
    interpretations = dict(_interpretations(run, records, explainer))
    scored = [name for name, interpretation in interpretations.items() if interpretation.scores is not None]
    shown = protocol or [*scored, *interpretations, PROTOCOLS[0]][0]
    return NeuronTable(
        records=records, strings=records_strings(run, mode),
        interpretations=interpretations, protocol=shown,
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
        if store.is_done(key, "explain"):
            scored = (other for other in store.scored() if replace(other, simulator="") == key)
            current = next((other for other in scored if store.is_done(other, "score")), None)
            scores = None if current is None else store.scores(current).of_layer(records.num_neurons)
            yield name, Interpretation(explanations=store.texts(key), scores=scores)


def _hint(run: Path, key: SetKey) -> str:
    """Why there are no scores, and the command to run."""
    if not Store(run).path.exists():
        return f"no neuron is scored yet. Run: cratelm interpret {run}" + " --mode compat" * (key.mode == "compat")
    try:
        read_collection(run, mode=key.mode)  # without it, no score is known to be of these records
        Store.open(run).check(key, "score", verb="interpret")
    except CrateError as error:
        return str(error)
    raise AssertionError("the scores exist and are of these records")


def neurons_csv(table: NeuronTable) -> str:
    """The whole layer, not rounded: density as a share, correlations in [-1, 1], strongest tokens as a JSON list."""
    statistics = table.records.statistics
    heads = ["layer", "neuron", *statistics, "strongest_tokens"]
    for name in table.interpretations:
        heads += [f"{name} {part}" for part in (*MEASURES_WRITTEN, "status", "explanation")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    for index, tokens in enumerate(table.strongest(np.arange(table.records.num_neurons))):
        row: list[object] = [table.records.layer, index]
        row += [_plain(values[index]) for values in statistics.values()]
        row.append(json.dumps(tokens, ensure_ascii=False))
        for interpretation in table.interpretations.values():
            reason, numbers = NOT_SCORED, [""] * len(MEASURES_WRITTEN)
            if (scores := interpretation.scores) is not None:
                reason = scores.reason[index] or SCORED
                numbers = [_plain(getattr(scores, name)[index]) for name in MEASURES_WRITTEN]
            row += [*numbers, reason, interpretation.explanations.get(index, "")]
        writer.writerow(row)
    return out.getvalue()


def _plain(value: np.floating | float) -> str:
    return "" if np.isnan(value) else str(value)
