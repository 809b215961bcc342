"""Answers of a Hugging Face language model, many at a time: what their prompts begin with alike is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cratelm.interpretation.llm import Sampling
from cratelm.shared_prefix.beginnings import Tokens
from cratelm.shared_prefix.reader import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt to be gone on from."""

    tokens: Tokens
    sampling: Sampling
    ends: frozenset[int]
    """Tokens that end an answer."""


@dataclass(kw_only=True, slots=True)
class Answer:
    """What the model wrote."""

    tokens: list[int] = field(default_factory=list)
    """Without the token that ended it."""
    finish: str = "length"
    """`stop`, or `length` where it was cut off."""


def generate(reader: Reader, requests: Sequence[Request]) -> list[Answer]:
    """Answer every request. How a request is answered does not depend on what else is asked, but for rounding."""
    if not reader.shares:
        return [_alone(reader, request) for request in requests]
    answers: list[Answer] = []
    for batch in _batches(reader, requests):
        answers += _answered(reader, requests[batch])
    return answers


def _batches(reader: Reader, requests: Sequence[Request]) -> Iterator[slice]:
    """Requests whose keys and values are held at once: a few times as many tokens as one pass computes."""
    first = width = 0
    for i, request in enumerate(requests):
        own = len(request.tokens) + request.sampling.max_tokens
        if i > first and max(width, own) * (i + 1 - first) > 4 * reader.tokens_at_once:
            yield slice(first, i)
            first, width = i, 0
        width = max(width, own)
    yield slice(first, len(requests))


@torch.inference_mode()
def _answered(reader: Reader, requests: Sequence[Request]) -> list[Answer]:
    """Answer requests together.

    A prompt but for its last token is a beginning of its own: filled up on the left, all of them end in one column, and
    what is written follows without a gap.
    """
    wholes = [request.tokens[:-1] for request in requests]
    reader.prepare([one for one in wholes if one])
    prefixes = [reader.prefixes[one] if one else None for one in wholes]
    for one, prefix in zip(wholes, prefixes, strict=True):
        if prefix and prefix.parent:  # what it shares with others stays
            reader.prefixes.pop(one, None)
    answers = [Answer() for _ in requests]
    draws = [_Draw(request.sampling) for request in requests]
    last = [request.tokens[-1:] for request in requests]
    logits, cache = reader.forward(last, prefixes, [(row, 0) for row in range(len(last))])
    before = torch.tensor([len(one) for one in wholes])[:, None]
    there = torch.arange(int(before.max()) + 1) >= before.max() - before
    writing = list(range(len(requests)))
    while True:
        chosen = [draws[i].next(row) for i, row in zip(writing, logits.float().cpu(), strict=True)]
        going = []
        for place, (i, token) in enumerate(zip(writing, chosen, strict=True)):
            if token in requests[i].ends:
                answers[i].finish = "stop"
                continue
            answers[i].tokens.append(token)
            if len(answers[i].tokens) < requests[i].sampling.max_tokens:
                going.append(place)
        if not going:
            return answers
        if len(going) < len(writing):
            kept = torch.tensor(going)
            for layer in cache.layers:
                layer.keep_rows(kept.to(reader.device))
            there, writing = there[kept], [writing[place] for place in going]
        there = torch.cat([there, torch.ones(len(going), 1, dtype=torch.bool)], dim=1)
        logits = reader.step(torch.tensor([chosen[place] for place in going]), there, cache)


class _Draw:
    """Draws the tokens of one answer, with random numbers of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.rng = np.random.default_rng(sampling.seed)

    def next(self, logits: Float[Tensor, " vocab"]) -> int:
        """The next token."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        order = torch.argsort(logits, descending=True, stable=True)
        shares = torch.softmax(logits[order].double() / self.sampling.temperature, dim=0).cumsum(0).numpy()
        # The smallest set of tokens that together have the share; at least the first.
        kept = min(int(np.searchsorted(shares, self.sampling.top_p)) + 1, len(shares))
        place = int(np.searchsorted(shares[:kept], self.rng.random() * shares[kept - 1], side="right"))
        return int(order[min(place, kept - 1)])


@torch.inference_mode()
def _alone(reader: Reader, request: Request) -> Answer:
    """One answer by the model's own way to generate, for models whose cache cannot be shared."""
    sampling = request.sampling
    tokens = torch.tensor([request.tokens], device=reader.device)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    devices = [reader.device] if reader.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(sampling.seed)
        ends = sorted(request.ends)
        written = reader.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=sampling.max_tokens,
            eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **options,
        )[0, len(request.tokens) :].tolist()  # fmt: skip
    reader.tokens_computed += len(request.tokens) + len(written)
    cut = next((i for i, token in enumerate(written) if token in request.ends), None)
    return Answer(tokens=written[:cut], finish="length" if cut is None else "stop")
