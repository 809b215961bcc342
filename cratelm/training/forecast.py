"""What a training will take, before its first step: parameters, arithmetic, tokens, time and memory.

Time comes from timed steps of the model itself on this device, memory from counting what a forward pass keeps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.runtime import duration, human
from cratelm.training.config import Execution, TrainConfig
from cratelm.training.learner import autocast

PATIENCE = 2.0
"""Seconds that timed passes may take, after the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a training takes on one of its devices."""

    parameters: int
    """Trainable numbers, position embeddings left out."""
    flops: float
    """Of the whole training, over all devices: three times the forward pass."""
    tokens: int
    """Over all devices."""
    steps: int
    world_size: int
    seconds: float
    """Of the whole training."""
    rate: float
    """Floating-point operations per second of this device, as timed."""
    state_bytes: int
    """Weights, gradients and the optimizer's moments."""
    activation_bytes: int
    """What one micro-batch keeps for its backward pass."""

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
    """Time a few passes of the real model on one device. Raises CrateError where the processes do not fit the batch."""
    own = len(config.rows_of(0, world_size))
    micro = min(config.micro_batch, own)
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
        parameters=model_config.num_parameters, flops=flops * config.steps * config.batch_tokens,
        tokens=config.steps * config.batch_tokens, steps=config.steps, world_size=world_size,
        seconds=row_seconds * own * config.steps, rate=flops * config.context / row_seconds,
        state_bytes=round(4 * weights * (1 + moments) / shards), activation_bytes=activation_bytes,
    )  # fmt: skip


def _activation_bytes(model: LanguageModel, tokens: Tensor, device: torch.device) -> int:
    """What a forward pass of all rows keeps for its backward pass, from passes of one row and of two.

    Activations grow with the rows; the gradient of the head, which the loss leaves, and masks do not.
    """

    def measured(rows: int) -> int:
        with _kept(model) as kept:
            with autocast(device):
                loss, added = model.objective(tokens[:rows, :-1], tokens[:rows, 1:])
            found = kept()
            (loss + added).backward()
        model.zero_grad(set_to_none=True)
        return found

    one = measured(1)
    return one if len(tokens) == 1 else one + (len(tokens) - 1) * (measured(2) - one)


def _seconds_per_row(model: LanguageModel, tokens: Tensor, device: torch.device) -> float:
    """Forward and backward time of one sequence, from as large a batch as patience allows."""

    def timed(rows: int) -> float:
        _wait(device)
        started = time.monotonic()
        with autocast(device):
            loss = model.loss(tokens[:rows, :-1], tokens[:rows, 1:])
        loss.backward()
        model.zero_grad(set_to_none=True)
        _wait(device)
        return (time.monotonic() - started) / rows

    one = timed(1)
    rows = len(tokens) if one * len(tokens) < PATIENCE else 1
    if one > PATIENCE:
        return one
    timed(rows)
    return min(timed(rows) for _ in range(2))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _kept:
    """Counts the bytes that a forward pass keeps for its backward pass, the parameters left out."""

    def __init__(self, model: LanguageModel) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.storages: dict[int, int] = {}

    def __enter__(self) -> Callable[[], int]:
        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.parameters:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return lambda: sum(self.storages.values())

    def __exit__(self, *found: object) -> None:
        self.hooks.__exit__(*found)
