"""How the released code chooses excerpts, followed to the letter but in bounded memory.

The corpus is a prefix of the split, cut into blocks of the model's context, each computed on its own. Per neuron, all
its tokens are ranked by activation: the top ones, uniformly drawn ones, and draws from intervals of ranks are each the
centre of a window that may run over the edges of blocks and documents. The released code holds and sorts everything;
here a first pass counts activations by their leading 16 bits, which settles the interval of nearly every token, and a
second pass gathers the windows and ranks the tokens of the few values where an interval ends. Equal activations are
ranked by position. `docs/compat.md` lists the flaws of the procedure; `repairs.py` has a switch for each.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cratelm.activations.draws import DRAWS, EDGE, OUTSIDE, Candidates, priorities, random_sequences
from cratelm.activations.reading import NARROW, WIDE, Reading
from cratelm.activations.running import Moments, TopExcerpts

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

    Each call takes whole blocks. `position` is the number of a token among the choosable ones (`Reading`).

    A draw without replacement from an interval is the first PER_INTERVAL tokens of a random sequence that fall in it;
    from a rare interval, the PER_INTERVAL of its tokens whose random priorities are smallest.
    """

    def __init__(
        self, neurons: int, width: int, reading: Reading, *, seed: tuple[int, ...], device: torch.device
    ) -> None:
        self.neurons, self.width, self.reading, self.device = neurons, width, reading, device
        self.repairs, self.tokens = reading.repairs, reading.choosable
        self.cuts = torch.from_numpy(reading.cuts).to(device)
        self.generator = np.random.default_rng(seed)
        self.seed = int(self.generator.integers(2**62))
        self.histogram = torch.zeros(neurons * _KEYS, dtype=torch.int32, device=device)
        self.best = TopExcerpts(neurons, TOP, 1, device)
        self.moments = Moments(neurons, device)
        self.leading: list[Tensor] = []  # activations of the first tokens, to fill up the top lists of rare neurons
        self.zeros = torch.zeros(neurons, dtype=torch.int64, device=device)
        self.found: list[Candidates] = []
        self.edges: list[tuple[Tensor, Tensor, Tensor]] = []
        self.waiting: list[tuple[Tensor, Tensor]] = []  # (neuron, position) of tokens whose window is not cut yet
        self.windows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.tail = torch.zeros(0, neurons, device=device)
        if "one-top-per-document" in self.repairs:
            self.piece_starts, self.piece_documents = (torch.from_numpy(one).to(device) for one in reading.pieces)

    def count(self, activations: Float[Tensor, "tokens neurons"], place: int) -> None:
        """First pass: how many tokens have each leading 16 bits, and the top tokens. `place` is that of the first."""
        if place == 0:
            self.moments.start(activations)
        self.moments.update(activations)
        activations, first = self._choosable(activations, place)
        if first < 2 * TOP:
            self.leading.append(activations[: 2 * TOP - first].clone())
        cells = (_key(activations) + torch.arange(self.neurons, device=self.device) * _KEYS).flatten()
        self.histogram.index_add_(0, cells, torch.ones((), dtype=torch.int32, device=self.device).expand(len(cells)))
        token, neuron = ((activations >= self.best.threshold) & (activations > 0)).nonzero(as_tuple=True)
        values, position = activations[token, neuron], token + first
        self.best.offer(
            neuron, values, position, self._document(position), torch.ones_like(token), values[:, None]
        )  # fmt: skip

    def _choosable(self, activations: Tensor, place: int) -> tuple[Float[Tensor, "choosable neurons"], int]:
        """Those of the tokens that may be chosen, and the number of the first."""
        context, skipped = self.reading.context, self.reading.skipped
        if skipped:
            activations = activations.unflatten(0, (-1, context))[:, skipped:].flatten(0, 1)
        return activations, place // context * (context - skipped)

    def _document(self, position: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        """Of what `TopExcerpts` keeps one only: the released procedure may choose any token."""
        if "one-top-per-document" not in self.repairs:
            return position
        return self.piece_documents[torch.searchsorted(self.piece_starts, position, right=True) - 1]

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
        there = self.fixed.flatten() >= 0
        neuron = torch.arange(self.neurons, device=self.device).repeat_interleave(self.fixed.shape[1])
        self.waiting = [(neuron[there], self.fixed.flatten()[there])]
        sequences = random_sequences(self.neurons, self.tokens, self.generator).ravel()
        order = np.argsort(sequences, kind="stable")
        self.drawn, self.drawn_slot = sequences[order], torch.from_numpy(order).to(self.device)
        self.sequence_length = len(sequences) // self.neurons

    def _set_intervals(self) -> None:
        """Each neuron's intervals [low, high) of ranks, and how candidates for them are found."""
        everything = np.full(self.neurons, self.tokens)
        of = self.positive.cpu().numpy() if "positive-intervals" in self.repairs else everything
        self.bounds = torch.from_numpy(rank_bounds(of, self.width)).to(self.device)
        self.low, self.high = self.bounds[:, 1:], self.bounds[:, :-1]
        self.intervals = self.low.shape[1]
        sizes = self.high - self.low
        self.is_rare = sizes < _RARE * self.tokens
        scale = torch.where(self.is_rare, 1, self.tokens / DRAWS)  # from a share of the interval to a priority
        self.rate = _SPARE / sizes.clamp(min=1) * scale.double()
        self.rare_ranks = torch.where(self.is_rare, self.high, 0).amax(dim=1)

    def _top_and_random(self) -> Int[Tensor, "neurons chosen"]:
        self.best.merge()
        top = self.best.tables["position"]
        if "no-filling" not in self.repairs:
            top = self._filled(top)
        random = torch.from_numpy(self.generator.integers(0, self.tokens, (self.neurons, RANDOM))).to(self.device)
        if "distinct-random" in self.repairs:
            random = self._distinct_random(top)
        return torch.cat([top, random], dim=1)

    def _filled(self, top: Int[Tensor, "neurons top"]) -> Int[Tensor, "neurons top"]:
        """A neuron with fewer positive tokens than TOP gets its first zeros, as a sort would give it.

        Where a document has one place, those are the first tokens of the documents in which it never fires; too few
        documents leave the list short.
        """
        if "one-top-per-document" in self.repairs:
            _, first = np.unique(self.reading.pieces[1], return_index=True)
            spare = self.piece_starts[torch.from_numpy(first[: 2 * TOP]).to(self.device)]
            taken = (self._document(spare)[:, None, None] == self.best.tables["document"]).any(dim=2)
        else:
            taken = torch.cat(self.leading)[: 2 * TOP] > 0
            spare = torch.arange(len(taken), device=self.device)
        free_first = spare[torch.argsort(taken.to(torch.uint8), dim=0, stable=True).T]
        free = (~taken).sum(dim=0)[:, None]
        missing = top < 0
        rank = torch.arange(TOP, device=self.device) - (~missing).sum(dim=1, keepdim=True)
        fill = torch.where(rank < free, free_first.gather(1, rank.clamp(0, len(spare) - 1)), -1)
        return torch.where(missing, fill, top)

    def _distinct_random(self, top: Int[Tensor, "neurons top"]) -> Int[Tensor, "neurons random"]:
        """Uniform among the tokens that are not top ones, none twice. Its own generator leaves other draws alone."""
        drawn = random_sequences(self.neurons, self.tokens, np.random.default_rng(self.seed))[:, : 4 * (TOP + RANDOM)]
        sequence = torch.from_numpy(drawn).to(self.device)
        refused = (sequence < 0) | (sequence[:, :, None] == top[:, None, :]).any(dim=2)
        return sequence.gather(1, refused.to(torch.uint8).argsort(dim=1, stable=True)[:, :RANDOM])

    def gather(self, activations: Float[Tensor, "tokens neurons"], place: int) -> None:
        """Second pass: find the candidates of every interval, and keep the windows of all chosen tokens."""
        chosen, first = self._choosable(activations, place)
        key = _key(chosen)
        for edge in self.edge_keys:
            token, neuron = (key == edge).nonzero(as_tuple=True)
            self.edges.append((neuron, token + first, chosen[token, neuron]))
        zero = chosen == 0
        rank_of_zero = self.positive + self.zeros + zero.cumsum(dim=0, dtype=torch.int32) - 1
        self.zeros += zero.sum(dim=0)
        self._propose(self._drawn_candidates(chosen, rank_of_zero, first))
        self._propose(self._rare_candidates(chosen, zero & (rank_of_zero < self.rare_ranks), rank_of_zero, first))
        joined, end = torch.cat([self.tail, activations]), place + len(activations)
        # Tokens whose whole window has been read; half a width is enough where they stand in the middle.
        seen = end if end == self.reading.tokens else end - self.width + self._least_before()
        self._cut(joined, place - len(self.tail), seen)
        self.tail = joined[-2 * self.width :].clone()

    def _drawn_candidates(self, activations: Tensor, rank_of_zero: Tensor, first: int) -> Candidates:
        """Those of the neurons' random sequences."""
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
        """Keep what has a chance: the right kind for its interval, and a small enough priority."""
        likely = self._likely(candidates) | (candidates.interval == EDGE)
        kept = candidates.where(likely & (candidates.priority < self.rate.amax(dim=1)[candidates.neuron]))
        self.found.append(kept)
        self.waiting.append((kept.neuron, kept.position))

    def _likely(self, candidates: Candidates) -> Bool[Tensor, " some"]:
        inside = candidates.interval < self.intervals
        cell = candidates.neuron, torch.where(inside, candidates.interval, 0)
        return inside & (candidates.rare == self.is_rare[cell]) & (candidates.priority < self.rate[cell])

    def _interval_of_rank(self, neuron: Int[Tensor, " some"], rank: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        interval = torch.full_like(rank, OUTSIDE)
        for index in range(self.intervals):
            interval[(rank >= self.low[neuron, index]) & (rank < self.high[neuron, index])] = index
        return interval

    def _cut(self, joined: Float[Tensor, "tokens neurons"], start: int, seen: int) -> None:
        """Copy the windows of the waiting tokens before place `seen`; `joined` begins at place `start`."""
        neuron, position = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        ready = self.reading.place(position) < seen
        self.waiting = [(neuron[~ready], position[~ready])]
        neuron, position = neuron[ready], position[ready]
        begin, length = self._window(neuron, position)
        columns = torch.arange(self.width, device=self.device)
        token = (begin[:, None] - start + columns).clamp(max=len(joined) - 1)
        values = torch.where(columns < length[:, None], joined[token, neuron[:, None]], 0.0)
        self.windows.append((neuron, position, values))

    def _window(
        self, neuron: Int[Tensor, "*some"], position: Int[Tensor, "*some"]
    ) -> tuple[Int[Tensor, "*some"], Int[Tensor, "*some"]]:
        """First place and length of a token's window, which cuts make shorter."""
        place = self.reading.place(position)
        begin = place - self._before(neuron, place)
        cut = torch.searchsorted(self.cuts, place, right=True)
        end = torch.minimum(begin + self.width, self.cuts[cut])
        begin = torch.maximum(begin, self.cuts[cut - 1])
        return begin, end - begin

    def _before(self, neuron: Int[Tensor, "*some"], place: Int[Tensor, "*some"]) -> Int[Tensor, "*some"]:
        """Tokens of a window before the sampled one."""
        if "random-place" not in self.repairs:
            return torch.full_like(place, self.width // 2)
        # Another seed than that of the draws: a token is drawn for its small priority.
        return (priorities(neuron, place, self.seed + 1) * self.width).long()

    def _least_before(self) -> int:
        return 0 if "random-place" in self.repairs else self.width // 2

    def result(self) -> dict[str, np.ndarray]:
        """Place, length and activations of the top, random and quantile windows of every neuron, -1 where none is.

        With repairs also `sampled`, the index in the window of the token that it was chosen for; without, that is half
        the width except at the beginning of the corpus.
        """
        quantile = self._quantile_positions()
        neuron, position, values = (torch.cat(parts) for parts in zip(*self.windows, strict=True))
        code, order = (neuron * self.tokens + position).sort()
        arrays: dict[str, np.ndarray] = {}
        for kind, chosen in (("top", self.fixed[:, :TOP]), ("random", self.fixed[:, TOP:]), ("quantile", quantile)):
            row = torch.arange(self.neurons, device=self.device)[:, None].expand(chosen.shape)
            there, known = chosen >= 0, chosen.clamp(min=0)
            index = order[torch.searchsorted(code, row * self.tokens + known).clamp(max=len(code) - 1)]
            begin, length = self._window(row, known)
            arrays[f"{kind}.position"] = torch.where(there, begin, -1).cpu().numpy()
            arrays[f"{kind}.length"] = torch.where(there, length, 0).to(torch.int16).cpu().numpy()
            arrays[f"{kind}.activation"] = torch.where(there[..., None], values[index], 0.0).cpu().numpy()
            if self.repairs:
                sampled = torch.where(there, self.reading.place(known) - begin, -1)
                arrays[f"{kind}.sampled"] = sampled.to(torch.int16).cpu().numpy()
        return arrays

    def _quantile_positions(self) -> Int[Tensor, "neurons chosen"]:
        """The PER_INTERVAL candidates of smallest priority in each interval, -1 where an interval has fewer tokens."""
        candidates = self._settle(Candidates.join(self.found))
        candidates = candidates.where(self._likely(candidates))
        cell = candidates.neuron * self.intervals + candidates.interval
        order = candidates.priority.argsort(stable=True)
        order = order[cell[order].argsort(stable=True)]
        cell, position = cell[order], candidates.position[order]
        cells = torch.arange(self.neurons * self.intervals, device=self.device)
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
        undecided = (candidates.interval == EDGE).nonzero().squeeze(1)
        wanted = candidates.neuron[undecided] * self.tokens + candidates.position[undecided]
        settled = self._interval_of_rank(candidates.neuron[undecided], rank[by_code[torch.searchsorted(code, wanted)]])
        interval = candidates.interval.clone()
        interval[undecided] = settled
        return replace(candidates, interval=interval)


def _key(values: Float[Tensor, "*some"]) -> Int[Tensor, "*some"]:
    """The leading 16 bits of non-negative float32 numbers."""
    return values.contiguous().view(torch.int32) >> 16
