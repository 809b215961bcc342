"""Continue many prompts with a causal language model of transformers; what prompts have in common is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cratelm.interpretation.llm import Sampling
from cratelm.shared_prefix.reader import Reader, Tokens

COLUMNS_AT_ONCE = 16
"""Limit of the tokens that are cached at once, prompts and answers with padding, in forward passes of a reader."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt to continue."""

    tokens: Tokens
    sampling: Sampling
    ends: frozenset[int]
    """Tokens that end an answer."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """What the model generated."""

    tokens: list[int] = field(default_factory=list)
    """Without the token that ended it."""
    finish: str = "length"
    """`stop`, or `length` if it was cut off."""


def generate(reader: Reader, requests: Sequence[Request]) -> list[Answer]:
    """Answer every request. An answer does not depend on the other requests, except for rounding."""
    if not reader.shares:
        return [_generate_alone(reader, request) for request in requests]
    return [answer for batch in _batches(reader, requests) for answer in _generate_together(reader, requests[batch])]


def _batches(reader: Reader, requests: Sequence[Request]) -> Iterator[slice]:
    """Requests that are answered together, by the size of their cache."""
    first = width = 0
    for i, request in enumerate(requests):
        longest = len(request.tokens) + request.sampling.max_tokens
        if i > first and max(width, longest) * (i + 1 - first) > COLUMNS_AT_ONCE * reader.tokens_at_once:
            yield slice(first, i)
            first, width = i, 0
        width = max(width, longest)
    yield slice(first, len(requests))


def _generate_together(reader: Reader, requests: Sequence[Request]) -> list[Answer]:
    answers = [Answer() for _ in requests]
    samplers = [Sampler(request.sampling) for request in requests]
    logits, cache, filled = reader.begin([request.tokens for request in requests])
    active = list(range(len(requests)))
    while True:
        tokens = [samplers[i].next(row) for i, row in zip(active, logits.float().cpu(), strict=True)]
        unfinished = []
        for row, (i, token) in enumerate(zip(active, tokens, strict=True)):
            if token in requests[i].ends:
                answers[i].finish = "stop"
                continue
            answers[i].tokens.append(token)
            if len(answers[i].tokens) < requests[i].sampling.max_tokens:
                unfinished.append(row)
        if not unfinished:
            return answers
        if len(unfinished) < len(active):
            cache.batch_select_indices(torch.tensor(unfinished, device=reader.device))
            filled, active = filled[unfinished], [active[row] for row in unfinished]
        filled = torch.cat([filled, torch.ones(len(active), 1, dtype=torch.bool)], dim=1)
        logits = reader.step(torch.tensor([tokens[row] for row in unfinished]), filled, cache)


class Sampler:
    """Draws the tokens of one answer from a random generator of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.rng = np.random.default_rng(sampling.seed)

    def next(self, logits: Float[Tensor, " vocab"]) -> int:
        """The next token."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        order = torch.argsort(logits, descending=True, stable=True)
        shares = torch.softmax(logits[order].double() / self.sampling.temperature, dim=0).cumsum(0).numpy()
        # Nucleus: the fewest tokens that together reach top_p, and at least the first.
        nucleus = min(int(np.searchsorted(shares, self.sampling.top_p)) + 1, len(shares))
        place = int(np.searchsorted(shares[:nucleus], self.rng.random() * shares[nucleus - 1], side="right"))
        return int(order[min(place, nucleus - 1)])


@torch.inference_mode()
def _generate_alone(reader: Reader, request: Request) -> Answer:
    """One answer by the model's own `generate`, for models whose cache the reader does not support."""
    sampling = request.sampling
    tokens = torch.tensor([request.tokens], device=reader.device)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    ends = sorted(request.ends)
    with torch.random.fork_rng(devices=[reader.device] if reader.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        generated = reader.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=sampling.max_tokens,
            eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **options,
        )[0, len(request.tokens) :].tolist()  # fmt: skip
    reader.tokens_computed += len(request.tokens) + len(generated)
    end = next((i for i, token in enumerate(generated) if token in request.ends), None)
    return Answer(tokens=generated[:end], finish="length" if end is None else "stop")
