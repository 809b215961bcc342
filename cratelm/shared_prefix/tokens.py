"""Prompts as tokens, and the offset of each token in the text."""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cratelm.interpretation.llm import Prompt, PromptLogprobs
from cratelm.shared_prefix.reader import Reading, TextToRead

TAIL = 160
"""Characters at the end of a prefix that are tokenized again together with each rest."""
UNSTABLE = 4
"""Tokens at the end of a prefix that may change with what follows."""


class PromptTokenizer:
    """Tokenizes prompts that share long prefixes; `backend` is a tokenizer of the library `tokenizers`."""

    def __init__(self, backend: Any, *, bos: int | None) -> None:
        self.backend = backend
        special = backend.encode("").ids[:1]
        self.start: list[int] = special if special == [bos] else []
        """The tokens that the tokenizer puts before every text: the one for its beginning, or nothing."""
        self._prefixes: dict[str, tuple[list[int], list[int], int]] = {}

    def tokenize(self, prompt: Prompt) -> "PromptTokens":
        """The tokens of prefix and rest as one text."""
        ids, ends = self._encode(prompt.prefix, prompt.rest)
        ends[-1:] = [len(prompt.prefix) + len(prompt.rest)] * bool(ends)
        if prompt.asks_next and ids:  # any token stands for the next one, whose candidates do not depend on it
            ids, ends = [*ids, ids[-1]], [*ends, ends[-1]]
        return PromptTokens(prompt, [*self.start, *ids], [*[0] * len(self.start), *ends])

    def _encode(self, prefix: str, rest: str) -> tuple[list[int], list[int]]:
        """Token ids of both together, and where in the text each ends.

        Only the last characters of the prefix are tokenized again for each rest. If that gives other tokens for them
        than the whole prefix has, the whole text is tokenized.
        """
        if prefix not in self._prefixes:
            self._prefixes = {} if len(self._prefixes) > 1000 else self._prefixes
            self._prefixes[prefix] = self._encode_prefix(prefix)
        ids, ends, stable = self._prefixes[prefix]
        if stable:
            cut = ends[stable - 1]
            tail = self.backend.encode(prefix[cut:] + rest, add_special_tokens=False)
            overlap = len(ids) - stable - UNSTABLE
            if tail.ids[:overlap] == ids[stable : stable + overlap]:
                return ids[:stable] + tail.ids, ends[:stable] + [cut + end for _, end in tail.offsets]
        encoding = self.backend.encode(prefix + rest, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def _encode_prefix(self, prefix: str) -> tuple[list[int], list[int], int]:
        """Ids and ends of a prefix, and how many of its tokens do not depend on the rest: up to an early line end."""
        encoding = self.backend.encode(prefix, add_special_tokens=False)
        ids, ends = encoding.ids, [end for _, end in encoding.offsets]
        stable = bisect.bisect_left(ends, len(prefix) - TAIL)
        while stable and not (prefix[ends[stable - 1] - 1] == "\n" and len(ids) - stable >= 2 * UNSTABLE):
            stable -= 1
        return ids, ends, stable


class PromptTokens:
    """The tokens of one prompt."""

    def __init__(self, prompt: Prompt, ids: Sequence[int], ends: Sequence[int]) -> None:
        border = len(prompt.prefix)
        self.first = bisect.bisect_right(ends, border)
        """The first token of the rest; it may begin in the prefix."""
        cuts = [0, *(end - border for end in ends[self.first :])]
        self.texts = tuple(prompt.rest[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
        begins = [border, *ends][self.first] if self.first else 0
        self.index_at = {cut: self.first + i for i, cut in enumerate(cuts[:-1]) if i or begins == border or not border}
        """Offset in the rest -> index of the token that begins there; of several, the last, which has the character."""
        wanted = sorted({self.index_at[offset] for offset in prompt.at or () if self.index_at.get(offset, 0) > 0})
        if prompt.at is None:
            wanted = list(range(max(self.first, 1), len(ids)))
        shared = min(self.first, wanted[0] - 1) if wanted else 0
        self.row = TextToRead(tokens=tuple(ids), shared=shared, at=tuple(wanted))

    def prompt_logprobs(self, reading: Reading | None, strings: Sequence[str]) -> PromptLogprobs:
        """The reading as text. `strings` is the text of each token id."""
        logprobs = np.full(len(self.texts), np.nan)
        candidates: dict[int, Mapping[str, float]] = {}
        if reading is not None:
            logprobs[np.array(self.row.at) - self.first] = reading.logprobs
            place = {index: i for i, index in enumerate(self.row.at)}
            candidates = {
                offset: _by_text(reading.top[place[index]], reading.top_logprobs[place[index]], strings)
                for offset, index in self.index_at.items()
                if index in place
            }
        return PromptLogprobs(
            tokens=self.texts, logprobs=logprobs, candidates=candidates, prompt_tokens=len(self.row.tokens)
        )


def _by_text(tokens: np.ndarray, logprobs: np.ndarray, strings: Sequence[str]) -> Mapping[str, float]:
    """Text -> log-probability; tokens of the same text are added up."""
    texts: dict[str, float] = {}
    for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
        text = strings[token] if token < len(strings) else ""
        texts[text] = float(np.logaddexp(texts[text], logprob)) if text in texts else logprob
    return texts
