"""Continue many prompts with a causal language model of transformers; what prompts have in common is computed once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cratelm.interpretation.llm import Sampling
from cratelm.shared_prefix.reader import PrefixReader, TokenIds

COLUMNS_AT_ONCE = 16
"""Limit of the tokens of a batch, prompts and answers with padding, in forward passes of a reader."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRequest:
    """A prompt to continue."""

    tokens: TokenIds
    sampling: Sampling
    ends: frozenset[int]
    """Tokens that end an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the model generated."""

    tokens: list[int]
    """Without the token that ended it."""
    finish: str
    """`stop`, or `length` if it was cut off."""


def complete(reader: PrefixReader, requests: Sequence[CompletionRequest]) -> list[Completion]:
    """Answer every request. An answer does not depend on the other requests, except for rounding."""
    return [answer for batch in _batches(reader, requests) for answer in _generate_batch(reader, requests[batch])]


def _batches(reader: PrefixReader, requests: Sequence[CompletionRequest]) -> Iterator[slice]:
    """Requests that are answered together, by the size of their cache."""
    first = width = 0
    for i, request in enumerate(requests):
        longest = len(request.tokens) + request.sampling.max_tokens
        too_large = max(width, longest) * (i + 1 - first) > COLUMNS_AT_ONCE * reader.tokens_at_once
        if i > first and (too_large or not reader.shares):
            yield slice(first, i)
            first, width = i, 0
        width = max(width, longest)
    yield slice(first, len(requests))


@torch.inference_mode()
def _generate_batch(reader: PrefixReader, requests: Sequence[CompletionRequest]) -> list[Completion]:
    """Answer requests in one `generate`: the sampler of each row removes all tokens but the one that it drew."""
    inputs = reader.padded([request.tokens for request in requests])
    width = inputs["input_ids"].shape[1]
    ends = sorted(set().union(*(request.ends for request in requests)))
    budgets = torch.tensor([request.sampling.max_tokens for request in requests], device=reader.device)
    samplers = [Sampler(request.sampling) for request in requests]

    def keep_sampled(_: Tensor, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        tokens = [sampler.next(row) for sampler, row in zip(samplers, logits.float().cpu(), strict=True)]
        sampled = torch.full_like(logits, -torch.inf)
        sampled[torch.arange(len(tokens)), tokens] = 0
        return sampled

    def is_complete(tokens: Int[Tensor, "rows length"], *_: object, **__: object) -> Bool[Tensor, " rows"]:
        return tokens.shape[1] - width >= budgets

    generated = reader.model.generate(
        **inputs, do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
        max_new_tokens=int(budgets.max()), logits_processor=[keep_sampled], stopping_criteria=[is_complete],
    )[:, width:]  # fmt: skip
    reader.tokens_computed += generated.numel()
    return [_answer(row, request) for row, request in zip(generated.tolist(), requests, strict=True)]


def _answer(generated: list[int], request: CompletionRequest) -> Completion:
    tokens = generated[: request.sampling.max_tokens]
    end = next((i for i, token in enumerate(tokens) if token in request.ends), None)
    return Completion(tokens=tokens[:end], finish="length" if end is None else "stop")


class Sampler:
    """Draws the tokens of one answer, with a separate random generator."""

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
