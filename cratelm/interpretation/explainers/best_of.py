"""The best of several explanations of a neuron, by a scorer on excerpts that neither explained nor score it.

The windows come from the explaining half of the records, without the documents that the explainer was shown. So the
choice uses nothing of the scoring half, and the score of the chosen explanation is as honest as that of a single one.
"""

import asyncio
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from cratelm.activations.records import NeuronRecord
from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLMError
from cratelm.interpretation.scorers.registry import SCORERS, judge
from cratelm.interpretation.scorers.windows import contrast
from cratelm.interpretation.stages.judge import JudgeContext


def selecting_scorers() -> tuple[str, ...]:
    """The scorers that can choose an explanation: those that test it on windows of text by a language model."""
    scorers = SCORERS.values()
    return tuple(s.name for s in scorers if s.explained and s.items == "windows" and s.needs != "encoder")


def check_selection(count: int, scorer: str) -> None:
    """Raise `CrateError` if explanations cannot be chosen by this scorer."""
    if count < 1:
        raise CrateError(f"--best-of must be at least 1, got {count}")
    if scorer not in selecting_scorers():
        raise CrateError(f"--best-by must be one of {', '.join(selecting_scorers())}, got {scorer!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOf:
    """Chooses the best of several explanations of a neuron."""

    scorer: str
    context: JudgeContext

    def cache_settings(self) -> dict[str, Any]:
        """Every setting that the choice depends on, apart from records and explanations."""
        return self.context.cache_settings(self.scorer)

    async def best(self, candidates: Sequence[str], record: NeuronRecord, seen: Collection[int]) -> str:
        """The candidate with the highest score; the first of several, and the first if none has a score.

        `seen`: the documents that the explainer was shown.
        """
        texts = list(dict.fromkeys(candidates))
        if len(texts) == 1:
            return texts[0]
        windows = contrast(record, self.context.questions, part="explain", seen=seen)

        async def score(text: str) -> float:
            try:
                result = await judge(
                    self.scorer, windows, text, self.context.pieces, self.context.questions, llm=self.context.llm
                )  # fmt: skip
            except LLMError:
                return -math.inf
            return result.numbers().get(SCORERS[self.scorer].number, -math.inf)

        scores = await asyncio.gather(*map(score, texts))
        return texts[max(range(len(texts)), key=lambda place: (scores[place], -place))]
