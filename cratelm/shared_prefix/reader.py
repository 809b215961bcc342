"""Forward passes of a Hugging Face language model in which what many texts begin with is computed once.

The keys and values of a beginning are kept and read by every text that goes on from it. A beginning can itself go on
from another: first what all prompts of a kind have in common, then what those about one neuron have. Texts are read in
batches. Those with the same beginning are laid one after the other into one row, behind the beginning and blind to each
other: nothing is filled up, nothing copied. Where that does not work, or beginnings differ, each text has a row of its
own, beginnings filled up on the left and what follows on the right, each token at its true position, so columns of a
row lie as far apart as its tokens do and sliding windows stay what they are. The head is computed at the wanted
positions alone.

Some models keep a state that cannot be shared so, or no cache at all. A trial on a few tokens at the start finds that
out; their texts are then computed whole, in batches all the same.
"""

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache

from cratelm.shared_prefix.beginnings import Prefix, SharedLayer, Tokens, alike, cut, length_of

SHORTEST = 16
"""Fewer tokens in common are not worth a pass of their own."""
KEPT_BYTES = 1 << 31
"""Keys and values of beginnings that are kept, those used last."""
LAID_TOGETHER = {"cpu": 544, "cuda": 2048}
"""Tokens of texts in one row: each of them costs attention to all, so not many where products are slow."""
LOGITS_AT_ONCE = 1 << 27
"""Most numbers in the logits of one pass: 512 MB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A text to read."""

    tokens: Tokens
    shared: int
    """How many tokens at its beginning it may have in common with others; at least one token is left."""
    at: tuple[int, ...]
    """Indices of the tokens whose probabilities are wanted, none of them 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the model expected at the wanted tokens of a row."""

    logprobs: Float[np.ndarray, " wanted"]
    """Of the token that is there."""
    top: Int[np.ndarray, "wanted top"]
    """The most probable tokens, most probable first."""
    top_logprobs: Float[np.ndarray, "wanted top"]


