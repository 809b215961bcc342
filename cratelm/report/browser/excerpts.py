"""The excerpts on a neuron's page, and an explanation's predictions on the scored excerpts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cratelm.activations.records import ABSENT, Excerpts, LayerRecords
from cratelm.interpretation.protocols import PROTOCOLS, QUANTILES_RECORDED, Draw, protocol
from cratelm.interpretation.simulators.simulation import LayerSimulations
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.browser.chunks import pack, pack_ids, pack_sparse
from cratelm.report.browser.weights import number

_SHOWN: Mapping[str, Mapping[str, int]] = {
    "explain": {"top": 6, "random": 0, "quantile": 1}, "score": {"top": 5, "random": 5, "quantile": 1},
    "all": {"top": 10, "random": 6, "quantile": 2},
}  # fmt: skip
"""Number of excerpts shown of each half (`all` in `compat` mode); for quantile excerpts, of each interval."""


class ChunkStrings:
    """The token strings of a chunk, numbered in the order of their first use."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings, self._numbers = strings, dict[int, int]()

    def numbers(self, tokens: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
        """The numbers of some tokens in this chunk."""
        numbers = [self._numbers.setdefault(token, len(self._numbers)) for token in tokens.tolist()]
        return np.array(numbers, dtype=np.int64)

    @property
    def used(self) -> list[str]:
        """The text of each number."""
        return [self._strings[token] for token in self._numbers]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """The shown excerpts of one kind and half of some neurons."""

    kind: str
    part: str
    width: int
    picks: tuple[int, ...]
    """The rank of each excerpt in the recorded set."""
    intervals: tuple[int, ...]
    """The interval of each quantile excerpt; empty for other kinds."""
    excerpts: Excerpts


def excerpt_groups(records: LayerRecords) -> Iterator[_Group]:
    """The widest recorded excerpts, top excerpts first."""
    widest = max((width for width, _, _ in records.sets), default=0)
    sets = [key for key in records.sets if key[0] == widest and key[1] in _SHOWN]
    for width, part, kind in sorted(sets, key=lambda key: (("top", "random", "quantile").index(key[2]), key[1])):
        count, each = _SHOWN[part][kind], QUANTILES_RECORDED[records.mode]
        recorded = records.arrays[f"{width}.{part}.{kind}.position"].shape[1]
        intervals = range(max(recorded // each, 1)) if kind == "quantile" else range(1)
        picks = [interval * each + item for interval in intervals for item in range(count)]
        picks = [pick for pick in picks if pick < recorded]
        if picks:
            yield _Group(
                kind=kind, part=part, width=width, picks=tuple(picks),
                excerpts=records.excerpts(width, part, kind).take(picks),
                intervals=tuple(pick // each for pick in picks) if kind == "quantile" else (),
            )  # fmt: skip


def group_value(
    group: _Group, row: int, strings: ChunkStrings, predicted: Mapping[tuple[str, int], np.ndarray]
) -> dict[str, Any]:
    """One neuron's excerpts of a group, with the predictions on scored excerpts."""
    excerpts, items = group.excerpts, []
    for place in np.flatnonzero(excerpts.position[row] != ABSENT).tolist():
        length = int((excerpts.tokens[row, place] != ABSENT).sum())
        item = {
            "document": int(excerpts.document[row, place]), "position": int(excerpts.position[row, place]),
            "tokens": pack_ids(strings.numbers(excerpts.tokens[row, place, :length])),
            "values": pack_sparse(excerpts.activations[row, place, :length]),
        }  # fmt: skip
        if group.intervals:
            item["interval"] = group.intervals[place]
        if group.part != "explain" and (group.kind, group.picks[place]) in predicted:
            item["predicted"] = _steps(predicted[group.kind, group.picks[place]])
        items.append(item)
    return {"kind": group.kind, "part": group.part, "items": items}


def _steps(values: Float[np.ndarray, " tokens"]) -> dict[str, Any]:
    """Numbers in 255 steps up to the largest, which is precise enough for a prediction."""
    largest = float(values.max(initial=0.0))
    steps = np.clip(np.rint(255 * values / largest), 0, 255) if largest > 0 else np.zeros(len(values))
    return {"largest": number(largest), **pack(steps, "u8")}


@dataclass(frozen=True, kw_only=True, slots=True)
class Predicted:
    """The predictions of one set of explanations on the scored excerpts."""

    key: SetKey
    simulations: LayerSimulations
    draws: tuple[Draw, ...]
    row: Mapping[int, int]
    """Neuron -> its row in the simulations."""

    def of(self, records: LayerRecords, index: int) -> dict[tuple[str, int], np.ndarray]:
        """Kind and rank of an excerpt -> the prediction for each of its tokens."""
        if index not in self.row:
            return {}
        values, part = self.simulations.of(self.row[index]), "score" if records.mode == "fixed" else "all"
        predictions: dict[tuple[str, int], np.ndarray] = {}
        start = 0
        for draw in self.draws:
            name = f"{draw.width}.{part}.{draw.kind}"
            for pick in draw.picks:
                recorded = pick < records.arrays[f"{name}.position"].shape[1]
                length = int(records.arrays[f"{name}.length"][index, pick]) if recorded else 0
                predictions[draw.kind, pick] = values[start : start + length]
                start += length
        assert start == len(values), "these simulations are of other excerpts"
        return predictions


def open_predicted(store: Store | None, scored: Sequence[SetKey], records: LayerRecords) -> Predicted | None:
    """The simulations of the first set of scores on whole excerpts of the shown width."""
    widest = max((width for width, _, _ in records.sets), default=0)
    for key in scored:
        draws = protocol(key.protocol, records.mode).score if key.protocol in PROTOCOLS else ()
        whole = bool(draws) and all(draw.crop is None and draw.width == widest for draw in draws)
        if store is not None and whole and store.is_done(key, "simulate"):
            simulations = store.simulations(key)
            row = {int(neuron): row for row, neuron in enumerate(simulations.neuron)}
            return Predicted(key=key, simulations=simulations, draws=draws, row=row)
    return None
