"""How an autoencoder is trained: kind, size and schedule, and the numbers that follow from them."""

import math
from dataclasses import dataclass

from cratelm.errors import CrateError, check_least
from cratelm.sae.kinds import SAE_KINDS, SaeKind


@dataclass(frozen=True, kw_only=True)
class SaeConfig:
    """Settings of a training."""

    kind: str = "standard"
    """A key of `SAE_KINDS`."""
    expansion: int = 4
    """Latents per input dimension; the paper has 1, 4 and 16."""
    batch_tokens: int = 4096
    """Activations per step."""
    buffer_tokens: int = 65536
    """Activations in memory that are shuffled together; the released code holds 524288."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 4e-4; for topk, batchtopk and matryoshka 2e-4 / sqrt(latents / 16384)."""
    warmup_steps: int = 1000
    """Steps over which the learning rate rises; at most a tenth of the training, except for paper."""
    l1: float | None = None
    """Weight of the sparsity penalty. Default: 2 for standard and gated, 8e-5 for paper."""
    k: int = 32
    """Active latents per token: exact for topk, the average for batchtopk and matryoshka, the target for jumprelu."""
    dead_after: int | None = None
    """A latent that fires on none of this many tokens is dead. Default: a tenth of the training, at most 10M."""
    resample_at: tuple[int, ...] = (10_000, 20_000, 50_000, 75_000, 100_000)
    """paper: steps at which latents that hardly fire are resampled."""
    resample_window: int = 7500
    """paper: firing is counted over this many steps before each resampling."""
    resample_rows: int = 512
    """paper: rows of tokens from which the inputs of resampled latents are chosen (released code: 60000)."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    seed: int = 0
    """Seed of the weights, the order of the activations and the resampling."""

    def __post_init__(self) -> None:
        if self.kind not in SAE_KINDS:
            raise CrateError(f"--kind must be one of {', '.join(SAE_KINDS)}, got {self.kind}")
        counts = ("expansion", "batch_tokens", "k", "log_every", "resample_window", "resample_rows", "dead_after")
        check_least(self, 1, *counts)
        check_least(self, 0, "warmup_steps", "l1")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise CrateError(f"--learning-rate must be a number above 0, got {self.learning_rate}")
        if self.buffer_tokens < self.batch_tokens:
            raise CrateError(
                f"--buffer-tokens must be at least --batch-tokens ({self.batch_tokens}), got {self.buffer_tokens}"
            )
        if self.l1 is not None and self.entry.l1 is None:
            raise CrateError(f"--l1 must be left out for the kind {self.kind}, got {self.l1}. Hint: use --k")

    @property
    def entry(self) -> SaeKind:
        """The entry of the kind in `SAE_KINDS`."""
        return SAE_KINDS[self.kind]

    @property
    def penalty(self) -> float:
        """Weight of the sparsity penalty; 0 for kinds without one."""
        return (self.entry.l1 or 0.0) if self.l1 is None else self.l1

    def width(self, d_in: int) -> int:
        """Number of latents for activations of this width; refused if less than `k`."""
        width = self.expansion * d_in
        if self.entry.l1 is None and self.k > width:
            raise CrateError(f"--k must be at most {width}, the number of latents, got {self.k}")
        return width

    def rate(self, d_in: int) -> float:
        """Peak learning rate."""
        return self.entry.learning_rate(self.width(d_in)) if self.learning_rate is None else self.learning_rate

    def steps(self, tokens: int) -> int:
        """Number of steps for this many tokens; refused if they do not fill a batch."""
        if tokens < self.batch_tokens:
            raise CrateError(
                f"--tokens must be at least --batch-tokens ({self.batch_tokens}), got {tokens}. Hint: use more tokens "
                "or a smaller --batch-tokens"
            )
        return tokens // self.batch_tokens

    def dead_steps(self, tokens: int) -> int:
        """Steps without firing after which a latent counts as dead."""
        window = self.dead_after or min(10_000_000, max(1, tokens // 10))
        return max(1, -(-window // self.batch_tokens))

    def rate_at(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at a 0-based step."""
        return self.entry.schedule(self, step, steps)

    def training_flops(self, d_in: int, tokens: int, model_flops_per_token: int) -> int:
        """FLOPs of a training: per token 12 d_in width for the autoencoder (2 products, forward and twice backward)

        and one forward pass of the model. The cost of dead latents' extra terms is left out.
        """
        return tokens * (12 * d_in * self.width(d_in) + model_flops_per_token)