class Reader:
    """A model that reads many texts with few computations. Not for several threads at once."""

    def __init__(self, model: Any, *, tokens_at_once: int) -> None:
        self.model, self.tokens_at_once = model.eval(), tokens_at_once
        self.device, self.dtype = next(model.parameters()).device, next(model.parameters()).dtype
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.layers = model.config.get_text_config().num_hidden_layers
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.prefixes: OrderedDict[Tokens, Prefix] = OrderedDict()
        self.tokens_computed = self.columns_computed = 0
        self.shares, self.lays_together = self._can_share()

    def read(self, rows: Sequence[Row], *, top: int) -> list[Reading]:
        """Read texts; the answers come in their order."""
        prefixes = self._prefixes(rows)
        # Texts with the same beginning come together, and of those the ones of a length.
        first = {prefix: i for i, prefix in reversed(list(enumerate(prefixes)))}
        order = sorted(
            range(len(rows)),
            key=lambda i: (self.lays_together and first[prefixes[i]], len(rows[i].tokens) - length_of(prefixes[i]), i),
        )
        found: dict[int, Reading] = {}
        while order:
            batch = self._together(order, rows, prefixes) or self._filled(order, rows, prefixes)
            try:
                found |= zip(
                    batch, self._read([rows[i] for i in batch], [prefixes[i] for i in batch], top), strict=True
                )
            except torch.cuda.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.tokens_at_once = self.tokens_at_once // 2
                torch.cuda.empty_cache()
                continue
            order = order[len(batch) :]
        return [found[i] for i in range(len(rows))]

    def _together(self, order: list[int], rows: Sequence[Row], prefixes: Sequence[Prefix | None]) -> list[int]:
        """The rows that come next and fit into one behind their beginning; none if it would be one alone."""
        prefix, tokens, wanted = prefixes[order[0]], 0, 0
        most = LAID_TOGETHER.get(self.device.type, 544)
        count = 0
        while self.lays_together and prefix and count < len(order) and prefixes[order[count]] is prefix:
            tokens += len(rows[order[count]].tokens) - len(prefix.tokens)
            wanted += len(rows[order[count]].at)
            if tokens > most or wanted * self.vocabulary > LOGITS_AT_ONCE:
                break
            count += 1
        return order[:count] if count > 1 else []

    def _filled(self, order: list[int], rows: Sequence[Row], prefixes: Sequence[Prefix | None]) -> list[int]:
        """As many rows as one pass may have; they come shortest first, so the last gives the width."""
        wanted = 0
        for count, i in enumerate(order):
            width = len(rows[i].tokens) - length_of(prefixes[i])
            wanted += len(rows[i].at)
            if count and self.lays_together and prefixes[i] is not prefixes[order[0]]:
                return order[:count]
            if count and ((count + 1) * width > self.tokens_at_once or wanted * self.vocabulary > LOGITS_AT_ONCE):
                return order[:count]
        return order

    @torch.inference_mode()
    def _read(self, rows: Sequence[Row], prefixes: Sequence[Prefix | None], top: int) -> Iterator[Reading]:
        """One pass."""
        own = [row.tokens[length_of(prefix) :] for row, prefix in zip(rows, prefixes, strict=True)]
        # The token before says what is expected next.
        places = [(r, i - 1 - length_of(prefixes[r])) for r, row in enumerate(rows) for i in row.at]
        together = self.lays_together and prefixes[0] is not None and len(rows) > 1 and len(set(prefixes)) == 1
        together = together and sum(map(len, own)) <= LAID_TOGETHER.get(self.device.type, 544)
        logits = self.forward_together(own, prefixes[0], places) if together else self.forward(own, prefixes, places)[0]
        logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        there = torch.tensor([row.tokens[i] for row in rows for i in row.at], device=self.device, dtype=torch.int64)
        values, indices = logprobs.topk(min(top, logprobs.shape[1]), dim=-1)
        arrays = [one.cpu().numpy() for one in (logprobs.gather(1, there[:, None])[:, 0], indices, values)]
        ends = np.cumsum([len(row.at) for row in rows])[:-1]
        parts = zip(*(np.split(array, ends) for array in arrays), strict=True)
        return (Reading(logprobs=a.astype(np.float64), top=b, top_logprobs=c.astype(np.float64)) for a, b, c in parts)

    def forward(
        self, own: Sequence[Sequence[int]], prefixes: Sequence[Prefix | None], places: Sequence[tuple[int, int]]
    ) -> tuple[Float[Tensor, "places vocab"], Cache]:
        """Read each row's own tokens after its beginning; logits at places, each a row and an index in its tokens."""
        width, past = max(map(len, own)), max(map(length_of, prefixes))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in own])
        before = torch.tensor([length_of(one) for one in prefixes])[:, None]
        lengths = torch.tensor([len(row) for row in own])[:, None]
        columns = torch.arange(past + width)
        there = (columns >= past - before) & (columns < past + lengths)
        cache = Cache(layers=[SharedLayer(prefixes, layer) for layer in range(self.layers)])
        self.tokens_computed += int(lengths.sum())
        self.columns_computed += tokens.numel()
        # Fillings get some position that exists; nobody looks at what comes of them.
        positions = torch.where(there[:, past:], before + torch.arange(width), 0)
        logits = self._run(tokens, there.long(), positions, cache if self.shares else None, places)
        return logits, cache

    def forward_together(
        self, own: Sequence[Sequence[int]], prefix: Prefix | None, places: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "places vocab"]:
        """The same for rows with one beginning, laid one after the other into one row."""
        lengths = torch.tensor([len(row) for row in own])
        which = torch.repeat_interleave(torch.arange(len(own)), lengths)
        index = torch.cat([torch.arange(len(row)) for row in own])
        starts = (lengths.cumsum(0) - lengths).tolist()
        seen = (which[:, None] == which) & (index[:, None] >= index)
        past = length_of(prefix)
        mask = torch.zeros(1, 1, len(which), past + len(which), dtype=self.dtype)
        mask[0, 0, :, past:].masked_fill_(~seen, torch.finfo(self.dtype).min)
        cache = Cache(layers=[SharedLayer([prefix], layer) for layer in range(self.layers)])
        self.tokens_computed += len(which)
        self.columns_computed += len(which)
        tokens = torch.tensor([[token for row in own for token in row]])
        placed = [(0, starts[row] + i) for row, i in places]
        return self._run(tokens, mask, (past + index)[None], cache, placed)

    def step(
        self, tokens: Int[Tensor, " rows"], there: Bool[Tensor, "rows columns"], cache: Cache
    ) -> Float[Tensor, "rows vocab"]:
        """Read one more token in every row; `there` says which columns are tokens, these last ones included."""
        self.tokens_computed += len(tokens)
        self.columns_computed += len(tokens)
        positions = there.sum(dim=1, keepdim=True) - 1
        places = [(row, 0) for row in range(len(tokens))]
        return self._run(tokens[:, None], there.long(), positions, cache, places)

    def _run(
        self, tokens: Int[Tensor, "rows width"], mask: Int[Tensor, "rows columns"] | Float[Tensor, "1 1 width columns"],
        positions: Int[Tensor, "rows width"], cache: Cache | None, places: Sequence[tuple[int, int]],
    ) -> Float[Tensor, "places vocab"]:  # fmt: skip
        options: dict[str, Any] = {"position_ids": positions.to(self.device)} if self.takes_positions else {}
        with _at(self.model.get_output_embeddings(), places or [(0, 0)]):
            output = self.model(
                input_ids=tokens.to(self.device), attention_mask=mask.to(self.device), past_key_values=cache,
                use_cache=cache is not None, **options,
            )  # fmt: skip
        return output.logits[0]

    def _prefixes(self, rows: Sequence[Row]) -> list[Prefix | None]:
        """The beginning of each row, computed where it is not there yet."""
        wanted = [row.tokens[: row.shared] if self.shares and row.shared >= SHORTEST else () for row in rows]
        self.prepare([one for one in dict.fromkeys(wanted) if one])
        return [self.prefixes[one] if one else None for one in wanted]

    @torch.inference_mode()
    def prepare(self, wanted: Sequence[Tokens]) -> None:
        """Compute beginnings: first what all of them have in common, then each from the longest that is there."""
        missing = [one for one in dict.fromkeys(wanted) if one not in self.prefixes]
        if len(missing) > 1:
            common = missing[0][: min(alike(missing[0], one) for one in missing)]
            if len(common) - self._longest(common)[1] >= SHORTEST:
                self.prepare([common])
                missing = [one for one in missing if one != common]
        for first in range(0, len(missing), 64):
            self._extend(missing[first : first + 64])
        for one in wanted:
            self.prefixes.move_to_end(one)
        held, needed = sum(one.size for one in self.prefixes.values()), len(set(wanted))
        while held > KEPT_BYTES and len(self.prefixes) > needed:
            held -= self.prefixes.popitem(last=False)[1].size

    def _extend(self, missing: Sequence[Tokens]) -> None:
        parents = [self._longest(one) for one in missing]
        # A parent used in part is cut to what is taken.
        starts = [cut(parent, taken) for parent, taken in parents]
        own = [one[taken:] for one, (_, taken) in zip(missing, parents, strict=True)]
        _, cache = self.forward(own, starts, [])
        for row, (tokens, (parent, taken)) in enumerate(zip(missing, parents, strict=True)):
            size = len(own[row])
            keys = tuple(layer.keys[row, :, :size].clone() for layer in cache.layers)
            values = tuple(layer.values[row, :, :size].clone() for layer in cache.layers)
            self.prefixes[tokens] = Prefix(tokens=tokens, parent=parent, taken=taken, keys=keys, values=values)

    def _longest(self, tokens: Tokens) -> tuple[Prefix | None, int]:
        """The beginning that goes furthest, and how far; one token is always left."""
        best: tuple[Prefix | None, int] = (None, SHORTEST - 1)
        for one in self.prefixes.values():
            common = min(alike(one.tokens, tokens), len(tokens) - 1)
            if common > best[1]:
                best = one, common
        if best[0] is None:
            return None, 0
        self.prefixes.move_to_end(best[0].tokens)
        return best

    @torch.inference_mode()
    def _can_share(self) -> tuple[bool, bool]:
        """Whether short texts give the same logits read whole, read in two parts, and laid together."""
        self.shares = True
        generator = np.random.default_rng(0)
        texts = [tuple(generator.integers(self.vocabulary, size=size).tolist()) for size in (11, 8)]
        texts.append(texts[0][:5] + texts[1][:2])
        wholes = [self._logits_whole(text) for text in texts]
        try:
            _, cache = self.forward([texts[0][:5], texts[1][:3]], [None, None], [])
            prefixes = [
                Prefix(
                    tokens=text[:size], parent=None, taken=0,
                    keys=tuple(layer.keys[row, :, :size] for layer in cache.layers),
                    values=tuple(layer.values[row, :, :size] for layer in cache.layers),
                )
                for row, (text, size) in enumerate(zip(texts, (5, 3), strict=False))
            ]  # fmt: skip
            places = [(0, i) for i in range(6)] + [(1, i) for i in range(5)]
            logits, _ = self.forward([texts[0][5:], texts[1][3:]], prefixes, places)
            shares = self._near(logits, torch.cat([wholes[0][5:], wholes[1][3:]]))
        except Exception:  # whatever a model does with a cache that it does not know
            self.tokens_computed = self.columns_computed = 0
            return False, False
        try:
            laid = self.forward_together([texts[0][5:], texts[2][5:]], prefixes[0], [*places[:6], (1, 0), (1, 1)])
            together = self._near(laid, torch.cat([wholes[0][5:], wholes[2][5:]]))
        except Exception:  # or with a mask of four dimensions
            together = False
        finally:
            self.tokens_computed = self.columns_computed = 0
        # A window slides over columns, which here are not as far apart as their tokens.
        return shares, shares and together and self.takes_positions and not _slides(self.model.config.get_text_config())

    def _near(self, logits: Float[Tensor, "places vocab"], expected: Float[Tensor, "places vocab"]) -> bool:
        allowed = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        return bool((logits.double() - expected.double()).norm() <= allowed * expected.double().norm())

    def _logits_whole(self, text: Tokens) -> Float[Tensor, "seq vocab"]:
        return self.model(input_ids=torch.tensor([text], device=self.device), use_cache=False).logits[0]


def _slides(config: Any) -> bool:
    """Whether some layer sees a window alone."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


@contextlib.contextmanager
def _at(head: nn.Module, places: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Inside the block the head is given what stands at these places alone, as one row.

    What a model does to its logits afterwards, such as a soft cap, is thereby done as always.
    """
    rows, columns = zip(*places, strict=True)

    def pick(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][list(rows), list(columns)][None], *arguments[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
