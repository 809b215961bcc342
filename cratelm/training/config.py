"""Training settings (`TrainConfig`, with the paper's defaults), the learning-rate schedules, and execution settings."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from cratelm.errors import CrateError, check_least

Schedule = Literal["cosine", "wsd"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
MeasurementName = Literal["lookup", "samples", "whitebox"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of a training. Defaults are the paper's, for its 157 billion tokens on many GPUs."""

    tokens: int = 157_286_400_000
    """Tokens to train on, in all."""
    batch_tokens: int = 262_144
    """Tokens per optimizer step, over all processes."""
    micro_batch: int = 8
    """Sequences per forward pass of one process; gradients are accumulated over the batch."""
    context: int = 1024
    """Tokens per training sequence."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    final_learning_rate: float = 6e-5
    """Learning rate at the end; a cosine reaches it one step after the last, as in the released code."""
    schedule: Schedule = "cosine"
    """After a linear warm-up from 0, a cosine to the end; or `wsd`: stable at the peak, at last a linear decay."""
    warmup_steps: int = 2000
    """Steps over which the learning rate rises."""
    decay_share: float = 0.2
    """Share of all steps that `wsd` decays over."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""
    weight_decay: float = 0.1
    """Weight decay of tensors with two or more dimensions."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 1337
    """Seed of the initial weights and of the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 1000
    """Steps between measurements of the held-out loss."""
    evaluate_tokens: int = 262_144
    """Number of held-out tokens to measure the loss on, from the first."""
    measure_every: int = 1000
    """Steps between the measurements of --measure, which also run before the first step."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Newest checkpoints to keep, in addition to the best (the lowest held-out loss measured at a checkpoint)."""

    def __post_init__(self) -> None:
        counts = (
            "tokens", "batch_tokens", "micro_batch", "context", "log_every", "evaluate_every", "evaluate_tokens",
            "measure_every", "checkpoint_every", "keep_last",
        )  # fmt: skip
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}" for name in counts if getattr(self, name) < 1
        ]
        problems += [
            f"{name} must be {wanted}, got {getattr(self, name)}"
            for name, (wanted, allowed) in _RANGES.items()
            if not allowed(getattr(self, name))
        ]
        if not 0 < self.decay_share <= 1:
            problems.append(f"decay_share must be above 0 and at most 1, got {self.decay_share}")
        if not problems and self.batch_tokens % self.context:
            problems.append(f"batch_tokens must be a multiple of context {self.context}, got {self.batch_tokens}")
        if not problems and self.sequences % self.micro_batch:
            problems.append(
                f"micro_batch must divide the {self.sequences} sequences of a batch, got {self.micro_batch}"
            )
        if problems:
            raise CrateError("unusable training configuration: " + "; ".join(problems))

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        """Optimizer steps; the last may exceed `tokens`."""
        return math.ceil(self.tokens / self.batch_tokens)

    def learning_rate_at(self, step: int) -> float:
        """Linear from 0 over the warm-up, then by `schedule` to `final_learning_rate`; steps count from 0.

        A cosine ends at step `steps`, one after the last, as in the paper's code; `wsd` at the last. A warm-up that
        overlaps the decay of `wsd` ends below the peak.
        """
        if step < self.warmup_steps:
            rising = self.learning_rate * (step + 1) / self.warmup_steps
            return min(rising, self._falling(step)) if step >= self.steps - self.decay_steps else rising
        return self._falling(step)

    @property
    def decay_steps(self) -> int:
        """Steps of the decay of `wsd`; 0 for a cosine, which falls from the end of the warm-up."""
        return max(1, round(self.decay_share * self.steps)) if self.schedule == "wsd" else 0

    def schedule_note(self) -> str | None:
        """A note if the learning rate never reaches its peak, else None."""
        if self.warmup_steps == 0 or self.warmup_steps + self.decay_steps <= self.steps:
            return None
        highest = max(map(self.learning_rate_at, range(min(self.warmup_steps, self.steps))))
        decay = f" and a decay of {self.decay_steps}" if self.decay_steps else ""
        return (
            f"{self.steps} steps leave none after a warm-up of {self.warmup_steps}{decay}: the learning rate rises "
            f"to {highest:.3g} of {self.learning_rate:.3g}. Lower --warmup-steps"
        )

    def _falling(self, step: int) -> float:
        if self.schedule == "wsd":
            share = min(1.0, max(0, self.steps - 1 - step) / self.decay_steps)
        else:
            progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
            share = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_learning_rate + share * (self.learning_rate - self.final_learning_rate)

    def rows_of(self, rank: int, world_size: int) -> range:
        """Which sequences of every batch one of several processes computes.

        Raises CrateError where the processes, or then the micro-batches, do not divide the batch.
        """
        share, rest = divmod(self.sequences, world_size)
        if rest:
            raise CrateError(
                f"{world_size} processes do not divide a batch of {self.sequences} sequences ({self.batch_tokens} "
                f"tokens). Use a number of processes that does, or another --batch-tokens"
            )
        if share % min(self.micro_batch, share):
            raise CrateError(
                f"--micro-batch must divide {share}, the sequences of each of {world_size} processes, "
                f"got {self.micro_batch}"
            )
        return range(rank * share, (rank + 1) * share)


_FINITE: tuple[str, Callable[[float], bool]] = ("at least 0 and finite", lambda value: 0 <= value < math.inf)
_SHARE: tuple[str, Callable[[float], bool]] = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("above 0 and finite", lambda value: 0 < value < math.inf),
    "final_learning_rate": _FINITE, "warmup_steps": _FINITE, "weight_decay": _FINITE, "beta1": _SHARE, "beta2": _SHARE,
    "clip": ("above 0", lambda value: value > 0), "seed": ("of 64 bits", lambda value: -(2**63) <= value < 2**64),
}  # fmt: skip
"""Valid range of each setting that is not a count, in words and as a check that rejects NaN."""

MAY_CHANGE = ("micro_batch", "log_every", "checkpoint_every", "keep_last")
"""Settings that may change when a run resumes; the batches and their order do not depend on them."""


def settled(training: dict[str, Any]) -> dict[str, Any]:
    """The settings that identify a run; one that is missing from an older `run.json` has its default."""
    defaults = asdict(TrainConfig())
    return {name: value for name, value in (defaults | training).items() if name not in MAY_CHANGE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """Settings for speed, memory and trackers. Results do not depend on them, so a run may resume with other values."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes (torchrun): each with the whole model, or each with a share of its tensors (FSDP2)."""
    compile: bool | None = None
    """Fuse operations with torch.compile; by default on a GPU only."""
    recompute: bool = False
    """Use less memory: the backward pass recomputes the codes of CRATE's earlier ISTA steps (one more product)."""
    prefetch: int = 4
    """Micro-batches that a separate thread reads ahead."""
    track: tuple[Tracker, ...] = ()
    """Trackers that receive the metrics in addition to metrics.jsonl: tensorboard, wandb, trackio (extra `track`)."""

    def __post_init__(self) -> None:
        check_least(self, 1, "prefetch")


assert set(MAY_CHANGE) <= {field.name for field in fields(TrainConfig)}
