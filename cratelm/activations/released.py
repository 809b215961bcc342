"""The released procedure of choosing excerpts, followed exactly but in bounded memory.

The corpus is a prefix of the split, cut into blocks of the model's context, each computed on its own. Per neuron, all
its tokens are ranked by activation: the top ones, uniformly drawn ones, and draws from intervals of ranks are each the
centre of a window that may run over the edges of blocks and documents. The released code holds and sorts everything;
here a first pass counts activations by their leading 16 bits, which decides the interval of nearly every token, and a
second pass gathers the windows and ranks the tokens of the few values where an interval ends. Equal activations are
ranked by position. `docs/compat.md` lists the flaws of the procedure.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cratelm.activations.draws import DRAWS, EDGE, OUTSIDE, Candidates, RowBlocks, priorities, random_sequences
from cratelm.activations.records import ABSENT
from cratelm.activations.running import Moments, TopExcerpts

WIDE, NARROW = 64, 8
TOKENS = {WIDE: 8_192_000, NARROW: 819_200}
"""The released corpus: 8000 blocks of 1024 tokens for the 64-token records, 800 for the 8-token ones."""
TOP = RANDOM = 50
PER_INTERVAL = 20
QUANTILES = {WIDE: (0, 0.5, 0.9, 0.99, 0.999, 1), NARROW: tuple(k / 12 for k in range(12))}

_KEYS = 0x7F80
"""Values that the leading 16 bits of the non-negative finite float32 numbers take; they order as the numbers do."""
_RARE = 0.05
"""Share of the tokens below which an interval is called rare: a random sequence of `DRAWS` may miss it."""
_SPARE = 80
"""Candidates expected per interval; fewer than PER_INTERVAL has a probability below 1e-9."""


def rank_bounds(tokens: Int[np.ndarray, "*some"], width: int) -> Int[np.ndarray, "*some bounds"]:
    """Where intervals of descending ranks end, weakest first, in the released float arithmetic.

    Interval i holds the ranks from bound i + 1 to below bound i.
    """
    return np.multiply.outer(tokens, [1 - quantile for quantile in QUANTILES[width]]).astype(np.int64)


class ReleasedLayer:
    """The two passes for one layer and one width. Tokens arrive in order: `count` all of them, then `gather` all.

    A draw without replacement from an interval is the first PER_INTERVAL tokens of a random sequence that fall in it;
    from a rare interval, the PER_INTERVAL of its tokens whose random priorities are smallest.
    """

    def __init__(self, neurons: int, width: int, tokens: int, *, seed: tuple[int, ...], device: torch.device) -> None:
        self.neurons, self.width, self.tokens, self.device = neurons, width, tokens, device
        self.generator = np.random.default_rng(seed)
        self.seed = int(self.generator.integers(2**62))
        self.histogram = torch.zeros(neurons * _KEYS, dtype=torch.int32, device=device)
        self.best = TopExcerpts(neurons, TOP, 1, device)
        self.moments = Moments(neurons, device)
        self.leading: list[Tensor] = []  # activations of the first tokens, to fill up the top lists of rare neurons
        self.zeros = torch.zeros(neurons, dtype=torch.int64, device=device)
        self.candidates, self.edges, self.windows = RowBlocks(device), RowBlocks(device), RowBlocks(device)
        self.waiting: list[tuple[Tensor, Tensor]] = []  # (neuron, position) of tokens whose window is not cut yet
        self.tail = torch.zeros(0, neurons, device=device)

    def count(self, activations: Float[Tensor, "tokens neurons"], first: int) -> None:
        """First pass: how many tokens have each leading 16 bits, and the top tokens. `first` is the first position."""
        if first == 0:
            self.moments.start(activations)
        self.moments.update(activations)
        if first < 2 * TOP:
            self.leading.append(activations[: 2 * TOP - first].clone())
        cells = (_key(activations) + torch.arange(self.neurons, device=self.device) * _KEYS).flatten()
        self.histogram.index_add_(0, cells, torch.ones((), dtype=torch.int32, device=self.device).expand(len(cells)))
        token, neuron = ((activations >= self.best.threshold) & (activations > 0)).nonzero(as_tuple=True)
        values, position = activations[token, neuron], token + first
        # The position stands for the document, of which one excerpt is kept: the procedure may choose any token.
        self.best.offer(neuron, values, position, position, torch.ones_like(token), values[:, None])

    def choose(self) -> None:
        """Between the passes: the interval of each value, where top and random tokens are, and the random sequences."""
        counts = self.histogram.view(self.neurons, _KEYS).long()
        self.histogram = torch.zeros(0, device=self.device)
        counts[:, 0] = 0  # zeros are ranked by position
        self.above = counts.flip(1).cumsum(1).flip(1) - counts  # tokens with a larger key
        self.positive = counts.sum(dim=1)
        self._set_intervals()
        table = torch.full(counts.shape, OUTSIDE, dtype=torch.uint8, device=self.device)
        for interval in range(self.intervals):
            low, high = self.low[:, interval, None], self.high[:, interval, None]
            table[(self.above >= low) & (self.above + counts <= high)] = interval
        keys: list[Tensor] = []  # where intervals end, each key of a neuron once, -1 for none
        for bound in self.bounds.T[..., None]:
            straddles = (self.above < bound) & (self.above + counts > bound)
            table[straddles] = EDGE
            key = torch.where(straddles.any(dim=1), straddles.to(torch.uint8).argmax(dim=1), -1)
            for known in keys:
                key = torch.where(key == known, -1, key)
            keys.append(key)
        self.interval_of_key, self.edge_keys = table, torch.stack(keys).to(torch.int32)
        lowest = (self.above < self.rare_ranks[:, None]) & (counts > 0)  # keys with a token in a rare interval
        key = torch.where(lowest.any(dim=1), lowest.to(torch.uint8).argmax(dim=1), _KEYS).to(torch.int32)
        self.rare_from = (key << 16).view(torch.float32)
        self.fixed = self._top_and_random()
        present = self.fixed.flatten() >= 0
        neuron = torch.arange(self.neurons, device=self.device).repeat_interleave(self.fixed.shape[1])
        self.waiting = [(neuron[present], self.fixed.flatten()[present])]
        sequences = random_sequences(self.neurons, self.tokens, self.generator).ravel()
        order = np.argsort(sequences, kind="stable")
        self.drawn, self.drawn_slot = sequences[order], torch.from_numpy(order).to(self.device)
        self.sequence_length = len(sequences) // self.neurons

    def _set_intervals(self) -> None:
        """Each neuron's intervals [low, high) of ranks, and how candidates for them are found."""
        self.bounds = torch.from_numpy(rank_bounds(np.full(self.neurons, self.tokens), self.width)).to(self.device)
        self.low, self.high = self.bounds[:, 1:], self.bounds[:, :-1]
        self.intervals = self.low.shape[1]
        sizes = self.high - self.low
        self.is_rare = sizes < _RARE * self.tokens
        scale = torch.where(self.is_rare, 1, self.tokens / DRAWS)  # from a share of the interval to a priority
        self.rate = _SPARE / sizes.clamp(min=1) * scale.double()
        self.rare_ranks = torch.where(self.is_rare, self.high, 0).amax(dim=1)

    def _top_and_random(self) -> Int[Tensor, "neurons chosen"]:
        self.best.merge()
        top = self._filled(self.best.tables["position"])
        random = torch.from_numpy(self.generator.integers(0, self.tokens, (self.neurons, RANDOM))).to(self.device)
        return torch.cat([top, random], dim=1)

    def _filled(self, top: Int[Tensor, "neurons top"]) -> Int[Tensor, "neurons top"]:
        """Fill the list of a neuron with fewer positive tokens than TOP with its first zeros, as a sort would."""
        positive = torch.cat(self.leading)[: 2 * TOP] > 0
        zeros_first = torch.argsort(positive.to(torch.uint8), dim=0, stable=True).T
        num_zeros = (~positive).sum(dim=0)[:, None]
        missing = top < 0
        rank = torch.arange(TOP, device=self.device) - (~missing).sum(dim=1, keepdim=True)
        fill = torch.where(rank < num_zeros, zeros_first.gather(1, rank.clamp(0, len(positive) - 1)), -1)
        return torch.where(missing, fill, top)

    def gather(self, activations: Float[Tensor, "tokens neurons"], first: int) -> None:
        """Second pass: find the candidates of every interval, and keep the windows of all chosen tokens."""
        key = _key(activations)
        for edge in self.edge_keys:
            token, neuron = (key == edge).nonzero(as_tuple=True)
            self.edges.add(neuron, token + first, activations[token, neuron])
        zero = activations == 0
        rank_of_zero = self.positive + self.zeros + zero.cumsum(dim=0, dtype=torch.int32) - 1
        self.zeros += zero.sum(dim=0)
        self._propose(self._drawn_candidates(activations, rank_of_zero, first))
        self._propose(self._rare_candidates(activations, zero & (rank_of_zero < self.rare_ranks), rank_of_zero, first))
        joined, end = torch.cat([self.tail, activations]), first + len(activations)
        complete = end if end == self.tokens else end - self.width // 2
        self._cut(joined, first - len(self.tail), complete)
        self.tail = joined[-2 * self.width :].clone()

    def _drawn_candidates(self, activations: Tensor, rank_of_zero: Tensor, first: int) -> Candidates:
        """Candidates from the neurons' random sequences."""
        low, high = np.searchsorted(self.drawn, [first, first + len(activations)])
        slot, position = self.drawn_slot[low:high], torch.from_numpy(self.drawn[low:high]).to(self.device)
        neuron = slot // self.sequence_length
        value = activations[position - first, neuron]
        rank = rank_of_zero[position - first, neuron]
        interval = self.interval_of_key[neuron, _key(value).long()].long()
        interval = torch.where(value == 0, self._interval_of_rank(neuron, rank), interval)
        priority = (slot % self.sequence_length).double() / DRAWS
        return Candidates(neuron, position, priority, interval, torch.zeros_like(slot, dtype=torch.bool))

    def _rare_candidates(self, activations: Tensor, zero: Tensor, rank_of_zero: Tensor, first: int) -> Candidates:
        """All tokens of rare intervals; `zero` marks the zeros that a neuron with few positive tokens has there."""
        token, neuron = ((activations >= self.rare_from) | zero).nonzero(as_tuple=True)
        value = activations[token, neuron]
        interval = self.interval_of_key[neuron, _key(value).long()].long()
        interval = torch.where(value == 0, self._interval_of_rank(neuron, rank_of_zero[token, neuron]), interval)
        priority = priorities(neuron, token + first, self.seed)
        return Candidates(neuron, token + first, priority, interval, torch.ones_like(token, dtype=torch.bool))

    def _propose(self, candidates: Candidates) -> None:
        """Keep the candidates that may be drawn: the right kind for their interval, and a small enough priority."""
        likely = self._likely(candidates) | (candidates.interval == EDGE)
        candidates = candidates.where(likely & (candidates.priority < self.rate.amax(dim=1)[candidates.neuron]))
        self.candidates.add(*candidates.columns())
        self.waiting.append((candidates.neuron, candidates.position))

    def _likely(self, candidates: Candidates) -> Bool[Tensor, " some"]:
        inside = candidates.interval < self.intervals
        cell = candidates.neuron, torch.where(inside, candidates.interval, 0)
        return inside & (candidates.rare == self.is_rare[cell]) & (candidates.priority < self.rate[cell])

    def _interval_of_rank(self, neuron: Int[Tensor, " some"], rank: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        interval = torch.full_like(rank, OUTSIDE)
        for index in range(self.intervals):
            interval[(rank >= self.low[neuron, index]) & (rank < self.high[neuron, index])] = index
        return interval

    def _cut(self, joined: Float[Tensor, "tokens neurons"], start: int, complete: int) -> None:
        """Copy the windows of the waiting tokens before position `complete`; `joined` begins at position `start`."""
        neuron, position = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        ready = position < complete
        self.waiting = [(neuron[~ready], position[~ready])]
        neuron, position = neuron[ready], position[ready]
        begin, length = self._window(position)
        columns = torch.arange(self.width, device=self.device)
        token = (begin[:, None] - start + columns).clamp(max=len(joined) - 1)
        values = torch.where(columns < length[:, None], joined[token, neuron[:, None]], 0.0)
        self.windows.add(neuron, position, values)

    def _window(self, position: Int[Tensor, "*some"]) -> tuple[Int[Tensor, "*some"], Int[Tensor, "*some"]]:
        """First position and length of a token's window, which the ends of the corpus make shorter."""
        begin = position - self.width // 2
        end = (begin + self.width).clamp(max=self.tokens)
        begin = begin.clamp(min=0)
        return begin, end - begin

    def result(self) -> dict[str, np.ndarray]:
        """Position, length and activations of every neuron's top, random and quantile windows, -1 if absent."""
        quantile = self._quantile_positions()
        neuron, position, values = self.windows.columns()
        code, order = (neuron * self.tokens + position).sort()
        arrays: dict[str, np.ndarray] = {}
        for kind, chosen in (("top", self.fixed[:, :TOP]), ("random", self.fixed[:, TOP:]), ("quantile", quantile)):
            row = torch.arange(self.neurons, device=self.device)[:, None].expand(chosen.shape)
            present, known = chosen >= 0, chosen.clamp(min=0)
            index = order[torch.searchsorted(code, row * self.tokens + known).clamp(max=len(code) - 1)]
            begin, length = self._window(known)
            arrays[f"{kind}.position"] = torch.where(present, begin, ABSENT).cpu().numpy()
            arrays[f"{kind}.length"] = torch.where(present, length, 0).to(torch.int16).cpu().numpy()
            arrays[f"{kind}.activation"] = torch.where(present[..., None], values[index], 0.0).cpu().numpy()
        return arrays

    def _quantile_positions(self) -> Int[Tensor, "neurons chosen"]:
        """The PER_INTERVAL candidates of smallest priority in each interval, -1 where an interval has fewer tokens."""
        candidates = self._settle(Candidates(*self.candidates.columns()))
        candidates = candidates.where(self._likely(candidates))
        cell = candidates.neuron * self.intervals + candidates.interval
        order = candidates.priority.argsort(stable=True)
        order = order[cell[order].argsort(stable=True)]
        cell, position = cell[order], candidates.position[order]
        cells = torch.arange(self.neurons * self.intervals, device=self.device)
        rank = torch.arange(len(cell), device=self.device) - torch.searchsorted(cell, cells)[cell]
        chosen = rank < PER_INTERVAL
        table = torch.full((len(cells), PER_INTERVAL), -1, dtype=torch.int64, device=self.device)
        table[cell[chosen], rank[chosen]] = position[chosen]
        return table.view(self.neurons, -1)

    def _settle(self, candidates: Candidates) -> Candidates:
        """Rank the tokens at whose value an interval ends, and set the intervals of the candidates among them."""
        neuron, position, value = self.edges.columns()
        order = position.argsort(stable=True)
        order = order[value[order].argsort(descending=True, stable=True)]
        order = order[neuron[order].argsort(stable=True)]
        neuron, position, key = neuron[order], position[order], _key(value[order]).long()
        cell = neuron * _KEYS + (_KEYS - 1 - key)  # ascending: by neuron, larger values first
        rank = self.above[neuron, key] + torch.arange(len(cell), device=self.device) - torch.searchsorted(cell, cell)
        code, by_code = (neuron * self.tokens + position).sort()
        undecided = (candidates.interval == EDGE).nonzero().squeeze(1)
        wanted = candidates.neuron[undecided] * self.tokens + candidates.position[undecided]
        settled = self._interval_of_rank(candidates.neuron[undecided], rank[by_code[torch.searchsorted(code, wanted)]])
        interval = candidates.interval.clone()
        interval[undecided] = settled
        return replace(candidates, interval=interval)


def _key(values: Float[Tensor, "*some"]) -> Int[Tensor, "*some"]:
    """The leading 16 bits of non-negative float32 numbers."""
    return values.contiguous().view(torch.int32) >> 16
