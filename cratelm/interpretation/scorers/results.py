"""The result of a scorer for one neuron: item by item, with every answer that failed to parse; and as numbers.

balanced accuracy   (share of the positives called positive + share of the negatives called negative) / 2
precision           share of items called positive that are positive
recall              share of the positives called positive
F1                  harmonic mean of precision and recall
AUC                 P(score of a positive > score of a negative), a tie counts as half
correlation         Pearson correlation of score and level, where positives have several levels
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int

UNREADABLE = "too few answers"
"""Reason: too few positives or negatives have an answer that could be parsed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreadable:
    """An unusable answer: wrong format, a refusal, or the wrong number of items."""

    items: tuple[int, ...]
    """Items that the prompt asked about."""
    said: str
    """The complete answer, or the error message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Result of one scorer for one neuron. Items are in the order of the prompts."""

    reason: str = ""
    """Why there is no number: `too few excerpts` or `too few answers`; otherwise empty."""
    active: int = 0
    """Number of windows on which the neuron fires, from which positives are drawn."""
    silent: int = 0
    """Number of windows on which it is silent, from which negatives are drawn."""
    truth: tuple[int, ...] = ()
    """Label of each item: 1 for a positive, 0 for a negative; for `rating` the level of a positive, from 1; for
    `intruder` the position of the intruder, from 1."""
    answer: tuple[int | None, ...] = ()
    """Answer to each item, None if it failed to parse. Empty for scorers that return only a score."""
    score: tuple[float | None, ...] = ()
    """Score that ranks the items: P(1) / (P(0) + P(1)), gain in nats per token, a cosine, or an expected rating as a
    share of the highest. Empty if there is none."""
    position: tuple[int, ...] = ()
    """Index of each item's first token in the collected split; for `intruder` that of the intruder, for `output` the
    token id."""
    options: int = 0
    """Windows of a question, the intruder included; 0 for other scorers."""
    failures: tuple[Unreadable, ...] = ()
    """Every unusable answer."""

    @property
    def failed(self) -> int:
        """Number of items without a usable answer."""
        return sum(len(failure.items) for failure in self.failures)

    def row(self) -> dict[str, Any]:
        """As JSON for the store, without empty fields."""
        return {name: value for name, value in asdict(self).items() if value not in ("", (), 0)}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Judged":
        """Read a row of the store; fields of a later version are ignored."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
        }
        values["failures"] = tuple(
            Unreadable(items=tuple(failure["items"]), said=failure["said"]) for failure in row.get("failures", ())
        )
        return cls(**{name: value for name, value in values.items() if name in known})

    def numbers(self) -> dict[str, float]:
        """All measures that are defined for the items."""
        if self.reason:
            return {}
        measures: dict[str, float] = {}
        truth = np.array(self.truth)
        if self.options:
            answered = np.array([answer is not None for answer in self.answer])
            hits = sum(answer == true for answer, true in zip(self.answer, self.truth, strict=True))
            count = int(answered.sum())
            low, high = binomial_interval(hits, count)
            measures = {"accuracy": hits / count, "low": low, "high": high, "chance": 1 / self.options}
        elif self.answer:
            known = np.array([answer is not None for answer in self.answer])
            called = np.array([answer for answer in self.answer if answer is not None])
            measures = classification(truth[known] == 1, called == 1)
        if self.score:
            known = np.array([score is not None for score in self.score])
            values = np.array([score for score in self.score if score is not None], dtype=np.float64)
            measures["auc"] = auc(truth[known] > 0, values)
            if truth.max(initial=0) > 1:
                (measures["correlation"],) = weighted_correlation(np.ones((1, len(values))), truth[known], values)
        return {name: value for name, value in measures.items() if not np.isnan(value)}


def classification(truth: Bool[np.ndarray, " items"], called: Bool[np.ndarray, " items"]) -> dict[str, float]:
    """The measures of answers; NaN if the denominator is 0."""
    hits, alarms = int((truth & called).sum()), int((~truth & called).sum())
    misses, rejections = int((truth & ~called).sum()), int((~truth & ~called).sum())
    recall, precision = _share(hits, hits + misses), _share(hits, hits + alarms)
    return {
        "balanced_accuracy": (recall + _share(rejections, rejections + alarms)) / 2,
        "precision": precision, "recall": recall, "f1": _share(2 * hits, 2 * hits + alarms + misses),
    }  # fmt: skip


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def auc(truth: Bool[np.ndarray, " items"], scores: Float64[np.ndarray, " items"]) -> float:
    """How often a positive has a higher score than a negative, ties count as half; NaN without both classes."""
    if truth.all() or not truth.any():
        return float("nan")
    difference = scores[truth][:, None] - scores[~truth]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def weighted_correlation(
    weights: Float64[np.ndarray, "sets items"], levels: Int[np.ndarray, " items"], scores: Float64[np.ndarray, " items"]
) -> Float64[np.ndarray, " sets"]:
    """Pearson correlation of levels and scores, for each set of weights; NaN where either has a single value."""
    total = weights.sum(axis=1)

    def covariance(first: np.ndarray, second: np.ndarray) -> Float64[np.ndarray, " sets"]:
        means = [weights @ values / total for values in (first, second)]
        return np.asarray(weights @ (first * second) / total - means[0] * means[1])

    centred = levels - levels.mean(), scores - scores.mean()  # of constant scores every number is exactly 0
    spread = covariance(centred[0], centred[0]) * covariance(centred[1], centred[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-30, covariance(*centred) / np.sqrt(spread), np.nan)


def binomial_interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, always within [0, 1]."""
    if not trials:
        return 0.0, 1.0
    z, share = 1.959963984540054, hits / trials
    middle = share + z * z / (2 * trials)
    half = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(float((middle - half) / scale), 0.0), min(float((middle + half) / scale), 1.0)


def enough(truth: Sequence[int], answer: Sequence[int | None], least: int) -> bool:
    """Whether at least `least` positives and negatives have an answer."""
    answered = [true for true, given in zip(truth, answer, strict=True) if given is not None]
    return min(sum(true == 1 for true in answered), sum(true == 0 for true in answered)) >= least
