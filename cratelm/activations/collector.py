"""The running records of every neuron of every layer: what one forward pass adds to them."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cratelm.activations.batch import Batch, BatchWindows, Layout
from cratelm.activations.plan import SPLITS, CollectConfig, Plan
from cratelm.activations.running import Moments, SampledExcerpts, TopExcerpts
from cratelm.errors import CrateError

BLOCK = 256
"""Tokens that are scanned together on a CPU: 3 MB of a layer of 3072 neurons, about one core's cache."""


@dataclass
class _Proposal:
    """Excerpts that may be among the top ones, before the host knows how many there are."""

    layer: int
    width: int
    inside: Float[Tensor, "rows length neurons"]
    windows: BatchWindows
    strongest: Float[Tensor, "rows neurons"]
    which: Int[Tensor, "rows neurons"]
    mask: Tensor


class Collector:
    """The running records of all layers: call `update` once per forward pass, and `flush` before reading them.

    On a GPU the host reads the number of proposed excerpts of a batch only after it has launched the next batch, so
    neither waits for the other.
    """

    def __init__(
        self,
        config: CollectConfig,
        plan: Plan,
        layers: Mapping[int, int],
        *,
        device: torch.device,
        delay: int | None = None,
    ) -> None:
        """`layers` gives the number of neurons of each layer; `delay`, in batches, is 0 on a CPU and 1 elsewhere."""
        self.config, self.plan, self.device, self.layout = config, plan, device, Layout(plan)
        self.delay = (0 if device.type == "cpu" else 1) if delay is None else delay
        self.neurons: dict[int, slice] = {}
        self.total = 0
        for layer, count in layers.items():
            self.neurons[layer] = slice(self.total, self.total + count)
            self.total += count
        self.moments = {layer: Moments(count, device) for layer, count in layers.items()}
        self.sizes = {
            config.wide: (config.top_wide, config.sample_wide),
            config.narrow: (config.top_narrow, config.sample_narrow),
        }
        self.top = {
            width: TopExcerpts(len(SPLITS) * self.total, keep, width, device) for width, (keep, _) in self.sizes.items()
        }
        self.samples = {
            (layer, width, which): SampledExcerpts(
                count, self.layout.total(width, which), self.sizes[width][1], width,
                (config.seed, layer, width, which), device,
            )
            for layer, count in layers.items() for width in self.sizes for which in range(len(SPLITS))
        }  # fmt: skip
        self.fires = {
            layer: torch.zeros(self.layout.cofiring_tokens, count, dtype=torch.bool, device=device)
            for layer, count in layers.items()
        }
        self.first_bad = {layer: torch.full((), len(plan.row_length), device=device) for layer in layers}
        self._waiting: deque[tuple[list[_Proposal], Tensor, torch.cuda.Event | None]] = deque()

    def update(self, codes: Mapping[int, Float[Tensor, "rows length neurons"]], rows: slice) -> None:
        """Take in the codes of some rows of the plan, longest row first."""
        batch = Batch(self.layout, rows, self.device)
        proposals = []
        for layer, code in codes.items():
            inside = code[:, self.plan.warmup :]
            narrow = self._scan(layer, inside, batch.lengths)
            wide = _group_maxima(narrow, self.config.wide // self.config.narrow)
            for width, maxima in ((self.config.narrow, narrow), (self.config.wide, wide)):
                windows = batch.windows[width]
                proposals.append(self._propose(layer, inside, maxima, width, windows))
                for which in range(len(SPLITS)):
                    self._store_sample(layer, inside, width, windows, which)
            self._record_bad_rows(layer, proposals[-2], rows)
            token, number = batch.cofiring
            self.fires[layer][number] = inside[token[0], token[1]] > 0
        self._wait_for(proposals)

    def start(self, codes: Mapping[int, Float[Tensor, "rows length neurons"]]) -> None:
        """Set the shift of the moments, which all processes share, from the first rows of the plan."""
        for layer, code in codes.items():
            self.moments[layer].start(code[0, self.plan.warmup :])

    def check(self) -> None:
        """Raise CrateError if an activation is not finite, with the layer and document of the first."""
        for layer, first in self.first_bad.items():
            row = int(first)
            if row < len(self.plan.row_length) or not bool(torch.isfinite(self.moments[layer].state["sums"]).all()):
                where = f"in document {self.plan.row_document[row]}" if row < len(self.plan.row_length) else "somewhere"
                raise CrateError(
                    f"layer {layer} has an activation that is not finite, {where} of the collected split. "
                    "Check the model: its training may have diverged"
                )

    def _record_bad_rows(self, layer: int, proposal: _Proposal, rows: slice) -> None:
        bad = ~torch.isfinite(proposal.strongest).all(dim=1) & ~proposal.windows.empty
        row = torch.arange(rows.start, rows.stop, device=self.device)
        first = torch.where(bad, row, len(self.plan.row_length)).amin()
        self.first_bad[layer] = torch.minimum(self.first_bad[layer], first)

    def _scan(self, layer: int, inside: Tensor, lengths: list[int]) -> Float[Tensor, "rows windows neurons"]:
        """Statistics of all tokens, and the maximum of each narrow window (the last of a row may be shorter).

        A block is read once from memory and then stays in the cache; a GPU takes all rows as one block.
        """
        rows, longest, neurons = inside.shape
        width, moments = self.config.narrow, self.moments[layer]
        if self.device.type != "cpu" and lengths[-1] == longest and longest % width == 0:
            moments.update(inside.flatten(0, 1))
            return inside.unflatten(1, (-1, width)).amax(dim=2)
        maxima = inside.new_full((rows, -(-longest // width), neurons), -math.inf)
        for row, length in enumerate(lengths):
            for first in range(0, length, BLOCK):
                block = inside[row, first : min(first + BLOCK, length)]
                moments.update(block)
                whole, start = len(block) // width, first // width
                tiles = block[: whole * width].unflatten(0, (whole, width))
                maxima[row, start : start + whole] = tiles.amax(dim=1)
                if whole * width < len(block):
                    maxima[row, start + whole] = block[whole * width :].amax(dim=0)
        return maxima

    def _propose(self, layer: int, inside: Tensor, maxima: Tensor, width: int, windows: BatchWindows) -> _Proposal:
        """Propose, for each neuron, the strongest window of each row."""
        maxima = maxima[:, : windows.most]
        maxima = maxima if windows.missing is None else maxima.masked_fill(windows.missing[..., None], -math.inf)
        strongest, which = maxima.max(dim=1)
        threshold = self.top[width].threshold.view(len(SPLITS), -1)[:, self.neurons[layer]][windows.split]
        mask = (strongest >= threshold) & (strongest > 0)
        return _Proposal(layer, width, inside, windows, strongest, which, mask)

    def _wait_for(self, proposals: list[_Proposal]) -> None:
        """Queue proposals until their counts are on the host, and settle those older than `delay` batches."""
        counts = torch.stack([proposal.mask.sum() for proposal in proposals]).to("cpu", non_blocking=True)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((proposals, counts, event))
        while len(self._waiting) > self.delay:
            self._settle(*self._waiting.popleft())

    def flush(self) -> None:
        """Settle all queued proposals."""
        while self._waiting:
            self._settle(*self._waiting.popleft())

    def _settle(self, proposals: list[_Proposal], counts: Tensor, event: "torch.cuda.Event | None") -> None:
        if event is not None:
            event.synchronize()
        for proposal, count in zip(proposals, counts.tolist(), strict=True):
            if count:
                self._offer(proposal, count)

    def _offer(self, proposal: _Proposal, count: int) -> None:
        row, neuron = torch.nonzero_static(proposal.mask, size=count).unbind(dim=1)
        windows, width = proposal.windows, proposal.width
        first = proposal.which[row, neuron] * width
        self.top[width].offer(
            neuron + self.neurons[proposal.layer].start + windows.split[row] * self.total,
            proposal.strongest[row, neuron], windows.position[row] + first, windows.document[row],
            windows.length[row], _gather(proposal.inside, row, first, neuron, windows.length[row], width),
        )  # fmt: skip

    def _store_sample(self, layer: int, inside: Tensor, width: int, windows: BatchWindows, which: int) -> None:
        """Store the activations of the windows that were drawn for some neuron."""
        sample = self.samples[layer, width, which]
        slot, number = sample.wanted(windows.first_number[which], windows.count[which])
        if len(slot) == 0:
            return
        row, index = windows.place[which][number].unbind(dim=1)
        neuron = slot // sample.tables["position"].shape[1]
        length, first = windows.length[row], index * width
        activation = _gather(inside, row, first, neuron, length, width)
        sample.store(slot, windows.position[row] + first, length, activation)

    def state(self) -> dict[str, Tensor]:
        """Named tensors from which a later process resumes."""
        self.flush()
        state: dict[str, Tensor] = {}
        for layer, moments in self.moments.items():
            state |= {f"moments.{layer}.{name}": value for name, value in moments.state.items()}
        for width, top in self.top.items():
            top.merge()
            state |= {f"top.{width}.{name}": value for name, value in top.tables.items()}
        state |= {f"fires.{layer}": fires for layer, fires in self.fires.items()}
        for key, sample in self.samples.items():
            state |= {f"sample.{'.'.join(map(str, key))}.{name}": value for name, value in sample.tables.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the tensors that `state` returned."""
        for layer, moments in self.moments.items():
            moments.state = {name: state[f"moments.{layer}.{name}"] for name in moments.state}
        self.fires = {layer: state[f"fires.{layer}"] for layer in self.fires}
        for width, top in self.top.items():
            top.tables = {name: state[f"top.{width}.{name}"] for name in top.tables}
        for key, sample in self.samples.items():
            sample.tables = {name: state[f"sample.{'.'.join(map(str, key))}.{name}"] for name in sample.tables}

    def merge(self, other: "Collector") -> None:
        """Merge the results of another process, which read other rows of the same plan."""
        other.flush()
        for layer, moments in self.moments.items():
            moments.merge(other.moments[layer])
        for layer, fires in self.fires.items():
            fires |= other.fires[layer]
        for width, top in self.top.items():
            top.take(other.top[width])
        for key, sample in self.samples.items():
            sample.take(other.samples[key])


def _group_maxima(maxima: Float[Tensor, "rows windows neurons"], group: int) -> Float[Tensor, "rows fewer neurons"]:
    """Maxima of wide windows from those of the narrow ones that tile them."""
    padded = torch.nn.functional.pad(maxima, (0, 0, 0, -maxima.shape[1] % group), value=-math.inf)
    return padded.unflatten(1, (-1, group)).amax(dim=2)


def _gather(
    inside: Float[Tensor, "rows length neurons"],
    row: Int[Tensor, " entries"],
    first: Int[Tensor, " entries"],
    neuron: Int[Tensor, " entries"],
    length: Int[Tensor, " entries"],
    width: int,
) -> Float[Tensor, "entries width"]:
    """Each entry's neuron over the tokens of its window, 0 beyond the window's length."""
    columns = torch.arange(width, device=inside.device)
    token = (first[:, None] + columns).clamp(max=inside.shape[1] - 1)
    values = inside[row[:, None], token, neuron[:, None]]
    return torch.where(columns < length[:, None], values, 0.0)
