"""How to train: `TrainConfig`, its defaults the paper's, and the learning-rate schedule."""

import math
from dataclasses import dataclass

from cratelm.errors import CrateError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train. Defaults are the paper's, for its 157 billion tokens on many GPUs."""

    tokens: int = 157_286_400_000
    """Tokens to train on, in all."""
    batch_tokens: int = 262_144
    """Tokens per optimizer step."""
    micro_batch: int = 8
    """Sequences per forward pass; a batch is accumulated over as many as it takes."""
    context: int = 1024
    """Tokens per training sequence."""
    learning_rate: float = 6e-4
    """Peak of the schedule: linear warm-up from 0, then a cosine."""
    final_learning_rate: float = 6e-5
    """End of the cosine."""
    warmup_steps: int = 2000
    weight_decay: float = 0.1
    """On tensors with two or more dimensions."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 1337
    """Of the initial weights and of the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int = 1000
    """Steps between measurements of the held-out loss, on the first `evaluate_tokens` held-out tokens."""
    evaluate_tokens: int = 262_144
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last two are kept."""

    def __post_init__(self) -> None:
        counts = ("tokens", "batch_tokens", "micro_batch", "context", "log_every", "evaluate_every", "evaluate_tokens")
        problems = [
            f"{name} is {getattr(self, name)}, at least 1 is needed"
            for name in (*counts, "checkpoint_every")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} is {getattr(self, name)}, it must be above 0"
            for name in ("learning_rate", "clip")
            if not getattr(self, name) > 0
        ]
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
        """Linear from 0 over the warm-up, then a cosine that ends at `final_learning_rate`; steps count from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.final_learning_rate + cosine * (self.learning_rate - self.final_learning_rate)
