"""How the released code chooses excerpts, followed to the letter but in bounded memory.

The corpus is a prefix of the split, cut into blocks of the model's context, each computed on its own. Per neuron, all
its tokens are ranked by activation: the top ones, uniformly drawn ones, and draws from intervals of ranks are each the
centre of a window that may run over the edges of blocks and documents. The released code holds and sorts everything;
here a first pass counts activations by their leading 16 bits, which settles the interval of nearly every token, and a
second pass gathers the windows and ranks the tokens of the few values where an interval ends. Equal activations are
ranked by position. `docs/compat.md` lists the flaws of the procedure.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cratelm.activations.running import Moments, TopExcerpts

TOP = RANDOM = 50
PER_INTERVAL = 20
WIDE, NARROW = 64, 8
QUANTILES = {WIDE: (0, 0.5, 0.9, 0.99, 0.999, 1), NARROW: tuple(k / 12 for k in range(12))}
TOKENS = {WIDE: 8_192_000, NARROW: 819_200}
"""The released corpus: 8000 blocks of 1024 tokens for the 64-token records, 800 for the 8-token ones."""

_KEYS = 0x7F80
"""Values that the leading 16 bits of the non-negative finite float32 numbers take; they order as the numbers do."""
_DRAWS = 1200
"""Length of a neuron's random sequence of tokens."""
_RARE = 0.05
"""Share of the tokens below which an interval is called rare: a random sequence of `_DRAWS` may miss it."""
_SPARE = 80
"""Candidates expected per interval; fewer than PER_INTERVAL has a probability below 1e-9."""
_OUTSIDE, _EDGE = 254, 255


def rank_ranges(tokens: int, width: int) -> list[tuple[int, int]]:
    """The intervals of ranks, weakest first: [first, last) in descending order, in the released float arithmetic."""
    q = [1 - quantile for quantile in QUANTILES[width]]
    return [(int(tokens * q[i + 1]), int(tokens * q[i])) for i in range(len(q) - 1)]


