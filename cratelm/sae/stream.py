"""Stream activations to the trainer in shuffled batches, with one buffer of activations in memory.

For each buffer, rows start at random places of the corpus, as in pre-training, and the activations are shuffled. A
batch depends only on the seed and its number, so a resumed training reads the same batches.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from cratelm.data.tokens import sample_batch
from cratelm.errors import CrateError

ReadActivations = Callable[[Int[Tensor, "batch seq"]], Float[Tensor, "batch seq d_in"]]
"""Token ids to the activations at one place of a model."""


class ActivationStream(Iterator[Tensor]):
    """Endless batches of shape (batch_tokens, d_in), each activation from a random place of the corpus."""

    def __init__(
        self,
        forward: ReadActivations,
        tokens: Integer[np.ndarray, " stream"],
        *,
        d_in: int,
        context: int,
        batch_tokens: int,
        buffer_tokens: int,
        seed: int,
        device: torch.device,
        first: int = 0,
        rows_at_once: int = 16,
    ) -> None:
        """`first` is the number of the first batch; `buffer_tokens` is rounded down to whole batches."""
        self.forward, self.tokens, self.context = forward, tokens, min(context, len(tokens) - 1)
        if self.context < 1:
            raise CrateError(f"the split must have at least 2 tokens, got {len(tokens)}. Hint: tokenize more text")
        self.batch_tokens, self.per_buffer = batch_tokens, buffer_tokens // batch_tokens
        self.seed, self.device, self.rows_at_once = seed, device, rows_at_once
        self.number = first
        self._buffer = torch.empty(self.per_buffer * batch_tokens, d_in, device=device)
        self._filled: int | None = None
        self._order = torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        which, inside = divmod(self.number, self.per_buffer)
        if which != self._filled:
            self._fill(which)
        self.number += 1
        return self._buffer[self._order[inside * self.batch_tokens : (inside + 1) * self.batch_tokens]]

    def _fill(self, which: int) -> None:
        """Fill the buffer with number `which` and shuffle it."""
        size = len(self._buffer)
        rows, done = -(-size // self.context), 0
        for first in range(0, rows, self.rows_at_once):
            chosen = range(first, min(first + self.rows_at_once, rows))
            inputs, _ = sample_batch(self.tokens, seed=self.seed, step=which, rows=chosen, context=self.context)
            activations = self.forward(torch.from_numpy(inputs).to(self.device)).flatten(0, 1)[: size - done]
            self._buffer[done : done + len(activations)] = activations
            done += len(activations)
        if not bool(self._buffer.isfinite().all()):
            raise CrateError("the model's activations at this tap must be finite, got NaN or inf")
        order = np.random.default_rng((self.seed % 2**63, which)).permutation(size)
        self._order, self._filled = torch.from_numpy(order).to(self.device), which
