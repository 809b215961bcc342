"""Other measures on a neuron's page: how it fires, and the results of the other scorers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cratelm.interpretation.firing.measures import Firing, read_firing
from cratelm.interpretation.scorers.registry import SCORERS, chance
from cratelm.interpretation.scorers.results import Judged
from cratelm.interpretation.stages.judge import judged, options_asked
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.listing import sets_of
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.browser.catalogue import Layer
from cratelm.report.browser.weights import number

_SHOWN = ("consistency", "distinctiveness", "firing", "relevant")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """All measures of one layer's neurons."""

    firing: Mapping[SetKey, Mapping[int, Mapping[str, Firing]]]
    """Set of scores -> neuron -> kind of excerpts."""
    judged: tuple[tuple[SetKey, str, float, Mapping[int, Judged]], ...]
    """Set, scorer, chance level (a share), and results by neuron."""

    def firing_of(self, key: SetKey, index: int) -> list[dict[str, Any]]:
        """How the neuron fires relative to the predictions of this set, on each kind of excerpts."""
        return [
            {"excerpts": kind} | {name: _rounded(getattr(firing, name)) for name in _SHOWN}
            for kind, firing in self.firing.get(key, {}).get(index, {}).items()
        ]

    def judged_of(self, index: int) -> list[dict[str, Any]]:
        """The results of each scorer for the neuron."""
        results = []
        for key, scorer, chance_level, by_neuron in self.judged:
            if (result := by_neuron.get(index)) is not None:
                name, numbers = SCORERS[scorer].number, result.numbers()
                results.append({
                    "scorer": scorer, "judge": key.judge, "explainer": key.explainer,
                    "protocol": key.protocol, "sample": key.sample, "number": name.replace("_", " "),
                    "value": _rounded(numbers.get(name)), "chance": _rounded(numbers.get("chance", chance_level)),
                    "reason": result.reason, "items": len(result.truth), "failed": result.failed,
                })  # fmt: skip
        return results


def _rounded(value: float | None) -> float | None:
    return None if value is None else number(round(value, 4))


def open_measures(layer: Layer, store: Store) -> Measures:
    """All measures of a layer that belong to its current records."""
    place: dict[str, Any] = {"mode": layer.mode, "tap": layer.tap, "layer": layer.layer}
    return Measures(
        firing={key: read_firing(store, key) for key in sets_of(store, "firing", **place) if not key.control},
        judged=tuple(
            (key, scorer, chance(scorer, options_asked(store, key, scorer)), judged(store, key, scorer))
            for scorer in SCORERS
            for key in sets_of(store, scorer, **place)
            if not key.control
        ),
    )
