"""How an activation is read from what a model expects next: the mean of the numbers it thinks of.

    E = sum over v of v p(v) / sum over v of p(v)        v a whole number among the most probable next tokens

Everything else the model thinks of, `unknown` above all, is passed over. The released read-out has flaws; `compat`
keeps them, and each can be repaired by itself.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from cratelm.activations.records import Mode

ReadOutRepair = Literal["fifteen-candidates", "scale-of-nine", "spaced-numbers", "escaped-tokens"]
"""What each leaves out (`docs/simulators.md`):

fifteen-candidates    15 candidates are read, as OpenAI does, not 5
scale-of-nine         a model that writes 10 as two tokens is asked for 0-9: its 1 is never the beginning of a 10
spaced-numbers        ` 7` counts as 7
escaped-tokens        a token is shown on one line, and a part of a character as its bytes: then all tokens are read
"""
READ_OUT_REPAIRS: tuple[ReadOutRepair, ...] = get_args(ReadOutRepair)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOut:
    """A way to read activations from candidates."""

    candidates: int = 15
    """How many of the most probable next tokens are read."""
    top: int = 10
    """The largest activation there is."""
    spaces: bool = True
    """Whether a number with spaces before or behind it counts."""
    escaped: bool = True
    """Whether tokens are shown escaped. If not, one that holds a part of a character is not read and counts as 0."""
    strict: bool = True
    """Whether a model that cannot be read somewhere, or hardly ever thinks of a number, is refused; if not, it is 0."""

    @classmethod
    def of(cls, mode: Mode, repairs: frozenset[ReadOutRepair] = frozenset(), *, ten_is_one_token: bool) -> "ReadOut":
        """The read-out of a mode, for a model that writes 10 as one token or as two; `fixed` has all repairs."""
        repaired = frozenset(READ_OUT_REPAIRS) if mode == "fixed" else repairs
        return cls(
            candidates=15 if "fifteen-candidates" in repaired else 5,
            top=9 if "scale-of-nine" in repaired and not ten_is_one_token else 10,
            spaces="spaced-numbers" in repaired, escaped="escaped-tokens" in repaired,
            strict=mode == "fixed",
        )  # fmt: skip

    @property
    def repaired(self) -> tuple[ReadOutRepair, ...]:
        """What a read-out of `compat` leaves out, beside the scale; nothing in `fixed`, which has all repairs."""
        there: dict[ReadOutRepair, bool] = {
            "fifteen-candidates": self.candidates == 15, "spaced-numbers": self.spaces, "escaped-tokens": self.escaped
        }  # fmt: skip
        return () if self.strict else tuple(name for name, repaired in there.items() if repaired)

    def expected(self, candidates: Mapping[str, float]) -> float | None:
        """The mean of the numbers among the candidates, given as text -> log-probability; None if there is none.

        Log-probabilities may be raw logits: E does not change when the same number is added to all.
        """
        best = sorted(candidates.items(), key=lambda one: -one[1])[: self.candidates]
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
