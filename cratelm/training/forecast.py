"""Estimate the time and memory of a training before its first step.

Time comes from timed passes of the model on this device, memory from the tensors that autograd saves in a forward pass.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.runtime import duration, human
from cratelm.training.config import Execution, TrainConfig
from cratelm.training.learner import autocast

PATIENCE = 2.0
"""A batch is timed only if it is expected to take less than this many seconds; otherwise one row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Estimated time and memory of a training."""

    tokens: int
    """Tokens of the training, over all devices."""
    seconds: float
    """Duration of the training."""
    rate: float
    """Floating-point operations per second of this device."""
    state_bytes: int
    """Weights, gradients and the optimizer's moments, per device."""
    activation_bytes: int
    """Tensors saved for the backward pass of one micro-batch."""

    def __str__(self) -> str:
        memory = human(self.state_bytes + self.activation_bytes)
        return (
            f"about {duration(self.seconds)} at {human(self.tokens / self.seconds)} tokens per second "
            f"({human(self.rate)}FLOP/s per device, from a few timed passes), {memory}B of memory per device "
            f"({human(self.state_bytes)}B weights, gradients and moments, {human(self.activation_bytes)}B activations)"
        )


def forecast(
    config: TrainConfig, model_config: ModelConfig, *, device: torch.device, world_size: int = 1,
    execution: Execution | None = None,
) -> Forecast:  # fmt: skip
    """Time a few passes of the model on one device. Raises CrateError if the processes do not divide the batch."""
    rows = len(config.rows_of(0, world_size))
    micro = min(config.micro_batch, rows)
    model = LanguageModel(model_config).initialise(0).to(device)
    model.recompute_codes(execution is not None and execution.recompute)
    tokens = torch.randint(model_config.vocab_size, (micro, config.context + 1), device=device)
    activation_bytes = _activation_bytes(model, tokens, device)
    row_seconds = _seconds_per_row(model, tokens, device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    moments = 3 if config.optimizer == "adamw" else 2.5
    shards = world_size if execution is not None and execution.parallel == "fsdp" else 1
    flops = 3.0 * model_config.flops_per_token(config.context)
    return Forecast(
        tokens=config.steps * config.batch_tokens, seconds=row_seconds * rows * config.steps,
        rate=flops * config.context / row_seconds,
        state_bytes=round(4 * weights * (1 + moments) / shards), activation_bytes=activation_bytes,
    )  # fmt: skip


def _activation_bytes(model: LanguageModel, tokens: Tensor, device: torch.device) -> int:
    """Bytes saved for the backward pass of all rows, extrapolated from passes of one row and of two.

    Activations grow with the rows; masks and the gradient of the head, which the loss saves, do not.
    """

    def measure(rows: int) -> int:
        with _saved_bytes(model) as sizes:
            with autocast(device):
                loss, added = model.objective(tokens[:rows, :-1], tokens[:rows, 1:])
            total = sum(sizes.values())
            (loss + added).backward()
        model.zero_grad(set_to_none=True)
        return total

    one_row = measure(1)
    return one_row if len(tokens) == 1 else one_row + (len(tokens) - 1) * (measure(2) - one_row)


def _seconds_per_row(model: LanguageModel, tokens: Tensor, device: torch.device) -> float:
    """Seconds of a forward and backward pass per row, from a micro-batch if that takes less than `PATIENCE`."""

    def time_pass(rows: int) -> float:
        _wait(device)
        started = time.monotonic()
        with autocast(device):
            loss = model.loss(tokens[:rows, :-1], tokens[:rows, 1:])
        loss.backward()
        model.zero_grad(set_to_none=True)
        _wait(device)
        return (time.monotonic() - started) / rows

    first = time_pass(1)
    if first > PATIENCE:
        return first
    rows = len(tokens) if first * len(tokens) < PATIENCE else 1
    time_pass(rows)
    return min(time_pass(rows) for _ in range(2))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _saved_bytes(model: LanguageModel) -> Iterator[dict[int, int]]:
    """Yield the sizes, by address, of the storages that forward passes save for backward, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes
