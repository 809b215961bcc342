"""What servers answer when they are asked for the probabilities of a prompt's own tokens, in the two ways there are.

`vllm` is its `prompt_logprobs`: for every token a table by token id, with the token's text and log-probability.
`openai` is the completion that repeats its prompt (`echo` with `logprobs`), as OpenAI's first models and
llama-cpp-python have it. Many servers know neither and say nothing of it, so all that can be checked is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cratelm.interpretation.alignment import Place, align
from cratelm.interpretation.llm import Echo, Prompt
from cratelm.interpretation.transport import Unreadable

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


def read(style: Style, answer: Mapping[str, Any], prompt: Prompt, top: int) -> Echo:
    """The echo in an answer. Raises `Absent` or `Unreadable`."""
    try:
        choice = answer["choices"][0]
        usage = answer.get("usage") or {}
        positions = (_vllm if style == "vllm" else _openai)(choice, usage)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise Unreadable(f"no probabilities in the form of {style} ({type(error).__name__}: {error})") from None
    for position in positions:
        _check(position)
    places = align([position.texts for position in positions], prompt.prefix + prompt.rest)
    if places is None:
        raise Unreadable("its tokens do not spell the prompt")
    return _echo(prompt, positions, places, usage.get("prompt_tokens") or len(places), top)


def _vllm(choice: Mapping[str, Any], usage: Mapping[str, Any]) -> list[Expected]:
    tables = choice.get("prompt_logprobs")
    if tables is None:
        raise Absent
    if len(tables) != usage.get("prompt_tokens", len(tables)):
        raise Unreadable(f"log-probabilities of {len(tables)} tokens for a prompt of {usage['prompt_tokens']}")
    found = []
    for table in tables:
        # The first is the token itself; the others follow for servers that sort them.
        entries = [] if table is None else list(table.values())
        texts, own = [one["decoded_token"] or "" for one in entries], [float(one["logprob"]) for one in entries]
        found.append(Expected(texts=texts, own=own, candidates=_by_text(texts, own)))
    return found


def _openai(choice: Mapping[str, Any], usage: Mapping[str, Any]) -> list[Expected]:
    told = choice.get("logprobs")
    if told is None or len(told.get("tokens") or ()) <= usage.get("completion_tokens", 1):
        raise Absent
    tokens, own, top = told["tokens"], told["token_logprobs"], told["top_logprobs"]
    if not len(tokens) == len(own) == len(top):
        raise Unreadable(f"{len(tokens)} tokens with {len(own)} log-probabilities and {len(top)} tables")
    count = usage.get("prompt_tokens", len(tokens))
    if count > len(tokens):
        raise Unreadable(f"log-probabilities of {len(tokens)} tokens for a prompt of {count}")
    return [
        Expected(
            texts=[text], own=[math.nan if logprob is None else float(logprob)],
            candidates=_by_text(list(table or {}), [float(one) for one in (table or {}).values()]),
        )
        for text, logprob, table in zip(tokens[:count], own, top, strict=False)
    ]  # fmt: skip


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


def _echo(prompt: Prompt, positions: Sequence[Expected], places: Sequence[Place], read_: int, top: int) -> Echo:
    start, whole = len(prompt.prefix), prompt.prefix + prompt.rest
    tokens: list[str] = []
    logprobs: list[float] = []
    candidates: dict[int, dict[str, float]] = {}
    for position, place in zip(positions, places, strict=False):
        if place.end > start or place.start > start:
            tokens.append(whole[max(place.start, start) : place.end])
            inside = place.start >= start and place.option >= 0
            logprobs.append(position.own[place.option] if inside else math.nan)
        if place.start >= start and position.candidates:
            # The last token that begins here is the one with all before it read.
            candidates[place.start - start] = _best(position.candidates, top)
    wanted = candidates.keys() if prompt.at is None else candidates.keys() & set(prompt.at)
    return Echo(
        tokens=tuple(tokens), logprobs=np.array(logprobs, dtype=np.float64),
        candidates={at: candidates[at] for at in sorted(wanted)}, prompt_tokens=read_,
    )  # fmt: skip


def _best(candidates: Mapping[str, float], top: int) -> dict[str, float]:
    """The most probable ones: servers add the token itself to those asked for."""
    return dict(sorted(candidates.items(), key=lambda one: -one[1])[:top])
