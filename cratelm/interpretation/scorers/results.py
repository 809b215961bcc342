"""What a classifying scorer found for one neuron: item by item, with every answer that cannot be read; and in numbers.

balanced accuracy   (share of the positives called positive + share of the negatives called negative) / 2
precision           share of what was called positive that is
recall              share of the positives called positive
F1                  harmonic mean of precision and recall
AUC                 P(score of a positive > score of a negative), a tie counted half
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

UNREADABLE = "too few answers"
"""Reason: fewer items than asked of either kind were answered in a form that can be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreadable:
    """An answer that is none: not the form asked for, a refusal, the wrong number of items."""

    items: tuple[int, ...]
    """The items it was to be about."""
    said: str
    """What came instead, whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What one scorer found for one neuron. Items are in the order in which they were asked."""

    reason: str = ""
    """Why there is no number: `too few excerpts`, `too few answers`; empty where there is one."""
    active: int = 0
    """Windows on which the neuron fires, to draw positives from."""
    silent: int = 0
    """Windows on which it is silent, to draw negatives from."""
    truth: tuple[int, ...] = ()
    """Of each item: 1 for a positive, 0 for a negative; for `intruder` the place of the intruder, from 1."""
    answer: tuple[int | None, ...] = ()
    """What was answered; None where the answer could not be read. Empty for scorers that give a score alone."""
    score: tuple[float | None, ...] = ()
    """What ranks the items: P(1) / (P(0) + P(1)), nats per token gained, or a cosine. Empty where there is none."""
    position: tuple[int, ...] = ()
    """Index of each item's first token in the collected split; of `intruder` that of the intruder."""
    options: int = 0
    """Windows that an intruder hides among, itself counted; 0 for other scorers."""
    failures: tuple[Unreadable, ...] = ()
    """Every answer that could not be read."""

    @property
    def failed(self) -> int:
        """Items without a readable answer."""
        return sum(len(one.items) for one in self.failures)

    def row(self) -> dict[str, Any]:
        """As JSON for the store, without what is empty."""
        return {name: value for name, value in asdict(self).items() if value not in ("", (), 0)}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Judged":
        """From the store; fields of a later version are passed over."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
        }
        values["failures"] = tuple(
            Unreadable(items=tuple(one["items"]), said=one["said"]) for one in row.get("failures", ())
        )
        return cls(**{name: value for name, value in values.items() if name in known})

    def numbers(self) -> dict[str, float]:
        """All measures that the items allow; those that are undefined are left out."""
        if self.reason:
            return {}
        found: dict[str, float] = {}
        truth = np.array(self.truth)
        if self.options:
            answered = np.array([answer is not None for answer in self.answer])
            hits = sum(answer == true for answer, true in zip(self.answer, self.truth, strict=True))
            count = int(answered.sum())
            low, high = binomial_interval(hits, count)
            found = {"accuracy": hits / count, "low": low, "high": high, "chance": 1 / self.options}
        elif self.answer:
            there = np.array([answer is not None for answer in self.answer])
            said = np.array([answer for answer in self.answer if answer is not None])
            found = classification(truth[there] == 1, said == 1)
        if self.score:
            there = np.array([score is not None for score in self.score])
            values = np.array([score for score in self.score if score is not None], dtype=np.float64)
            found["auc"] = auc(truth[there] == 1, values)
        return {name: value for name, value in found.items() if not np.isnan(value)}


def classification(truth: Bool[np.ndarray, " items"], said: Bool[np.ndarray, " items"]) -> dict[str, float]:
    """The measures of answers; NaN where one divides by nothing."""
    hits, alarms = int((truth & said).sum()), int((~truth & said).sum())
    misses, rejections = int((truth & ~said).sum()), int((~truth & ~said).sum())
    recall, precision = _share(hits, hits + misses), _share(hits, hits + alarms)
    return {
        "balanced_accuracy": (recall + _share(rejections, rejections + alarms)) / 2,
        "precision": precision, "recall": recall, "f1": _share(2 * hits, 2 * hits + alarms + misses),
    }  # fmt: skip


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def auc(truth: Bool[np.ndarray, " items"], scores: Float64[np.ndarray, " items"]) -> float:
    """How often a positive has the higher score than a negative, ties counted half; NaN without both."""
    if truth.all() or not truth.any():
        return float("nan")
    difference = scores[truth][:, None] - scores[~truth]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def binomial_interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in [0, 1] whatever the counts."""
    if not trials:
        return 0.0, 1.0
    z, share = 1.959963984540054, hits / trials
    middle = share + z * z / (2 * trials)
    half = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(float((middle - half) / scale), 0.0), min(float((middle + half) / scale), 1.0)


def enough(truth: Sequence[int], answer: Sequence[int | None], least: int) -> bool:
    """Whether enough positives and enough negatives were answered."""
    answered = [true for true, one in zip(truth, answer, strict=True) if one is not None]
    return min(sum(true == 1 for true in answered), sum(true == 0 for true in answered)) >= least
