"""Prefetched batches: a thread cuts the next micro-batches from the tokens while the device computes.

The rows of a batch are a function of seed, step and process (`sample_batch`), independent of the thread.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cratelm.data.tokens import sample_batch
from cratelm.errors import CrateError
from cratelm.training.config import TrainConfig

MicroBatch = tuple[Tensor, Tensor]
"""Inputs and targets, each (rows, context), on the device."""


class Batches:
    """The micro-batches of this process from step `first` on, in order; a context manager that ends the thread."""

    def __init__(
        self, config: TrainConfig, tokens: np.ndarray, rows: range, *, first: int, device: torch.device, ahead: int,
        vocab_size: int,
    ) -> None:  # fmt: skip
        """`rows` are the sequences of every batch that this process computes; `ahead` micro-batches are kept ready.

        `step` raises CrateError at the first id that is not below `vocab_size`.
        """
        self.vocab_size = vocab_size
        self.config, self.tokens, self.rows, self.device = config, tokens, rows, device
        self.size = min(config.micro_batch, len(rows))
        micros = ((step, micro) for step in range(first, config.steps) for micro in range(self.per_step))
        self._unread, self._ahead = micros, ahead
        self._ready: deque[Future[MicroBatch]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __enter__(self) -> "Batches":
        for _ in range(self._ahead):
            self._read_next()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    @property
    def per_step(self) -> int:
        """Micro-batches of a step."""
        return len(self.rows) // self.size

    def micro_rows(self, micro: int) -> range:
        """The sequences of the batch that a micro-batch of this process holds."""
        return self.rows[micro * self.size : (micro + 1) * self.size]

    def step(self) -> Iterator[MicroBatch]:
        """The micro-batches of the next step."""
        for _ in range(self.per_step):
            assert self._ready, "there is no batch after the last step"
            inputs, targets = self._ready.popleft().result()
            self._read_next()
            yield inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def _read_next(self) -> None:
        """Let the thread cut the next micro-batch, if there is one."""
        if (number := next(self._unread, None)) is not None:
            self._ready.append(self._thread.submit(self._cut, *number))

    def _cut(self, step: int, micro: int) -> MicroBatch:
        config, rows = self.config, self.micro_rows(micro)
        batch = sample_batch(self.tokens, seed=config.seed, step=step, rows=rows, context=config.context)
        if (largest := max(int(part.max()) for part in batch)) >= self.vocab_size:
            raise CrateError(
                f"the training tokens must have ids below {self.vocab_size}, the size of the vocabulary; got {largest} "
                f"in the batch of step {step}. Hint: tokenize again, or name the right tokenizer with --tokenizer"
            )
        inputs, targets = (torch.from_numpy(part) for part in batch)
        if self.device.type == "cuda":  # pinned memory is copied while the GPU computes
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets
