"""What is measured of a neuron beside its score, for its page: how it fires, and what judges found."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """All measures of one layer's neurons."""

    firing: Mapping[SetKey, Mapping[int, Mapping[str, Firing]]]
    """Set of scores -> neuron -> kind of excerpts."""
    judged: tuple[tuple[SetKey, str, float, Mapping[int, Judged]], ...]
    """Set, scorer, what guessing gives (a share), and what was found by neuron."""

    def firing_of(self, key: SetKey, index: int) -> list[dict[str, Any]]:
        """How the neuron fires on what this set predicts, on each kind of excerpts."""
        found = self.firing.get(key, {}).get(index, {})
        return [
            {"excerpts": kind}
            | {
                name: None if value is None else number(round(value, 4))
                for name in ("consistency", "distinctiveness", "firing", "relevant")
                for value in (getattr(one, name),)
            }
            for kind, one in found.items()
        ]

    def judged_of(self, index: int) -> list[dict[str, Any]]:
        """What each scorer found of the neuron."""
        found = []
        for key, scorer, guessing, by_neuron in self.judged:
            if index not in by_neuron:
                continue
            one, name = by_neuron[index], SCORERS[scorer].number
            numbers = one.numbers()
            found.append({
                "scorer": scorer, "judge": key.judge, "explainer": key.explainer,
                "protocol": key.protocol, "sample": key.sample, "number": name.replace("_", " "),
                "value": number(round(numbers[name], 4)) if name in numbers else None,
                "chance": number(round(numbers.get("chance", guessing), 4)), "reason": one.reason,
                "items": len(one.truth), "failed": one.failed,
            })  # fmt: skip
        return found


def open_measures(layer: Layer, store: Store) -> Measures:
    """All measures of a layer that were made from the records that are there now."""
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
