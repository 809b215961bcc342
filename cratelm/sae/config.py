"""How an autoencoder is trained: its kind, its size, its schedule, and what follows from them."""

import math
from dataclasses import dataclass
from typing import Literal

from cratelm.errors import CrateError

Kind = Literal["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka", "paper"]

PENALISED: tuple[Kind, ...] = ("standard", "gated", "paper")
"""Kinds whose sparsity comes from an L1 penalty; the others are told how many latents to use."""
PENALTY: dict[Kind, float] = {"standard": 2.0, "gated": 2.0, "paper": 8e-5}
"""Weight of that penalty unless another is given. Not comparable: `paper` divides its error otherwise."""
PENALTY_WARMUP = 0.05
"""Share of the training over which the penalty rises from 0 (not with `paper`)."""
DECAY = 0.2
"""Share of the training, at its end, over which the learning rate falls to 0 (not with `paper`)."""


@dataclass(frozen=True, kw_only=True)
class SaeConfig:
    """What to train."""

    kind: Kind = "standard"
    """standard, gated, jumprelu, topk, batchtopk, matryoshka; or paper: the released code's own (docs/sae.md)."""
    expansion: int = 4
    """Latents per input dimension; the paper has 1, 4 and 16."""
    batch_tokens: int = 4096
    """Activations per step."""
    buffer_tokens: int = 65536
    """Activations that are shuffled together and held in memory; the released code holds 524288."""
    learning_rate: float | None = None
    """Peak of the rate. By default 4e-4, for the three TopK kinds 2e-4 / sqrt(latents / 16384)."""
    warmup_steps: int = 1000
    """Steps over which the rate rises; at most a tenth of all, but for paper."""
    l1: float | None = None
    """Weight of the sparsity penalty of standard and gated (default 2) and paper (default 8e-5)."""
    k: int = 32
    """Latents on at a token: exactly for topk, on average for batchtopk and matryoshka, as a target for jumprelu."""
    dead_after: int | None = None
    """A latent that has not fired for so many tokens is dead. By default a tenth of the training, at most 10M."""
    resample_at: tuple[int, ...] = (10_000, 20_000, 50_000, 75_000, 100_000)
    """paper: steps at which latents that hardly fire start anew."""
    resample_window: int = 7500
    """paper: steps before each of them over which firing is counted."""
    resample_rows: int = 512
    """paper: rows of tokens among which the inputs to start from are chosen (released code: 60000)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    seed: int = 0
    """Of the weights, the order of the activations and the resampling."""

    def __post_init__(self) -> None:
        for name in ("expansion", "batch_tokens", "k", "log_every", "resample_window", "resample_rows"):
            if (value := getattr(self, name)) < 1:
                raise CrateError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise CrateError(f"--learning-rate is {self.learning_rate}, it must be a number above 0")
        if self.l1 is not None and not 0 <= self.l1 < math.inf:
            raise CrateError(f"--l1 is {self.l1}, it must be a number, 0 or more")
        if self.warmup_steps < 0 or (self.dead_after is not None and self.dead_after < 1):
            raise CrateError("--warmup-steps must be at least 0 and --dead-after at least 1")
        if self.buffer_tokens < self.batch_tokens:
            raise CrateError(
                f"--buffer-tokens is {self.buffer_tokens}, less than one batch of {self.batch_tokens} tokens. Give a "
                "larger buffer or a smaller --batch-tokens"
            )
        if self.l1 is not None and self.kind not in PENALISED:
            raise CrateError(f"--l1 is of the kinds {', '.join(PENALISED)}; {self.kind} is told its sparsity by --k")

    @property
    def penalty(self) -> float:
        """Weight of the L1 penalty; 0 where there is none."""
        return PENALTY.get(self.kind, 0.0) if self.l1 is None else self.l1

    def width(self, d_in: int) -> int:
        """Latents for activations of this width; refused where fewer than `k`."""
        width = self.expansion * d_in
        if self.kind not in PENALISED and self.k > width:
            raise CrateError(f"--k is {self.k}, but there are only {width} latents. Give a smaller one")
        return width

    def rate(self, d_in: int) -> float:
        """Peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.kind in ("topk", "batchtopk", "matryoshka"):
            return 2e-4 / math.sqrt(self.width(d_in) / 2**14)
        return 4e-4

    def steps(self, tokens: int) -> int:
        """Steps in a training of so many tokens; refused where they fill no batch."""
        if tokens < self.batch_tokens:
            raise CrateError(
                f"{tokens} tokens do not fill one batch of {self.batch_tokens}. Give more --tokens, or a smaller "
                "--batch-tokens"
            )
        return tokens // self.batch_tokens

    def dead_steps(self, tokens: int) -> int:
        """Steps without firing after which a latent counts as dead."""
        window = self.dead_after or min(10_000_000, max(1, tokens // 10))
        return max(1, -(-window // self.batch_tokens))

    def rate_at(self, step: int, steps: int) -> float:
        """Share of the peak rate at a step, 0-based.

        `paper`: 0.1 + 0.9 (1 - cos(pi t / W)) / 2 with t the steps since the start or the last resampling, up to the
        warm-up's W, then 1.
        The others rise linearly, stay, and fall linearly over the last fifth.
        """
        if self.kind == "paper":
            since = step - max((at for at in self.resample_at if at <= step), default=0)
            rise = min(1.0, since / self.warmup_steps) if self.warmup_steps else 1.0
            return 0.1 + 0.45 * (1 - math.cos(math.pi * rise))
        warmup, decay = min(self.warmup_steps, steps // 10), int(DECAY * steps)
        return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))

    def training_flops(self, d_in: int, tokens: int, model_flops_per_token: int) -> int:
        """Arithmetic of a training: 12 d_in width per token for the autoencoder (two products, forward and twice back),

        and one forward pass of the model. What dead latents cost besides is left out.
        """
        return tokens * (12 * d_in * self.width(d_in) + model_flops_per_token)