def corpus_tokens(available: int, context: int, max_tokens: int | None) -> dict[int, int]:
    """Tokens read for each width: whole blocks of a prefix, at most as many as the released procedure reads."""
    whole = min(available, max_tokens or available) // context * context
    return {width: min(whole, limit // context * context) for width, limit in TOKENS.items()}


def priorities(neuron: Int[Tensor, " some"], position: Int[Tensor, " some"], seed: int) -> Float[Tensor, " some"]:
    """An independent uniform number in [0, 1) for each (neuron, position).

    Steele, Lea & Flood's SplitMix64 finaliser over a linear combination of the pair; int64 products wrap.
    """
    x = (neuron + 1) * 0x632BE59BD9B4E019 + (position + 1) * -0x61C8864680B583EB + seed
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return ((x >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def random_sequences(neurons: int, tokens: int, generator: np.random.Generator) -> Int[np.ndarray, "neurons draws"]:
    """Distinct tokens in random order for each neuron; a repeated draw of a longer corpus is left out as -1."""
    if tokens <= 4 * _DRAWS:
        return generator.random((neurons, tokens)).argsort(axis=1)[:, :_DRAWS]
    drawn = generator.integers(0, tokens, (neurons, _DRAWS))
    order = drawn.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(drawn, order, axis=1)
    again = np.zeros(drawn.shape, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return np.where(again, -1, drawn)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Tokens that may be drawn from an interval; in each, those of smallest priority are."""

    neuron: Int[Tensor, " some"]
    position: Int[Tensor, " some"]
    priority: Float[Tensor, " some"]
    interval: Int[Tensor, " some"]
    """`_EDGE` where the token's value is one at which an interval ends."""
    rare: Bool[Tensor, " some"]
    """Whether it is a candidate for the rare intervals only, or for the others only."""

    def where(self, keep: Bool[Tensor, " some"]) -> "Candidates":
        """Some of them."""
        return Candidates(*(getattr(self, name)[keep] for name in self.__dataclass_fields__))

    @staticmethod
    def join(parts: "list[Candidates]") -> "Candidates":
        """All of several."""
        names = Candidates.__dataclass_fields__
        return Candidates(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


class ReleasedLayer:
    """The two passes for one layer and one width. Tokens arrive in order: `count` all of them, then `gather` all.

    A draw without replacement from an interval is the first PER_INTERVAL tokens of a random sequence that fall in it;
    from a rare interval, the PER_INTERVAL of its tokens whose random priorities are smallest.
    """

    def __init__(self, neurons: int, width: int, tokens: int, *, seed: tuple[int, ...], device: torch.device) -> None:
        self.neurons, self.width, self.tokens, self.device = neurons, width, tokens, device
        self.ranges = rank_ranges(tokens, width)
        sizes = torch.tensor([high - low for low, high in self.ranges], device=device)
        self.is_rare = sizes < _RARE * tokens
        scale = torch.where(self.is_rare, 1, tokens / _DRAWS)  # from a share of the interval to a priority
        self.rate = _SPARE / sizes.clamp(min=1) * scale.double()
        self.generator = np.random.default_rng(seed)
        self.seed = int(self.generator.integers(2**62))
        self.histogram = torch.zeros(neurons * _KEYS, dtype=torch.int32, device=device)
        self.best = TopExcerpts(neurons, TOP, 1, device)
        self.moments = Moments(neurons, device)
        self.leading: list[Tensor] = []  # activations of the first tokens, to fill up the top lists of rare neurons
        self.zeros = torch.zeros(neurons, dtype=torch.int64, device=device)
        self.found: list[Candidates] = []
        self.edges: list[tuple[Tensor, Tensor, Tensor]] = []
        self.waiting: list[tuple[Tensor, Tensor]] = []  # (neuron, position) of centres whose window is not cut yet
        self.windows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.tail = torch.zeros(0, neurons, device=device)

    def count(self, activations: Float[Tensor, "tokens neurons"], first: int) -> None:
        """First pass: how many tokens have each leading 16 bits, and the top tokens."""
        if first == 0:
            self.moments.start(activations)
        self.moments.update(activations)
        if first < 2 * TOP:
            self.leading.append(activations[: 2 * TOP - first].clone())
        cells = (_key(activations) + torch.arange(self.neurons, device=self.device) * _KEYS).flatten()
        self.histogram.index_add_(0, cells, torch.ones((), dtype=torch.int32, device=self.device).expand(len(cells)))
        token, neuron = ((activations >= self.best.threshold) & (activations > 0)).nonzero(as_tuple=True)
        values, position = activations[token, neuron], token + first
        self.best.offer(neuron, values, position, position, torch.ones_like(token), values[:, None])

    def choose(self) -> None:
        """Between the passes: the interval of each value, where top and random tokens are, and the random sequences."""
        counts = self.histogram.view(self.neurons, _KEYS).long()
        counts[:, 0] = 0  # zeros are ranked by position
        self.above = counts.flip(1).cumsum(1).flip(1) - counts  # tokens with a larger key
        self.positive = counts.sum(dim=1)
        table = torch.full(counts.shape, _OUTSIDE, dtype=torch.uint8, device=self.device)
        for interval, (low, high) in enumerate(self.ranges):
            table[(self.above >= low) & (self.above + counts <= high)] = interval
        edges = {edge for pair in self.ranges for edge in pair}
        keys: list[Tensor] = []  # where edges fall, each key of a neuron once, -1 for none
        for edge in sorted(edges):
            straddles = (self.above < edge) & (self.above + counts > edge)
            table[straddles] = _EDGE
            key = torch.where(straddles.any(dim=1), straddles.to(torch.uint8).argmax(dim=1), -1)
            for known in keys:
                key = torch.where(key == known, -1, key)
            keys.append(key)
        self.interval_of_key, self.edge_keys = table, torch.stack(keys).to(torch.int32)
        self.histogram = torch.zeros(0, device=self.device)
        rare = [high for (_, high), is_rare in zip(self.ranges, self.is_rare.tolist(), strict=True) if is_rare]
        self.rare_ranks = max(rare, default=0)
        lowest = (self.above < self.rare_ranks) & (counts > 0)  # keys with a token in a rare interval
        key = torch.where(lowest.any(dim=1), lowest.to(torch.uint8).argmax(dim=1), _KEYS).to(torch.int32)
        self.rare_from = (key << 16).view(torch.float32)
        self.fixed = self._top_and_random()
        neuron = torch.arange(self.neurons, device=self.device).repeat_interleave(self.fixed.shape[1])
        self.waiting = [(neuron, self.fixed.flatten())]
        sequences = random_sequences(self.neurons, self.tokens, self.generator).ravel()
        order = np.argsort(sequences, kind="stable")
        self.drawn, self.drawn_slot = sequences[order], torch.from_numpy(order).to(self.device)
        self.sequence_length = len(sequences) // self.neurons

    def _top_and_random(self) -> Int[Tensor, "neurons chosen"]:
        """A neuron with fewer positive tokens than TOP is filled up with its first zeros, as a sort would."""
        self.best.merge()
        top = self.best.tables["position"]
        leading = torch.cat(self.leading)[: 2 * TOP]
        zeros_first = torch.argsort((leading > 0).to(torch.uint8), dim=0, stable=True)[:TOP].T.contiguous()
        rank, missing = torch.arange(TOP, device=self.device), top < 0
        fill = (rank - (~missing).sum(dim=1, keepdim=True)).clamp(0, zeros_first.shape[1] - 1)
        top = torch.where(missing, zeros_first.gather(1, fill), top)
        random = torch.from_numpy(self.generator.integers(0, self.tokens, (self.neurons, RANDOM)))
        return torch.cat([top, random.to(self.device)], dim=1)

    def gather(self, activations: Float[Tensor, "tokens neurons"], first: int) -> None:
        """Second pass: find the candidates of every interval, and keep the windows of all chosen tokens."""
        key = _key(activations)
        for edge in self.edge_keys:
            token, neuron = (key == edge).nonzero(as_tuple=True)
            self.edges.append((neuron, token + first, activations[token, neuron]))
        zero = activations == 0
        rank_of_zero = self.positive + self.zeros + zero.cumsum(dim=0, dtype=torch.int32) - 1
        self.zeros += zero.sum(dim=0)
        self._propose(self._drawn_candidates(activations, rank_of_zero, first))
        self._propose(self._rare_candidates(activations, zero & (rank_of_zero < self.rare_ranks), rank_of_zero, first))
        joined, end = torch.cat([self.tail, activations]), first + len(activations)
        seen = end if end == self.tokens else end - self.width // 2  # centres whose whole window has been read
        self._cut(joined, first - len(self.tail), seen)
        self.tail = joined[-self.width :].clone()

    def _drawn_candidates(self, activations: Tensor, rank_of_zero: Tensor, first: int) -> Candidates:
        """Those of the neurons' random sequences."""
        low, high = np.searchsorted(self.drawn, [first, first + len(activations)])
        slot, position = self.drawn_slot[low:high], torch.from_numpy(self.drawn[low:high]).to(self.device)
        neuron = slot // self.sequence_length
        value = activations[position - first, neuron]
        rank = rank_of_zero[position - first, neuron]
        interval = self.interval_of_key[neuron, _key(value).long()].long()
        interval = torch.where(value == 0, self._interval_of_rank(rank), interval)
        priority = (slot % self.sequence_length).double() / _DRAWS
        return Candidates(neuron, position, priority, interval, torch.zeros_like(slot, dtype=torch.bool))

    def _rare_candidates(self, activations: Tensor, zero: Tensor, rank_of_zero: Tensor, first: int) -> Candidates:
        """All tokens of rare intervals; `zero` marks the zeros that a neuron with few positive tokens has there."""
        token, neuron = ((activations >= self.rare_from) | zero).nonzero(as_tuple=True)
        value = activations[token, neuron]
        interval = self.interval_of_key[neuron, _key(value).long()].long()
        interval = torch.where(value == 0, self._interval_of_rank(rank_of_zero[token, neuron]), interval)
        priority = priorities(neuron, token + first, self.seed)
        return Candidates(neuron, token + first, priority, interval, torch.ones_like(token, dtype=torch.bool))

    def _propose(self, candidates: Candidates) -> None:
        """Keep what has a chance: the right kind for its interval, and a small enough priority."""
        likely = self._likely(candidates) | (candidates.interval == _EDGE)
        kept = candidates.where(likely & (candidates.priority < self.rate.max()))
        self.found.append(kept)
        self.waiting.append((kept.neuron, kept.position))

    def _likely(self, candidates: Candidates) -> Bool[Tensor, " some"]:
        inside = candidates.interval < len(self.ranges)
        interval = torch.where(inside, candidates.interval, 0)
        return inside & (candidates.rare == self.is_rare[interval]) & (candidates.priority < self.rate[interval])

    def _interval_of_rank(self, rank: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        interval = torch.full_like(rank, _OUTSIDE)
        for index, (low, high) in enumerate(self.ranges):
            interval[(rank >= low) & (rank < high)] = index
        return interval

    def _cut(self, joined: Float[Tensor, "tokens neurons"], start: int, seen: int) -> None:
        """Copy the windows around the waiting centres before token `seen`; `joined` begins at token `start`."""
        neuron, position = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        ready = position < seen
        self.waiting = [(neuron[~ready], position[~ready])]
        neuron, position = neuron[ready], position[ready]
        begin, length = self._window(position)
        columns = torch.arange(self.width, device=self.device)
        token = (begin[:, None] - start + columns).clamp(max=len(joined) - 1)
        values = torch.where(columns < length[:, None], joined[token, neuron[:, None]], 0.0)
        self.windows.append((neuron, position, values))

    def _window(self, centre: Tensor) -> tuple[Tensor, Tensor]:
        """First token and length of a window, which only the ends of the corpus cut short."""
        begin = (centre - self.width // 2).clamp(min=0)
        return begin, (centre + self.width // 2).clamp(max=self.tokens) - begin

    def result(self) -> dict[str, np.ndarray]:
        """Position, length and activations of the top, random and quantile windows of every neuron."""
        quantile = self._quantile_positions()
        neuron, position, values = (torch.cat(parts) for parts in zip(*self.windows, strict=True))
        code, order = (neuron * self.tokens + position).sort()
        arrays: dict[str, np.ndarray] = {}
        for kind, centres in (("top", self.fixed[:, :TOP]), ("random", self.fixed[:, TOP:]), ("quantile", quantile)):
            wanted = torch.arange(self.neurons, device=self.device)[:, None] * self.tokens + centres
            index = order[torch.searchsorted(code, wanted.clamp(min=0)).clamp(max=len(code) - 1)]
            begin, length = self._window(centres)
            there = centres >= 0
            arrays[f"{kind}.position"] = torch.where(there, begin, -1).cpu().numpy()
            arrays[f"{kind}.length"] = torch.where(there, length, 0).to(torch.int16).cpu().numpy()
            arrays[f"{kind}.activation"] = torch.where(there[..., None], values[index], 0.0).cpu().numpy()
        return arrays

    def _quantile_positions(self) -> Int[Tensor, "neurons chosen"]:
        """The PER_INTERVAL candidates of smallest priority in each interval, -1 where an interval has fewer tokens."""
        candidates = self._settle(Candidates.join(self.found))
        candidates = candidates.where(self._likely(candidates))
        cell = candidates.neuron * len(self.ranges) + candidates.interval
        order = candidates.priority.argsort(stable=True)
        order = order[cell[order].argsort(stable=True)]
        cell, position = cell[order], candidates.position[order]
        cells = torch.arange(self.neurons * len(self.ranges), device=self.device)
        rank = torch.arange(len(cell), device=self.device) - torch.searchsorted(cell, cells)[cell]
        kept = rank < PER_INTERVAL
        table = torch.full((len(cells), PER_INTERVAL), -1, dtype=torch.int64, device=self.device)
        table[cell[kept], rank[kept]] = position[kept]
        return table.view(self.neurons, -1)

    def _settle(self, candidates: Candidates) -> Candidates:
        """Rank the tokens of the values where an interval ends, exactly, and give the candidates among them theirs."""
        neuron, position, value = (torch.cat(parts) for parts in zip(*self.edges, strict=True))
        order = position.argsort(stable=True)
        order = order[value[order].argsort(descending=True, stable=True)]
        order = order[neuron[order].argsort(stable=True)]
        neuron, position, key = neuron[order], position[order], _key(value[order]).long()
        cell = neuron * _KEYS + (_KEYS - 1 - key)  # ascending: by neuron, larger values first
        rank = self.above[neuron, key] + torch.arange(len(cell), device=self.device) - torch.searchsorted(cell, cell)
        code, by_code = (neuron * self.tokens + position).sort()
        undecided = (candidates.interval == _EDGE).nonzero().squeeze(1)
        wanted = candidates.neuron[undecided] * self.tokens + candidates.position[undecided]
        settled = self._interval_of_rank(rank[by_code[torch.searchsorted(code, wanted)]])
        interval = candidates.interval.clone()
        interval[undecided] = settled
        return replace(candidates, interval=interval)


def _key(values: Float[Tensor, "*some"]) -> Int[Tensor, "*some"]:
    """The leading 16 bits of non-negative float32 numbers."""
    return values.contiguous().view(torch.int32) >> 16
