"""What servers answer when they are asked for the probabilities of a prompt's own tokens, in the two ways there are.

`vllm` is its `prompt_logprobs`: for every token a table by token id, with the token's text and log-probability.
`openai` is the completion that repeats its prompt (`echo` with `logprobs`), as OpenAI's first models and
llama-cpp-python have it. Many servers know neither and say nothing of it, so all that can be checked is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from cratelm.interpretation.clients.token_alignment import Layout, Place, align, align_like
from cratelm.interpretation.clients.transport import Unreadable
from cratelm.interpretation.llm import Prompt, PromptLogprobs

Style = Literal["vllm", "openai"]
STYLES: tuple[Style, ...] = ("vllm", "openai")
ROUNDING = 1e-2
"""By how much probabilities may add up to more than 1: some servers compute them in 16 bits."""


class Absent(Exception):
    """The answer has no probabilities of the prompt at all: the server ignored that it was asked for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What was expected at one token of a prompt."""

    texts: Sequence[str]
    """What the token's text may be, likeliest first; none where it was not told."""
    own: Sequence[float]
    """The log-probability of each of these."""
    candidates: Mapping[str, float]
    """Text of a token that might have stood here -> log-probability."""


def request(style: Style, model: str, prompt: Prompt, top: int) -> dict[str, Any]:
    """The body that asks for an echo. One token is written after it: some servers take 0 for as many as there are."""
    body = {"model": model, "prompt": prompt.prefix + prompt.rest, "max_tokens": 1, "temperature": 0}
    return body | ({"prompt_logprobs": top} if style == "vllm" else {"echo": True, "logprobs": top})


@runtime_checkable
class Told(Protocol):
    """What an answer tells of the tokens of a prompt; read where it is wanted, for most of it never is."""

    def texts(self) -> Sequence[str | None]:
        """The likeliest text of every token; None where it is not told."""
        ...

    def logprob(self, token: int) -> float:
        """The log-probability of a token of that text; NaN where it is not told."""
        ...

    def expected(self, token: int) -> Expected:
        """All that was expected at a token."""
        ...


@dataclass(slots=True)
class Layouts:
    """How the tokens of the last prompt lay along it: the next one mostly begins alike."""

    last: Layout | None = None

    def lay(self, told: Told, text: str) -> list[Place] | None:
        """The place of each token."""
        texts = told.texts()
        laid = align_like(self.last, texts, text)
        if laid is None:
            return align([told.expected(token).texts for token in range(len(texts))], text)
        self.last = laid
        return laid.places


def read(
    style: Style, answer: Mapping[str, Any], prompt: Prompt, top: int, layouts: Layouts | None = None
) -> PromptLogprobs:
    """The echo in an answer. Raises `Absent` or `Unreadable`.

    Looked at are the tokens of the prompt's rest, and of these the places that are asked about; of all others the text.
    """
    try:
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        told = (_vllm if style == "vllm" else _openai)(choice, usage)
        places = (layouts or Layouts()).lay(told, prompt.prefix + prompt.rest)
        if places is None:
            raise Unreadable("its tokens do not spell the prompt")
        return _prompt_logprobs(prompt, told, places, usage.get("prompt_tokens") or len(places), top)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise Unreadable(f"no probabilities in the form of {style} ({type(error).__name__}: {error})") from None


@dataclass(frozen=True, slots=True)
class _Vllm:
    tables: Sequence[Mapping[str, Mapping[str, Any]] | None]
    """Of each token. The first entry is the token itself; the others follow for servers that sort them."""

    def texts(self) -> list[str | None]:
        return [next((one["decoded_token"] or "" for one in table.values()), None) if table else None
                for table in self.tables]  # fmt: skip

    def logprob(self, token: int) -> float:
        return next((float(one["logprob"]) for one in (self.tables[token] or {}).values()), math.nan)

    def expected(self, token: int) -> Expected:
        entries = list((self.tables[token] or {}).values())
        texts, own = [one["decoded_token"] or "" for one in entries], [float(one["logprob"]) for one in entries]
        return Expected(texts=texts, own=own, candidates=_by_text(texts, own))


