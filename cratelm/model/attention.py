"""Attention over given queries, keys and values, the same for CRATE and GPT-2, with its variants.

The paper's form is `Attend` with nothing prepared: softmax(q k^T / sqrt(p)) v over the past and oneself. A variant is a
small module that changes queries and keys before that (`PREPARATIONS`), or a stricter mask; each is defined in
`docs/variants.md`. `Span` says which tokens a pass computes where that is not the plain case.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cratelm.model.config import ModelConfig

Heads = Float[Tensor, "batch heads keys p"]
Queries = Float[Tensor, "batch heads queries p"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The tokens that one layer sees in one pass: those the cache holds, then the new ones."""

    positions: Int[Tensor, "rows keys"]
    """Position of every token in its sequence; one row stands for all."""
    real: Bool[Tensor, "rows keys"] | None
    """False where a token is padding; None if none is."""
    stored: Float[Tensor, "kinds batch capacity d_model"] | None
    """The layer's part of the cache, to read and to extend; None without one."""

    def extend(self, *new: Float[Tensor, "batch queries d_model"]) -> tuple[Float[Tensor, "batch keys d_model"], ...]:
        """Keep the new projections in the cache and return all that it holds; without a cache, return the new ones."""
        if self.stored is None:
            return new
        end = self.positions.shape[1]
        for stored, projection in zip(self.stored, new, strict=True):
            stored[:, end - projection.shape[1] : end] = projection
        return self.stored[:, :, :end].unbind(0)


class Attend(nn.Module):
    """concat_k( softmax(q_k k_k^T / sqrt(p)) v_k ) over the past and oneself, p = d_model / heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.strict = config.num_heads, config.strict_mask
        self.prepare = nn.ModuleDict(
            {name: kind(config) for name, kind in PREPARATIONS.items() if getattr(config, name)}
        )

    def forward(
        self,
        q: Float[Tensor, "batch queries d_model"],
        k: Float[Tensor, "batch keys d_model"],
        v: Float[Tensor, "batch keys d_model"],
        span: Span | None = None,
    ) -> Float[Tensor, "batch queries d_model"]:
        """The queries are those of the last tokens; each attends to the keys up to its own."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        for preparation in self.prepare.values():
            q, k = preparation(q, k, span)
        mask = attention_mask(q.shape[2], k.shape[2], span, strict=self.strict, device=q.device)
        causal = mask is None and q.shape[2] > 1
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return attended.transpose(1, 2).flatten(-2)


class ShiftedKeys(nn.Module):
    """k_t = mu k_t + (1 - mu) k_{t-1}, mu learned per channel, 0.5 at start; before the first token is zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(config.d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with equal shares of the token's key and the previous one."""
        nn.init.constant_(self.mix, 0.5)

    def forward(self, q: Queries, k: Heads, span: Span | None) -> tuple[Queries, Heads]:
        """Mix each key with the previous one; queries are unchanged."""
        previous = F.pad(k, (0, 0, 1, -1))
        if span is not None and span.real is not None:
            previous = previous * F.pad(span.real, (1, -1))[:, None, :, None]
        mix = self.mix.view(k.shape[1], 1, k.shape[3])
        return q, mix * k + (1 - mix) * previous


class Normalised(nn.Module):
    """q = s q/|q| p^(1/4), k = k/|k| p^(1/4): scores are s times the cosine, s learned per head, 5 at start."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.empty(config.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with scores between -5 and 5."""
        nn.init.constant_(self.temperature, 5.0)

    def forward(self, q: Queries, k: Heads, span: Span | None) -> tuple[Queries, Heads]:  # noqa: ARG002
        """Normalise queries and keys; the factors p^(1/4) cancel the later division by sqrt(p)."""
        scale = q.shape[-1] ** 0.25
        return F.normalize(q, dim=-1) * (scale * self.temperature[:, None, None]), F.normalize(k, dim=-1) * scale


class Rotary(nn.Module):
    """Queries and keys rotated by position: channels i and i + p/2 of a head by the angle position / 10^(8 i / p)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.d_model // config.num_heads % 2 == 0, "ModelConfig checks that heads have an even width"

    def forward(self, q: Queries, k: Heads, span: Span | None) -> tuple[Queries, Heads]:
        """Rotate queries and keys: scores then depend on the distance of two tokens, not on their positions."""
        positions = torch.arange(k.shape[2], device=k.device)[None] if span is None else span.positions
        half = k.shape[3] // 2
        rates = 10_000.0 ** -(torch.arange(half, device=k.device) / half)
        angles = positions[:, None, :, None] * rates
        cos, sin = angles.cos().to(k.dtype), angles.sin().to(k.dtype)
        queries = q.shape[2]
        return _rotate(q, cos[:, :, -queries:], sin[:, :, -queries:]), _rotate(k, cos, sin)


PREPARATIONS: dict[str, type[ShiftedKeys] | type[Normalised] | type[Rotary]] = {
    "shifted_keys": ShiftedKeys,
    "normalised": Normalised,
    "rotary": Rotary,
}
"""The switch of `ModelConfig` -> what it does to queries and keys, in this order."""


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def attention_mask(
    queries: int, keys: int, span: Span | None, *, strict: bool, device: torch.device
) -> Bool[Tensor, "rows 1 queries keys"] | None:
    """The keys that each query may read; None if plain causal attention is the same.

    No query reads padding. A strict mask excludes the query's own token. A query with no other key (the first token
    under a strict mask, or padding) reads itself.
    """
    real = None if span is None else span.real
    if real is None and not strict and queries in (1, keys):
        return None
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    allowed = (key < query if strict else key <= query)[None]
    if real is not None:
        allowed = allowed & real[:, None]
    return (allowed | (key == query) & ~allowed.any(-1, keepdim=True))[:, None]
