"""How to train: `TrainConfig`, its defaults the paper's, the learning-rate schedules; and how to execute it."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from cratelm.errors import CrateError

Schedule = Literal["cosine", "wsd"]
Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train. Defaults are the paper's, for its 157 billion tokens on many GPUs."""

    tokens: int = 157_286_400_000
    """Tokens to train on, in all."""
    batch_tokens: int = 262_144
    """Tokens per optimizer step, over all processes."""
    micro_batch: int = 8
    """Sequences per forward pass of one process; a batch is accumulated over as many as it takes."""
    context: int = 1024
    """Tokens per training sequence."""
    learning_rate: float = 6e-4
    """Peak of the schedule."""
    final_learning_rate: float = 6e-5
    """End of the schedule, which a cosine reaches where a step after the last would be, as in the released code."""
    schedule: Schedule = "cosine"
    """After a linear warm-up from 0, a cosine to the end; or `wsd`: stable at the peak, at last a linear decay."""
    warmup_steps: int = 2000
    """Steps over which the learning rate rises."""
    decay_share: float = 0.2
    """Share of all steps that `wsd` decays over."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest."""
    weight_decay: float = 0.1
    """On tensors with two or more dimensions."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 1337
    """Of the initial weights and of the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 1000
    """Steps between measurements of the held-out loss."""
    evaluate_tokens: int = 262_144
    """Held-out tokens, the first ones, that it is measured on."""
    measure_every: int = 1000
    """Steps between calls of the measurements that were asked for; they are also made before the first step."""
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
            f"{name} is {getattr(self, name)}, at least 1 is needed" for name in counts if getattr(self, name) < 1
        ]
        problems += [
            f"{name} is {getattr(self, name)}, it must be {said}"
            for name, (said, allowed) in _RANGES.items()
            if not allowed(getattr(self, name))
        ]
        if not 0 < self.decay_share <= 1:
            problems.append(f"decay_share is {self.decay_share}, a share above 0 and up to 1 is needed")
        if not problems and self.batch_tokens % self.context:
            problems.append(f"batch_tokens {self.batch_tokens} is not a multiple of context {self.context}")
        if not problems and self.sequences % self.micro_batch:
            problems.append(
                f"a batch of {self.sequences} sequences is not a multiple of micro_batch {self.micro_batch}"
            )
        if problems:
            raise CrateError("unusable training configuration: " + "; ".join(problems))

    @property
    def sequences(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        """Optimizer steps, the last of them perhaps beyond `tokens`."""
        return math.ceil(self.tokens / self.batch_tokens)

    def learning_rate_at(self, step: int) -> float:
        """Linear from 0 over the warm-up, then by `schedule` to `final_learning_rate`; steps count from 0.

        A cosine ends at step `steps`, one after the last, as in the paper's code; `wsd` at the last. Where the warm-up
        meets the decay of `wsd` it turns there, below the peak.
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
        """A line that says so if the learning rate never reaches its peak, else None."""
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
        own, rest = divmod(self.sequences, world_size)
        if rest:
            raise CrateError(
                f"{world_size} processes do not divide a batch of {self.sequences} sequences ({self.batch_tokens} "
                f"tokens). Use a number of processes that does, or another --batch-tokens"
            )
        if own % min(self.micro_batch, own):
            raise CrateError(
                f"each of {world_size} processes gets {own} of the batch's {self.sequences} sequences, not a multiple "
                f"of micro_batch {self.micro_batch}. Use a --micro-batch that divides {own}"
            )
        return range(rank * own, (rank + 1) * own)


_FINITE: tuple[str, Callable[[float], bool]] = ("at least 0 and finite", lambda value: 0 <= value < math.inf)
_SHARE: tuple[str, Callable[[float], bool]] = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": ("above 0 and finite", lambda value: 0 < value < math.inf),
    "final_learning_rate": _FINITE, "warmup_steps": _FINITE, "weight_decay": _FINITE, "beta1": _SHARE, "beta2": _SHARE,
    "clip": ("above 0", lambda value: value > 0), "seed": ("of 64 bits", lambda value: -(2**63) <= value < 2**64),
}  # fmt: skip
"""Valid range of each setting that is not a count, in words and as a test that NaN fails."""

MAY_CHANGE = ("micro_batch", "log_every", "checkpoint_every", "keep_last")
"""Settings that may differ when a run resumes: batches and their order stay the same."""


def settled(training: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a run what it is; what an older `run.json` does not name yet was the default then."""
    defaults = asdict(TrainConfig())
    return {name: value for name, value in (defaults | training).items() if name not in MAY_CHANGE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How the arithmetic is carried out. It does not change the result, so a run may resume with other values."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes (torchrun): each with the whole model, or each with a share of its tensors (FSDP2)."""
    compile: bool | None = None
    """Fuse operations with torch.compile; by default on a GPU only."""
    recompute: bool = False
    """Keep less for the backward pass: it computes the codes of CRATE's earlier ISTA steps again (a product more)."""
    prefetch: int = 4
    """Micro-batches that a separate thread reads ahead."""
    track: tuple[Tracker, ...] = ()
    """Trackers that receive the metrics in addition to metrics.jsonl: tensorboard, wandb, trackio (extra `track`)."""

    def __post_init__(self) -> None:
        if self.prefetch < 1:
            raise CrateError(f"prefetch is {self.prefetch}, at least 1 is needed")


assert set(MAY_CHANGE) <= {field.name for field in fields(TrainConfig)}