def _vllm(choice: Mapping[str, Any], usage: Mapping[str, Any]) -> Told:
    tables = choice.get("prompt_logprobs")
    if tables is None:
        raise Absent
    if len(tables) != usage.get("prompt_tokens", len(tables)):
        raise Unreadable(f"log-probabilities of {len(tables)} tokens for a prompt of {usage['prompt_tokens']}")
    return _Vllm(tables)


@dataclass(frozen=True, slots=True)
class _OpenAI:
    tokens: Sequence[str]
    own: Sequence[float | None]
    top: Sequence[Mapping[str, float] | None]

    def texts(self) -> Sequence[str]:
        return self.tokens

    def logprob(self, token: int) -> float:
        own = self.own[token]
        return math.nan if own is None else float(own)

    def expected(self, token: int) -> Expected:
        table = self.top[token] or {}
        candidates = _by_text(list(table), [float(one) for one in table.values()])
        return Expected(texts=[self.tokens[token]], own=[self.logprob(token)], candidates=candidates)


def _openai(choice: Mapping[str, Any], usage: Mapping[str, Any]) -> Told:
    told = choice.get("logprobs")
    if told is None or len(told.get("tokens") or ()) <= usage.get("completion_tokens", 1):
        raise Absent
    tokens, own, top = told["tokens"], told["token_logprobs"], told["top_logprobs"]
    if not len(tokens) == len(own) == len(top):
        raise Unreadable(f"{len(tokens)} tokens with {len(own)} log-probabilities and {len(top)} tables")
    count = usage.get("prompt_tokens", len(tokens))
    if count > len(tokens):
        raise Unreadable(f"log-probabilities of {len(tokens)} tokens for a prompt of {count}")
    return _OpenAI(tokens[:count], own, top)


def _by_text(texts: Sequence[str], logprobs: Sequence[float]) -> dict[str, float]:
    """Text -> log-probability; of tokens with the same text, that of any of them."""
    found: dict[str, float] = {}
    for text, logprob in zip(texts, logprobs, strict=True):
        found[text] = float(np.logaddexp(found[text], logprob)) if text in found else logprob
    return found


def _check(position: Expected) -> None:
    """Refuse what is no distribution."""
    total = sum(math.exp(logprob) for logprob in position.candidates.values())
    if not total <= 1 + ROUNDING:
        raise Unreadable(f"probabilities of one token that add up to {total:.3g}")
    if any(logprob > ROUNDING for logprob in position.own):
        raise Unreadable(f"a log-probability of {max(position.own):.3g}")


def _prompt_logprobs(prompt: Prompt, told: Told, places: Sequence[Place], read_: int, top: int) -> PromptLogprobs:
    start, whole = len(prompt.prefix), prompt.prefix + prompt.rest
    wanted = None if prompt.at is None else set(prompt.at)
    tokens: list[str] = []
    logprobs: list[float] = []
    candidates: dict[int, dict[str, float]] = {}
    for token, place in enumerate(places):
        if place.end <= start and place.start < start:
            continue
        asked = place.start >= start and (wanted is None or place.start - start in wanted)
        position = told.expected(token) if asked or place.option > 0 else None
        if position is not None:
            _check(position)
        if place.end > start or place.start > start:
            tokens.append(whole[max(place.start, start) : place.end])
            own = math.nan
            if place.start >= start and place.option >= 0:
                own = told.logprob(token) if position is None else position.own[place.option]
            if own > ROUNDING:
                raise Unreadable(f"a log-probability of {own:.3g}")
            logprobs.append(own)
        if asked and position is not None and position.candidates:
            # The last token that begins here is the one with all before it read.
            candidates[place.start - start] = _best(position.candidates, top)
    return PromptLogprobs(
        tokens=tuple(tokens), logprobs=np.array(logprobs, dtype=np.float64),
        candidates={at: candidates[at] for at in sorted(candidates)}, prompt_tokens=read_,
    )  # fmt: skip


def _best(candidates: Mapping[str, float], top: int) -> dict[str, float]:
    """The most probable ones: servers add the token itself to those asked for."""
    return dict(sorted(candidates.items(), key=lambda one: -one[1])[:top])
