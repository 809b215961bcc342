"""Read many texts with a causal language model of transformers; what texts have in common is computed once.

The texts of a batch form a tree: each text branches off the text before it, in sorted order, where their tokens
differ. All branches lie one after the other in a single row of the model. An attention mask lets a token see exactly
its own text, and position ids place it as if the text were alone, so the row needs no padding and its logits equal
those of the separate texts. The keys and values of the beginning of a batch (few-shot examples, mostly) are cached
between batches.

Models that do not support such a mask, or keep a state other than keys and values, are detected by a trial on a few
tokens when the reader is made; their texts are computed whole, one at a time.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

TokenIds = tuple[int, ...]
Numbers = Int[np.ndarray, " _"]
Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, of shape (rows, heads, tokens, dim)."""

SHORTEST = 32
"""Minimum of additional common tokens for a separate forward pass that caches them."""
CACHE_BYTES = 1 << 31
"""Limit of the keys and values that are kept between batches."""
MAX_LOGITS = 1 << 27
"""Limit of the logits of one forward pass: 512 MB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextToRead:
    """A text to read."""

    tokens: TokenIds
    shared: int
    """How many tokens at the beginning may come from the cache; less than every index in `at`."""
    at: tuple[int, ...]
    """Indices of the tokens whose probabilities are wanted; 0 has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the model predicted at the wanted tokens of a row."""

    logprobs: Float[np.ndarray, " wanted"]
    """Of the actual token."""
    top: Int[np.ndarray, "wanted top"]
    """The most probable tokens, most probable first."""
    top_logprobs: Float[np.ndarray, "wanted top"]


@dataclass(frozen=True, slots=True, eq=False)
class CachedPrefix:
    """The beginning of a text with its keys and values."""

    tokens: TokenIds
    layers: Layers

    def crop(self, length: int) -> "CachedPrefix":
        """The first `length` tokens of the prefix."""
        layers = [(keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers]
        return CachedPrefix(self.tokens[:length], layers if length else [])

    @property
    def size(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


NOTHING = CachedPrefix((), [])


class PrefixReader:
    """A causal language model that reads many texts in few forward passes. Not thread-safe."""

    def __init__(self, model: Any, *, tokens_at_once: int) -> None:
        self.model, self.tokens_at_once = model.eval(), tokens_at_once
        weight, config = next(model.parameters()), model.config.get_text_config()
        self.device, self.dtype = weight.device, weight.dtype
        self.vocabulary: int = model.get_output_embeddings().weight.shape[0]
        self.num_layers: int = config.num_hidden_layers
        self.window: int | None = getattr(config, "sliding_window", None)
        self.attention = attention_kinds(config)
        self.slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.prefixes: list[CachedPrefix] = []
        """Last used last."""
        self.tokens_computed = 0
        self.shares = self._matches_uncached()

    @torch.inference_mode()
    def read(self, rows: Sequence[TextToRead], *, top: int) -> list[Reading]:
        """The readings of texts, in their order."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].tokens)
        readings: dict[int, Reading] = {}
        while order:
            batch = order[: self._fitting([rows[i] for i in order]) if self.shares else 1]
            try:
                readings |= zip(batch, self._read([rows[i] for i in batch], top), strict=True)
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.tokens_at_once //= 2
                torch.cuda.empty_cache()
                continue
            order = order[len(batch) :]
        return [readings[i] for i in range(len(rows))]

    @torch.inference_mode()
    def padded(self, texts: Sequence[TokenIds]) -> dict[str, Any]:
        """Texts as inputs of transformers' `generate`: padded on the left, their common beginning in the cache."""
        width = max(map(len, texts))
        gaps = [width - len(text) for text in texts]
        rows = [[0] * gap + list(text) for gap, text in zip(gaps, texts, strict=True)]
        mask = torch.arange(width) >= torch.tensor(gaps)[:, None]
        inputs = {"input_ids": torch.tensor(rows).to(self.device), "attention_mask": mask.long().to(self.device)}
        start = 0
        if self.shares:
            common = min(common_length(min(texts), max(texts)), min(map(len, texts)) - 1)
            prefix = self._prefix(texts[0][:common])
            start = len(prefix.tokens)
            layers = [
                tuple(torch.cat([pad(part, (0, 0, gap, 0))[:, :, :start] for gap in gaps]) for part in layer)
                for layer in prefix.layers
            ]
            inputs["past_key_values"] = self._cache(layers)
        self.tokens_computed += len(texts) * (width - start)
        return inputs

    def _fitting(self, rows: Sequence[TextToRead]) -> int:
        """How many of the rows, which are sorted, fit into one forward pass."""
        size = wanted = 0
        common = rows[0].shared
        for count, row in enumerate(rows):
            branches_at = common_length(rows[count - 1].tokens, row.tokens) if count else 0
            common = min(common, row.shared, branches_at) if count else common
            size, wanted = size + len(row.tokens) - branches_at, wanted + len(row.at)
            if count and (size - common > self.tokens_at_once or wanted * self.vocabulary > MAX_LOGITS):
                return count
        return len(rows)

    def _read(self, rows: Sequence[TextToRead], top: int) -> Iterator[Reading]:
        """The readings of rows in one forward pass; the rows are sorted."""
        texts, wanted = [row.tokens for row in rows], [[i - 1 for i in row.at] for row in rows]
        if self.shares:
            shared = min(common_length(texts[0], texts[-1]), *(row.shared for row in rows))
            logits, _, _ = self._forward(texts, self._prefix(texts[0][:shared]), wanted)
        else:
            logits = self._whole(texts[0], wanted[0])
        logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        actual = torch.tensor([row.tokens[i] for row in rows for i in row.at], device=self.device, dtype=torch.int64)
        values, indices = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
        arrays = [tensor.cpu().numpy() for tensor in (logprobs.gather(1, actual[:, None])[:, 0], indices, values)]
        ends = np.cumsum([len(row.at) for row in rows])[:-1]
        parts = zip(*(np.split(array, ends) for array in arrays), strict=True)
        return (Reading(logprobs=a.astype(np.float64), top=b, top_logprobs=c.astype(np.float64)) for a, b, c in parts)

    def _prefix(self, tokens: TokenIds) -> CachedPrefix:
        """Keys and values of these tokens, or of the first of them where few are missing from the cache."""
        lengths = [common_length(prefix.tokens, tokens) for prefix in self.prefixes]
        cached, start = NOTHING, max(lengths, default=0)
        if start:
            self.prefixes.append(self.prefixes.pop(lengths.index(start)))
            cached = self.prefixes[-1].crop(start)
        if len(tokens) - start < SHORTEST:
            return cached
        _, cache, _ = self._forward([tokens], cached, [[]])
        self.prefixes.append(CachedPrefix(tokens, [(layer.keys, layer.values) for layer in cache.layers]))
        while len(self.prefixes) > 1 and sum(prefix.size for prefix in self.prefixes) > CACHE_BYTES:
            self.prefixes.pop(0)
        return self.prefixes[-1]

    def _forward(
        self, texts: Sequence[TokenIds], prefix: CachedPrefix, wanted: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "wanted vocab"], Cache, list[Numbers]]:
        """One forward pass over sorted texts that begin with the prefix.

        Returns the logits after the wanted tokens of each text, the cache, and the columns of each text in it.
        """
        start = len(prefix.tokens)
        tokens, positions, paths = branches(texts, start)
        visible = np.zeros((len(tokens), start + len(tokens)), dtype=bool)
        for path in paths:  # a token sees its text up to itself; tokens in common have the same past in each text
            visible[path[start:, None] - start, path] = np.arange(len(path)) <= np.arange(start, len(path))[:, None]
        at = [int(path[i]) - start for path, indices in zip(paths, wanted, strict=True) for i in indices]
        cache = self._cache(prefix.layers)
        self.tokens_computed += len(tokens)
        logits = self._logits(
            tokens, at, position_ids=torch.from_numpy(positions)[None].to(self.device), past_key_values=cache,
            attention_mask=self._mask(visible, positions, np.concatenate([np.arange(start), positions])),
        )  # fmt: skip
        return logits, cache, paths

    def _whole(self, text: TokenIds, wanted: Sequence[int]) -> Float[Tensor, "wanted vocab"]:
        """The logits after some tokens of a text, without a cache."""
        self.tokens_computed += len(text)
        return self._logits(text, wanted, use_cache=False)

    def _logits(self, tokens: Sequence[int], at: Sequence[int], **options: Any) -> Float[Tensor, "at vocab"]:
        index = torch.tensor(at or [0], dtype=torch.int64, device=self.device)
        options |= {"logits_to_keep": index} if self.slices_logits else {}
        logits = self.model(input_ids=torch.tensor([tokens], device=self.device), **options).logits[0]
        return logits if self.slices_logits else logits[index]

    def _mask(
        self, visible: Bool[np.ndarray, "tokens columns"], positions: Numbers, column_positions: Numbers
    ) -> Tensor | dict[str, Tensor]:
        """The additive attention mask; one for each kind of layer where a model has several."""
        masks = {"full_attention": visible}
        if self.window is not None:
            near = positions[:, None] - column_positions < self.window
            masks["sliding_attention"] = visible & near
        smallest = torch.finfo(self.dtype).min
        additive = {
            kind: torch.zeros(1, 1, *visible.shape, dtype=self.dtype, device=self.device).masked_fill_(
                torch.from_numpy(~masks[kind]).to(self.device), smallest
            )
            for kind in self.attention if kind in masks
        }  # fmt: skip
        return additive if len(additive) > 1 else next(iter(additive.values()))

    def _cache(self, layers: Sequence[tuple[Tensor, ...]]) -> Cache:
        cache = Cache(layers=[DynamicLayer() for _ in range(self.num_layers)])
        for layer, (keys, values) in zip(cache.layers, layers, strict=False):
            layer.update(keys, values)
        return cache

    @torch.inference_mode()
    def _matches_uncached(self) -> bool:
        """Whether random texts that share tokens have the same logits read together as read alone."""
        if not self.attention <= {"full_attention", "sliding_attention"}:
            return False
        numbers = np.random.default_rng(0).integers(self.vocabulary, size=15).tolist()
        texts = sorted([tuple(numbers[:11]), tuple(numbers[:6] + numbers[11:])])
        try:
            _, cache, _ = self._forward([texts[0][:3]], NOTHING, [[]])
            prefix = CachedPrefix(texts[0][:3], [(layer.keys, layer.values) for layer in cache.layers])
            whole = [self._whole(text, range(3, len(text))) for text in texts]
            together, _, _ = self._forward(texts, prefix, [range(3, len(text)) for text in texts])
            expected = torch.cat(whole).double()
            error = (together.double() - expected).norm()
            allowed = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
            return bool(error <= allowed * expected.norm())
        except Exception:  # models fail in their own ways at a cache or a mask that they do not support
            return False
        finally:
            self.tokens_computed = 0


def branches(texts: Sequence[TokenIds], start: int) -> tuple[list[int], Numbers, list[Numbers]]:
    """Merge sorted texts into one row after the `start` columns that all begin with; each new token appears once.

    Returns the new tokens, their positions, and the columns of each text.
    """
    tokens: list[int] = []
    positions: list[Numbers] = []
    paths = [np.arange(start)]
    for i, text in enumerate(texts):
        branches_at = max(start, common_length(texts[i - 1], text)) if i else start
        first = start + len(tokens)
        paths.append(np.concatenate([paths[-1][:branches_at], np.arange(first, first + len(text) - branches_at)]))
        tokens += text[branches_at:]
        positions.append(np.arange(branches_at, len(text)))
    return tokens, np.concatenate(positions), paths[1:]


def attention_kinds(config: Any) -> set[str]:
    """The kinds of attention in a model's layers, by transformers' names."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    return set(kinds)


def common_length(a: TokenIds, b: TokenIds) -> int:
    """How many tokens at their beginning two texts have in common."""
    size = min(len(a), len(b))
    differs = np.not_equal(a[:size], b[:size])
    return int(differs.argmax()) if differs.any() else size
