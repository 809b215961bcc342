"""Prompts in tokens, with the place of each token in the text."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cratelm.interpretation.llm import Prompt, PromptLogprobs
from cratelm.shared_prefix.reader import Reading, Row

TAIL = 160
"""Characters at the end of a prefix that are tokenized again with what follows."""
ALIKE = 4
"""Tokens at the end of those that may come out differently before what follows."""


class Tokenizer:
    """A tokenizer of the library `tokenizers` for prompts that share long prefixes."""

    def __init__(self, backend: Any, *, bos: int | None) -> None:
        self.backend = backend
        begins = backend.encode("").ids[:1]
        self.start: list[int] = begins if begins == [bos] else []
        """What the tokenizer puts before every text: the token for its beginning, or nothing."""
        self._prefixes: dict[str, tuple[list[int], list[int], int]] = {}

    def prompt(self, prompt: Prompt) -> "PromptTokens":
        """A prompt in tokens: those of the whole text, prefix and rest together."""
        ids, ends = self._joined(prompt.prefix, prompt.rest)
        ends[-1:] = [len(prompt.prefix) + len(prompt.rest)] * bool(ends)
        return PromptTokens(prompt, [*self.start, *ids], [*[0] * len(self.start), *ends])

    def _joined(self, prefix: str, rest: str) -> tuple[list[int], list[int]]:
        """Token ids of both together, and where in the text each ends.

        Only the prefix's last characters are tokenized again for each rest: how a text is cut depends on what is near.
        Where its first tokens then differ, because a tokenizer looks further, the whole is tokenized.
        """
        if prefix not in self._prefixes:
            self._prefixes = {} if len(self._prefixes) > 1000 else self._prefixes
            self._prefixes[prefix] = self._cut_prefix(prefix)
        ids, ends, kept = self._prefixes[prefix]
        if kept:
            cut = ends[kept - 1]
            again = self.backend.encode(prefix[cut:] + rest, add_special_tokens=False)
            same = len(ids) - kept - ALIKE
            if again.ids[:same] == ids[kept : kept + same]:
                return ids[:kept] + again.ids, ends[:kept] + [cut + end for _, end in again.offsets]
        encoding = self.backend.encode(prefix + rest, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def _cut_prefix(self, prefix: str) -> tuple[list[int], list[int], int]:
        """Ids and ends of a prefix, and how many of its tokens stand fast: up to a line's end well before its own."""
        encoding = self.backend.encode(prefix, add_special_tokens=False)
        ids, ends = encoding.ids, [end for _, end in encoding.offsets]
        kept = bisect.bisect_left(ends, len(prefix) - TAIL)
        while kept and not (prefix[ends[kept - 1] - 1] == "\n" and len(ids) - kept >= 2 * ALIKE):
            kept -= 1
        return ids, ends, kept


class PromptTokens:
    """One prompt in tokens."""

    def __init__(self, prompt: Prompt, ids: Sequence[int], ends: Sequence[int]) -> None:
        self.prompt = prompt
        border = len(prompt.prefix)
        self.first = bisect.bisect_right(ends, border)
        """The first token of the rest; it may begin in the prefix."""
        cuts = [0, *(end - border for end in ends[self.first :])]
        self.texts = tuple(prompt.rest[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
        begins = [border, *ends][self.first] if self.first else 0
        self.index_at = {cut: self.first + i for i, cut in enumerate(cuts[:-1]) if i or begins == border or not border}
        """Where in the rest a token begins -> its index; of several, of which one holds the character, the last."""
        asked = self.index_at if prompt.at is None else prompt.at
        at = sorted({self.index_at[place] for place in asked if self.index_at.get(place, 0) > 0})
        if prompt.at is None:
            at = list(range(max(self.first, 1), len(ids)))
        self.row = Row(tokens=tuple(ids), shared=min(self.first, at[0] - 1) if at else 0, at=tuple(at))

    def prompt_logprobs(self, reading: Reading | None, strings: Sequence[str]) -> PromptLogprobs:
        """What the model expected, as text. `strings` is the text of each token id."""
        logprobs = np.full(len(self.texts), np.nan)
        if reading is not None:
            logprobs[np.array(self.row.at) - self.first] = reading.logprobs
        order = {index: place for place, index in enumerate(self.row.at)}
        candidates = {
            place: _texts(reading.top[order[index]].tolist(), reading.top_logprobs[order[index]].tolist(), strings)
            for place, index in self.index_at.items()
            if reading is not None and index in order
        }
        return PromptLogprobs(
            tokens=self.texts, logprobs=logprobs, candidates=candidates, prompt_tokens=len(self.row.tokens)
        )


def _texts(tokens: Sequence[int], logprobs: Sequence[float], strings: Sequence[str]) -> Mapping[str, float]:
    """Candidates by their text; of several tokens that look the same, the probability of any of them."""
    found: dict[str, float] = {}
    for token, logprob in zip(tokens, logprobs, strict=True):
        text = strings[token] if token < len(strings) else ""
        found[text] = float(np.logaddexp(found[text], logprob)) if text in found else logprob
    return found
