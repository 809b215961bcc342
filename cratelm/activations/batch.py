"""The windows of a batch of rows, numbered so that windows drawn before the pass can be looked up."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cratelm.activations.plan import SPLITS, Plan

COFIRING_STRIDE = 16
COFIRING_TOKENS = 8192
"""Co-firing is counted on every 16th token, but on at most this many tokens, spread evenly over the corpus."""


class Layout:
    """The windows of a whole plan: their number per row, and a running number within each half."""

    def __init__(self, plan: Plan) -> None:
        self.plan, split = plan, plan.row_split()
        self.counts = {width: plan.windows(width) for width in (plan.wide, plan.narrow)}
        self.numbers = {
            (width, which): np.concatenate([[0], np.cumsum(np.where(split == which, count, 0))])
            for width, count in self.counts.items() for which in range(len(SPLITS))
        }  # fmt: skip

        self.token_number = np.concatenate([[0], np.cumsum(plan.row_length - plan.warmup)])
        self.stride = max(COFIRING_STRIDE, -(-plan.num_tokens // COFIRING_TOKENS))
        self.cofiring_tokens = -(-plan.num_tokens // self.stride)

    def cofiring(self, rows: slice) -> tuple[Int[np.ndarray, " tokens"], ...]:
        """Row in the batch, index in the row and number in the sample of the tokens on which co-firing is counted."""
        bounds = self.token_number[rows.start : rows.stop + 1]
        token = np.arange(-(-bounds[0] // self.stride) * self.stride, bounds[-1], self.stride)
        row = np.searchsorted(bounds, token, side="right") - 1
        return row, token - bounds[row], token // self.stride

    def total(self, width: int, which: int) -> int:
        """Number of windows of one width in one half."""
        return int(self.numbers[width, which][-1])


@dataclass
class BatchWindows:
    """The windows of one width in a batch of rows."""

    position: Int[Tensor, " rows"]
    """Index in the corpus of each row's first window."""
    document: Int[Tensor, " rows"]
    split: Int[Tensor, " rows"]
    length: Int[Tensor, " rows"]
    """Tokens in a window of the row."""
    most: int
    """Largest number of windows in a row."""
    missing: Bool[Tensor, "rows most"] | None
    """True where a row has fewer windows; None if every row has `most`."""
    empty: Bool[Tensor, " rows"]
    """Rows without windows."""
    first_number: list[int]
    """Per split: running number of the batch's first window."""
    count: list[int]
    """Per split: windows in the batch."""
    place: list[Int[Tensor, "_ 2"]]
    """Per split: row in the batch and index in the row of each window."""


class Batch:
    """Positions and windows of some rows of the plan, copied to the device at once."""

    def __init__(self, layout: "Layout", rows: slice, device: torch.device) -> None:
        self.rows = rows
        self.lengths: list[int] = (layout.plan.row_length[rows] - layout.plan.warmup).tolist()
        self.windows = {width: self._windows(layout, rows, width, device) for width in layout.counts}
        row, token, number = (torch.from_numpy(array).to(device) for array in layout.cofiring(rows))
        self.cofiring = (row, token), number

    @staticmethod
    def _windows(layout: "Layout", rows: slice, width: int, device: torch.device) -> BatchWindows:
        plan = layout.plan
        count, split = layout.counts[width][rows], plan.row_split()[rows]
        number = [layout.numbers[width, which][[rows.start, rows.stop]] for which in range(len(SPLITS))]
        most = max(1, int(count.max()))
        missing = np.arange(most) >= count[:, None]
        places = [np.argwhere(~missing & (split == which)[:, None]) for which in range(len(SPLITS))]

        def send(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        return BatchWindows(
            position=send(plan.row_position[rows] + plan.warmup), document=send(plan.row_document[rows]),
            split=send(split), length=send(plan.window_length(rows, width)), most=most,
            missing=send(missing) if missing.any() else None, empty=send(count == 0),
            first_number=[int(pair[0]) for pair in number], count=[int(pair[1] - pair[0]) for pair in number],
            place=[send(place) for place in places],
        )  # fmt: skip
