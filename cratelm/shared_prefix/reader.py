"""Forward passes of a Hugging Face language model in which what many texts begin with is computed once.

The keys and values of a beginning are kept and read by every text that goes on from it. A beginning can itself go on
from another: first what all prompts of a kind have in common, then what those about one neuron have. Texts are read in
batches, beginnings filled up on the left and what follows on the right, each token at its true position, so columns of
one row lie as far apart as its tokens do and sliding windows stay what they are. The head is computed at the wanted
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
from transformers.cache_utils import Cache, DynamicLayer

SHORTEST = 16
"""Fewer tokens in common are not worth a pass of their own."""
KEPT_BYTES = 1 << 31
"""Keys and values of beginnings that are kept, those used last."""
LOGITS_AT_ONCE = 1 << 27
"""Most numbers in the logits of one pass: 512 MB in float32."""

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """A beginning with its keys and values: those of its own tokens, and the first `taken` tokens of another's."""

    tokens: Tokens
    parent: "Prefix | None"
    taken: int
    keys: tuple[Float[Tensor, "heads own dim"], ...]
    """Per layer."""
    values: tuple[Float[Tensor, "heads own value_dim"], ...]

    @property
    def size(self) -> int:
        """Bytes of the own keys and values."""
        return sum(one.nbytes for one in (*self.keys, *self.values))

    def whole(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens in one layer."""
        if self.parent is None:
            return self.keys[layer], self.values[layer]
        keys, values = self.parent.whole(layer)
        joined = ((keys, self.keys[layer]), (values, self.values[layer]))
        first, second = (torch.cat([old[:, : self.taken], own], dim=1) for old, own in joined)
        return first, second


class _Layer(DynamicLayer):
    """One layer's keys and values: beginnings that are only read, and what each row has read since.

    The two are joined for one attention and not kept: a batch holds no copy of its beginnings but of one layer's.
    """

    def __init__(self, prefixes: Sequence[Prefix | None], layer: int) -> None:
        super().__init__()
        self.prefixes, self.layer = list(prefixes), layer
        self.past = max((len(one.tokens) for one in prefixes if one), default=0)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values; return all, of beginnings too."""
        super().update(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if not self.past:
            return self.keys, self.values
        first = self.prefixes[0]
        if first and len(first.tokens) == self.past and all(one is first for one in self.prefixes):
            past = [one[None].expand(len(self.prefixes), -1, -1, -1) for one in first.whole(self.layer)]
        else:
            past = self._filled_up(key_states, value_states)
        keys, values = (torch.cat([old, own], dim=2) for old, own in zip(past, (self.keys, self.values), strict=True))
        return keys, values

    def _filled_up(self, key_states: Tensor, value_states: Tensor) -> list[Tensor]:
        """The beginnings of all rows, with zeros before the shorter ones."""
        past = [new.new_zeros(len(self.prefixes), new.shape[1], self.past, new.shape[3])
                for new in (key_states, value_states)]  # fmt: skip
        wholes: dict[int, tuple[Tensor, Tensor]] = {}
        for row, prefix in enumerate(self.prefixes):
            if prefix is not None:
                if id(prefix) not in wholes:
                    wholes[id(prefix)] = prefix.whole(self.layer)
                for filled, whole in zip(past, wholes[id(prefix)], strict=True):
                    filled[row, :, self.past - len(prefix.tokens) :] = whole
        return past

    def get_seq_length(self) -> int:
        """Columns read so far."""
        return self.past + super().get_seq_length()

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some rows alone."""
        self.batch_select_indices(rows)
        self.prefixes = [self.prefixes[int(row)] for row in rows]


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
        self.shares = self._can_share()

    def read(self, rows: Sequence[Row], *, top: int) -> list[Reading]:
        """Read texts; the answers come in their order."""
        prefixes = self._prefixes(rows)
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].tokens) - _length(prefixes[i]), i))
        found: dict[int, Reading] = {}
        while order:
            batch = self._filled(order, rows, prefixes)
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

    def _filled(self, order: list[int], rows: Sequence[Row], prefixes: Sequence[Prefix | None]) -> list[int]:
        """As many rows as one pass may have; they come shortest first, so the last gives the width."""
        wanted = 0
        for count, i in enumerate(order):
            width = len(rows[i].tokens) - _length(prefixes[i])
            wanted += len(rows[i].at)
            if count and ((count + 1) * width > self.tokens_at_once or wanted * self.vocabulary > LOGITS_AT_ONCE):
                return order[:count]
        return order

    @torch.inference_mode()
    def _read(self, rows: Sequence[Row], prefixes: Sequence[Prefix | None], top: int) -> Iterator[Reading]:
        """One pass."""
        own = [row.tokens[_length(prefix) :] for row, prefix in zip(rows, prefixes, strict=True)]
        # The token before says what is expected next.
        places = [(r, i - 1 - _length(prefixes[r])) for r, row in enumerate(rows) for i in row.at]
        logits, _ = self.forward(own, prefixes, places)
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
        width, past = max(map(len, own)), max(map(_length, prefixes))
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in own])
        before = torch.tensor([_length(one) for one in prefixes])[:, None]
        lengths = torch.tensor([len(row) for row in own])[:, None]
        columns = torch.arange(past + width)
        there = (columns >= past - before) & (columns < past + lengths)
        cache = Cache(layers=[_Layer(prefixes, layer) for layer in range(self.layers)])
        self.tokens_computed += int(lengths.sum())
        self.columns_computed += tokens.numel()
        logits = self._run(tokens, there, before + torch.arange(width), cache if self.shares else None, places)
        return logits, cache

    def step(
        self, tokens: Int[Tensor, " rows"], there: Bool[Tensor, "rows columns"], cache: Cache
    ) -> Float[Tensor, "rows vocab"]:
        """Read one more token in every row; `there` says which columns are tokens, these last ones included."""
        self.tokens_computed += len(tokens)
        self.columns_computed += len(tokens)
        positions = there.sum(dim=1, keepdim=True) - 1
        return self._run(tokens[:, None], there, positions, cache, [(row, 0) for row in range(len(tokens))])

    def _run(
        self, tokens: Int[Tensor, "rows width"], there: Bool[Tensor, "rows columns"],
        positions: Int[Tensor, "rows width"], cache: Cache | None, places: Sequence[tuple[int, int]],
    ) -> Float[Tensor, "places vocab"]:  # fmt: skip
        last = there.shape[1] - tokens.shape[1] + torch.arange(tokens.shape[1])
        # Fillings get some position that exists; nobody looks at what comes of them.
        positions = torch.where(there[:, last], positions, 0)
        options: dict[str, Any] = {"position_ids": positions.to(self.device)} if self.takes_positions else {}
        with _at(self.model.get_output_embeddings(), places or [(0, 0)]):
            output = self.model(
                input_ids=tokens.to(self.device), attention_mask=there.long().to(self.device), past_key_values=cache,
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
            common = missing[0][: min(_common(missing[0], one) for one in missing)]
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
        starts = [_cut(parent, taken) for parent, taken in parents]
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
            common = min(_common(one.tokens, tokens), len(tokens) - 1)
            if common > best[1]:
                best = one, common
        if best[0] is None:
            return None, 0
        self.prefixes.move_to_end(best[0].tokens)
        return best

    @torch.inference_mode()
    def _can_share(self) -> bool:
        """Whether two short texts give the same logits read whole and read in two parts."""
        self.shares = True
        generator = np.random.default_rng(0)
        texts = [tuple(generator.integers(self.vocabulary, size=size).tolist()) for size in (11, 8)]
        wholes = [self._logits_whole(text) for text in texts]
        try:
            _, cache = self.forward([texts[0][:5], texts[1][:3]], [None, None], [])
            prefixes = [
                Prefix(
                    tokens=text[:size], parent=None, taken=0,
                    keys=tuple(layer.keys[row, :, :size] for layer in cache.layers),
                    values=tuple(layer.values[row, :, :size] for layer in cache.layers),
                )
                for row, (text, size) in enumerate(zip(texts, (5, 3), strict=True))
            ]  # fmt: skip
            places = [(0, i) for i in range(6)] + [(1, i) for i in range(5)]
            logits, _ = self.forward([texts[0][5:], texts[1][3:]], prefixes, places)
        except Exception:  # whatever a model does with a cache that it does not know
            return False
        finally:
            self.tokens_computed = self.columns_computed = 0
        expected = torch.cat([wholes[0][5:], wholes[1][3:]]).double()
        allowed = 1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1
        return bool((logits.double() - expected).norm() <= allowed * expected.norm())

    def _logits_whole(self, text: Tokens) -> Float[Tensor, "seq vocab"]:
        return self.model(input_ids=torch.tensor([text], device=self.device), use_cache=False).logits[0]


def _length(prefix: Prefix | None) -> int:
    return len(prefix.tokens) if prefix else 0


def _cut(prefix: Prefix | None, length: int) -> Prefix | None:
    """The first tokens of a beginning as a beginning."""
    if prefix is None or length == len(prefix.tokens):
        return prefix
    if length <= prefix.taken:
        return _cut(prefix.parent, length)
    own = length - prefix.taken
    return Prefix(
        tokens=prefix.tokens[:length], parent=prefix.parent, taken=prefix.taken,
        keys=tuple(one[:, :own] for one in prefix.keys), values=tuple(one[:, :own] for one in prefix.values),
    )  # fmt: skip


def _common(a: Tokens, b: Tokens) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(a), len(b))
    differs = np.not_equal(a[:size], b[:size])
    return int(differs.argmax()) if differs.any() else size


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
