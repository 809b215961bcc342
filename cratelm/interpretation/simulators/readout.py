"""Read an activation from prompt logprobs: the mean of the numbers among the candidates.

    E = sum over v of v p(v) / sum over v of p(v)        v a whole number among the most probable next tokens

All other candidates, such as `unknown`, are ignored. The released read-out has flaws (`docs/simulators.md`), which
`compat` keeps.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cratelm.activations.records import Mode
from cratelm.interpretation.llm import LLM, LLMError, PromptLogprobs
from cratelm.interpretation.store.identities import SimulationMethod, SimulatorName

MOST_UNREAD = 0.5
"""Share of an explanation's tokens without a number among the candidates above which the simulation has failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOut:
    """A way to read activations from candidates."""

    candidates: int = 15
    """Number of most probable next tokens that are read."""
    top: int = 10
    """The largest activation."""
    spaces: bool = True
    """Whether a number with spaces around it counts."""
    escaped: bool = True
    """Whether tokens are shown escaped. If not, part of a character is shown as U+FFFD."""
    strict: bool = True
    """Whether a missing read-out is an error; if not, it counts as 0."""

    @classmethod
    def of(cls, mode: Mode, *, ten_is_one_token: bool) -> "ReadOut":
        """The read-out of a mode, for a model that writes 10 as one token or as two."""
        if mode == "compat":
            return cls(candidates=5, spaces=False, escaped=False, strict=False)
        return cls(top=10 if ten_is_one_token else 9)

    def name(self, method: SimulationMethod, model: str) -> SimulatorName:
        """The name of a simulator with this read-out."""
        return SimulatorName(method=method, model=model, top=self.top)

    def expected(self, candidates: Mapping[str, float]) -> float | None:
        """The mean of the numbers among the candidates (text -> log-probability); None without a number.

        Raw logits work too: E does not change when the same number is added to all of them.
        """
        best = sorted(candidates.items(), key=lambda pair: -pair[1])[: self.candidates]
        numbers = [(value, logprob) for text, logprob in best if (value := self._value(text)) is not None]
        if not numbers:
            return None
        largest = max(logprob for _, logprob in numbers)
        weights = [(value, math.exp(logprob - largest)) for value, logprob in numbers]
        return sum(value * weight for value, weight in weights) / sum(weight for _, weight in weights)

    def _value(self, text: str) -> int | None:
        stripped = text.strip(" ") if self.spaces else text
        written = stripped.isascii() and stripped.isdigit() and str(int(stripped)) == stripped
        return int(stripped) if written and int(stripped) <= self.top else None


def read_activations(read_out: ReadOut, answer: PromptLogprobs, at: Sequence[int], llm: LLM) -> dict[int, float | None]:
    """Read the activation at each offset; None if no candidate is a number."""
    missing = [place for place in at if place not in answer.candidates]
    if missing and read_out.strict:
        raise LLMError(f"{llm.name} gave no candidates at {len(missing)} of {len(at)} places of a prompt")
    return {place: read_out.expected(answer.candidates.get(place, {})) for place in at}


def count_unread(
    counts: Counter[str], reads: Sequence[Mapping[int, float | None]], read_out: ReadOut, llm: LLM
) -> None:
    """Count the tokens read and unread. Raises `LLMError` if most are unread."""
    values = [value for read in reads for value in read.values()]
    unread = sum(value is None for value in values)
    counts["tokens"] += len(values)
    counts["unread"] += unread
    if read_out.strict and unread > MOST_UNREAD * len(values):
        raise LLMError(
            f"{llm.name} expects no number at {unread} of {len(values)} tokens: it does not follow the format"
        )
