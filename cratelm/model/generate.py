"""Generation: the cache, reading a growing text, sampling the next token; used by `LanguageModel.generate`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cratelm.errors import CrateError
from cratelm.model.attention import Span
from cratelm.model.config import ModelConfig


class Cache:
    """The projections of the tokens read so far: per layer one tensor for CRATE's MSSA, two (k and v) for GPT-2.

    What is kept is as the linear map made it; rotary positions and the other variants of attention are applied to all
    keys at each reading. For inference only.
    """

    def __init__(
        self, config: ModelConfig, *, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        kinds = 1 if config.shares_projection else 2
        self.stored = torch.empty(config.num_layers, kinds, batch, capacity, config.d_model, device=device, dtype=dtype)
        self.real: Tensor | None = None
        self.length = 0

    @property
    def capacity(self) -> int:
        """Most tokens that the cache can hold."""
        return self.stored.shape[3]

    @property
    def nbytes(self) -> int:
        """Size of the cache in bytes."""
        return self.stored.nbytes

    def admit(self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None) -> None:
        """Make room for the tokens of the next pass and remember which are real."""
        new = tokens.shape[1]
        assert self.length + new <= self.capacity, "the cache is full"
        if self.real is not None or mask is not None:
            real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            earlier = real.new_ones(len(tokens), self.length) if self.real is None else self.real
            self.real = torch.cat([earlier, real], dim=1)
        self.length += new


def spans_of(
    config: ModelConfig,
    tokens: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"] | None,
    cache: Cache | None,
) -> Sequence[Span | None]:
    """Positions, padding and cache of a pass for each layer; None in the plain case. Padding is on the left."""
    if mask is None and cache is None:
        return [None] * config.num_layers
    real, length = mask, tokens.shape[1]
    if cache is not None:
        cache.admit(tokens, mask)
        real, length = cache.real, cache.length
    if real is None:
        positions = torch.arange(length, device=tokens.device)[None]
    else:
        positions = (real.cumsum(1) - 1).clamp_min(0)
    stored = [None] * config.num_layers if cache is None else cache.stored
    return [Span(positions=positions, real=real, stored=layer) for layer in stored]


@runtime_checkable
class Predictor(Protocol):
    """What generation needs of a model."""

    config: ModelConfig

    @property
    def device(self) -> torch.device: ...

    def last_logits(
        self, tokens: Int[Tensor, "batch seq"], *, mask: Bool[Tensor, "batch seq"] | None, cache: Cache | None
    ) -> Float[Tensor, "batch vocab"]: ...


class TextReader(ABC):
    """Gives the logits after a text that grows a token at a time, reading only what is new.

    Positions are learned, so they cannot slide under a cache: once the context is full, the oldest `slide` tokens are
    forgotten and the rest is read again.
    """

    def __init__(self, context: int, *, mask: Bool[Tensor, "batch seq"] | None, slide: int) -> None:
        if not 1 <= slide <= context:
            raise CrateError(f"slide must be 1 to {context} (the context), got {slide}")
        if mask is not None and not bool(mask[:, -1].all()):
            raise CrateError("a prompt ends in padding. Pad on the left, and give mask=False there")
        self.context, self.slide = context, slide
        self.mask = None if mask is None or bool(mask.all()) else mask
        self.start: int | None = None
        """Index of the first token that is not forgotten; None before the first call."""

    def logits(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch vocab"]:
        """Logits after all of `tokens`, which begin with those of the last call."""
        count = tokens.shape[1]
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, count - self.mask.shape[1]), value=True)
        if self.start is None:
            self.start = max(0, count - self.context)
        elif count - self.start > self.context:
            self.start = count - (self.context - self.slide + 1)
            self.forget()
        return self.read(tokens, self.start)

    @abstractmethod
    def forget(self) -> None:
        """Empty the cache."""

    @abstractmethod
    def read(self, tokens: Int[Tensor, "batch seq"], start: int) -> Float[Tensor, "batch vocab"]:
        """Logits after the tokens from index `start` on, of which the cache may hold the first ones."""


class Reader(TextReader):
    """Reads tokens with a `LanguageModel` and its key-value cache."""

    def __init__(
        self, model: Predictor, *, longest: int, mask: Bool[Tensor, "batch seq"] | None, slide: int, use_cache: bool
    ) -> None:
        super().__init__(model.config.context_length, mask=mask, slide=slide)
        self.model, self.use_cache, self.capacity = model, use_cache, min(self.context, longest)
        self.cache: Cache | None = None

    def forget(self) -> None:
        """Drop the cache."""
        self.cache = None

    def read(self, tokens: Int[Tensor, "batch seq"], start: int) -> Float[Tensor, "batch vocab"]:
        """Logits after the tokens from index `start` on."""
        if self.cache is not None:
            start += self.cache.length
        elif self.use_cache:
            self.cache = Cache(
                self.model.config, batch=len(tokens), capacity=self.capacity, device=tokens.device,
                dtype=cache_type(self.model.device),
            )  # fmt: skip
        mask = None if self.mask is None else self.mask[:, start:]
        return self.model.last_logits(tokens[:, start:], mask=mask, cache=self.cache)


def cache_type(device: torch.device) -> torch.dtype:
    """Output type of linear maps: autocast's type if it is on."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else torch.float32


def check_sampling(*, temperature: float | int, top_k: int | None, top_p: float | int | None) -> None:
    """Raise CrateError for settings that no token can be sampled with."""
    if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
        raise CrateError(f"temperature must be at least 0 and top_k at least 1, got {temperature} and {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise CrateError(f"top_p must be above 0 and at most 1, got {top_p}")


def sample(
    logits: Float[Tensor, "batch vocab"],
    *,
    temperature: float | int,
    top_k: int | None,
    top_p: float | int | None = None,
    generator: torch.Generator,
) -> Int[Tensor, " batch"]:
    """Draw one token per row from `probabilities`; temperature 0 takes the most probable."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    restricted = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(restricted, 1, generator=generator).squeeze(1)


def probabilities(
    logits: Float[Tensor, "batch vocab"], *, temperature: float | int, top_k: int | None, top_p: float | int | None
) -> Float[Tensor, "batch vocab"]:
    """softmax(logits / temperature) of the `top_k` most probable tokens, then of those that make up `top_p` of it.

    These are the fewest most probable tokens that together have that probability. Rows need not sum to one.
    """
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    result = torch.softmax(logits, dim=-1)
    if top_p is not None:
        ordered, tokens = result.sort(dim=-1, descending=True)
        unneeded = ordered.cumsum(-1) - ordered >= top_p  # those before it have top_p already
        result = result.masked_fill(unneeded.gather(-1, tokens.argsort(-1)), 0.0)
    return result


def pad_left(
    prompts: Sequence[Sequence[int]], *, device: torch.device | None = None
) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """Token ids of prompts of any length as one tensor, padded on the left, and the mask that says so."""
    if not prompts or not all(prompts):
        raise CrateError("an empty prompt has no next token. Give each prompt at least one token")
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    missing = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    return tokens, torch.arange(longest, device=device) >= missing[:, None]
