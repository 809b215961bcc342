"""Prompt logprobs in a server's response, in the two formats that servers have.

`vllm` is its `prompt_logprobs`: for every token a table by token id, with the token's text and log-probability.
`openai` is a completion that repeats its prompt (`echo` with `logprobs`), as OpenAI's first models and llama-cpp-python
return it. Many servers support neither and ignore the parameter silently, so the response is checked.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cratelm.interpretation.clients.responses import Malformed
from cratelm.interpretation.clients.token_alignment import TokenSpan, align
from cratelm.interpretation.llm import Prompt, PromptLogprobs

STYLES = ("vllm", "openai")
NEXT_TOKEN = "next-token"
"""The style of a request for the candidates of the next token."""
ROUNDING = 1e-2
"""Probabilities may add up to 1 plus this: some servers compute in 16 bits."""
Entries = Sequence[tuple[str, float]]
"""Text and log-probability of tokens."""


class Absent(Exception):
    """The response has no prompt logprobs at all: the server ignored the parameter."""


class _Response(NamedTuple):
    """A response in either format. Tables are read only where they are needed: there may be thousands of them."""

    texts: Sequence[str | None]
    """Most likely text of each token; None if the server did not report it."""
    readings: Callable[[int], Entries]
    """Token -> what it may be, most likely first."""
    candidates: Callable[[int], Entries]
    """Token -> the most probable tokens at its place."""


def request(style: str, model: str, prompt: Prompt, top: int) -> dict[str, Any]:
    """Body of the request. One token is generated: to some servers 0 means no limit."""
    body = {"model": model, "prompt": prompt.prefix + prompt.rest, "max_tokens": 1, "temperature": 0}
    if style == NEXT_TOKEN:
        return body | {"logprobs": top}
    return body | ({"prompt_logprobs": top} if style == "vllm" else {"echo": True, "logprobs": top})


def read(style: str, answer: Mapping[str, Any], prompt: Prompt, top: int) -> PromptLogprobs:
    """The prompt logprobs in a response. Raises `Absent` or `Malformed`."""
    try:
        usage = answer.get("usage") or {}
        if style == NEXT_TOKEN:
            return _next_token(answer["choices"][0], usage, prompt, top)
        response = (_vllm if style == "vllm" else _openai)(answer["choices"][0], usage)
        spans = _spans(response, prompt.prefix + prompt.rest)
        return _of_rest(prompt, response, spans, usage.get("prompt_tokens") or len(spans), top)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise Malformed(f"no prompt logprobs in the format of {style} ({type(error).__name__}: {error})") from None


def _vllm(choice: Mapping[str, Any], usage: Mapping[str, Any]) -> _Response:
    tables = choice.get("prompt_logprobs")
    if tables is None:
        raise Absent
    if len(tables) != usage.get("prompt_tokens", len(tables)):
        raise Malformed(f"log-probabilities of {len(tables)} tokens for a prompt of {usage['prompt_tokens']}")

    # The first entry is the token itself, unless the server sorts its tables.
    def entries(token: int) -> Entries:
        return [(one["decoded_token"] or "", float(one["logprob"])) for one in (tables[token] or {}).values()]

    texts = [next(iter(table.values()))["decoded_token"] or "" if table else None for table in tables]
    return _Response(texts, entries, entries)


def _openai(choice: Mapping[str, Any], usage: Mapping[str, Any]) -> _Response:
    lists = choice.get("logprobs")
    if lists is None or len(lists.get("tokens") or ()) <= usage.get("completion_tokens", 1):
        raise Absent
    tokens, logprobs, top = lists["tokens"], lists["token_logprobs"], lists["top_logprobs"]
    if not len(tokens) == len(logprobs) == len(top):
        raise Malformed(f"{len(tokens)} tokens with {len(logprobs)} log-probabilities and {len(top)} tables")
    count = usage.get("prompt_tokens", len(tokens))
    if count > len(tokens):
        raise Malformed(f"log-probabilities of {len(tokens)} tokens for a prompt of {count}")

    def reading(token: int) -> Entries:
        return [(tokens[token], math.nan if logprobs[token] is None else float(logprobs[token]))]

    return _Response(tokens[:count], reading, lambda token: [*(top[token] or {}).items()])


def _next_token(choice: Mapping[str, Any], usage: Mapping[str, Any], prompt: Prompt, top: int) -> PromptLogprobs:
    """The candidates of the token after the prompt, in OpenAI's format or, as llama.cpp has it, in that of chats."""
    lists = choice.get("logprobs") or {}
    if lists.get("content"):
        entries = [(entry["token"], float(entry["logprob"])) for entry in lists["content"][0]["top_logprobs"]]
    else:
        entries = [(text, float(logprob)) for text, logprob in next(iter(lists.get("top_logprobs") or [{}])).items()]
    if not entries:
        raise Absent
    best = sorted(_distribution(entries).items(), key=lambda entry: -entry[1])[:top]
    return PromptLogprobs(
        tokens=(prompt.rest,), logprobs=np.array([math.nan]), candidates={len(prompt.rest): dict(best)},
        prompt_tokens=usage.get("prompt_tokens") or math.ceil(len((prompt.prefix + prompt.rest).encode()) / 3),
    )  # fmt: skip


def _spans(response: _Response, text: str) -> list[TokenSpan]:
    """Where each token lies: by the most likely texts, or by all that the tables hold."""
    spans = align([[] if token is None else [token] for token in response.texts], text)
    if spans is None or len(spans) < len(response.texts):
        every = [[reading for reading, _ in response.readings(i)] for i in range(len(response.texts))]
        spans = align(every, text) or spans
    if spans is None:
        raise Malformed("its tokens do not spell the prompt")
    return spans


def _of_rest(prompt: Prompt, response: _Response, spans: Sequence[TokenSpan], count: int, top: int) -> PromptLogprobs:
    """The tokens of the prompt's rest, with candidates at the requested offsets."""
    start, text = len(prompt.prefix), prompt.prefix + prompt.rest
    tokens, logprobs, candidates = list[str](), list[float](), dict[int, dict[str, float]]()
    for token, span in enumerate(spans):
        if span.end > start or span.start > start:
            tokens.append(text[max(span.start, start) : span.end])
            known = span.start >= start and span.reading >= 0
            logprobs.append(_checked(response.readings(token)[span.reading][1]) if known else math.nan)
        if span.start >= start and (prompt.at is None or span.start - start in prompt.at):
            # Of several tokens that begin here, the last one counts: all text before it is read.
            table = _distribution(response.candidates(token))
            if table:
                # Servers add the token itself to the candidates.
                best = sorted(table.items(), key=lambda entry: -entry[1])[:top]
                candidates[span.start - start] = dict(best)
    return PromptLogprobs(
        tokens=tuple(tokens), logprobs=np.array(logprobs, dtype=np.float64),
        candidates=dict(sorted(candidates.items())), prompt_tokens=count,
    )  # fmt: skip


def _checked(logprob: float) -> float:
    if logprob > ROUNDING:
        raise Malformed(f"a log-probability of {logprob:.3g}")
    return logprob


def _distribution(entries: Entries) -> dict[str, float]:
    """Text -> log-probability; tokens with the same text are merged. Refuses a sum of probabilities above 1."""
    table: dict[str, float] = {}
    for text, logprob in entries:
        table[text] = float(np.logaddexp(table[text], _checked(logprob))) if text in table else _checked(logprob)
    total = sum(map(math.exp, table.values()))
    if not total <= 1 + ROUNDING:
        raise Malformed(f"probabilities of one token that add up to {total:.3g}")
    return table
