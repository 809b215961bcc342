"""The kinds of autoencoders that can be trained. To add a kind, add an entry to `SAE_KINDS` and, if needed, its class.

A kind that is saved in a form other than the four that `autoencoder.py` reads also needs an encoder there.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

PENALTY_WARMUP = 0.05
"""Share of the training over which a penalty rises from 0."""
DECAY = 0.2
"""Share of the training, at its end, over which the learning rate falls to 0."""
MATRYOSHKA_DIVISORS = (8, 4, 2, 1)
"""Matryoshka: the first 1/8, 1/4, 1/2 and all of the latents each reconstruct the activation."""

SCALED = {"normalize_activations": "expected_average_only_in"}
"""Setting of sae-lens: scale activations to a mean norm of sqrt(d_in) during training."""


@runtime_checkable
class TrainingSettings(Protocol):
    """The fields of `SaeConfig` that a kind reads."""

    @property
    def k(self) -> int: ...
    @property
    def penalty(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def resample_at(self) -> tuple[int, ...]: ...


def linear_schedule(config: TrainingSettings, step: int, steps: int) -> float:
    """Rise linearly over the warm-up (at most a tenth of the steps), stay, fall linearly over the last fifth."""
    warmup, decay = min(config.warmup_steps, steps // 10), int(DECAY * steps)
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))


def restarting_schedule(config: TrainingSettings, step: int, _steps: int) -> float:
    """0.1 + 0.9 (1 - cos(pi t / W)) / 2 up to t = W = warm-up steps, then 1; t counts from the last resampling."""
    since = step - max((at for at in config.resample_at if at <= step), default=0)
    rise = min(1.0, since / config.warmup_steps) if config.warmup_steps else 1.0
    return 0.1 + 0.45 * (1 - math.cos(math.pi * rise))


@dataclass(frozen=True, kw_only=True)
class SaeKind:
    """How one kind of autoencoder is trained."""

    description: str
    """What makes it sparse, in one line of the help."""
    training_class: str
    """MODULE:CLASS of a training class of sae-lens; its configuration class is called CLASSConfig."""
    settings: Callable[[TrainingSettings, int, int], dict[str, Any]]
    """(config, width, steps) to the settings of the configuration class, apart from sizes, dtype and device."""
    l1: float | None = None
    """Default weight of the sparsity penalty; None where `k` sets the sparsity."""
    learning_rate: Callable[[int], float] = lambda _width: 4e-4
    """Number of latents to the default peak learning rate."""
    schedule: Callable[[TrainingSettings, int, int], float] = linear_schedule
    """(config, 0-based step, steps) to the share of the peak learning rate."""
    folds_norms: bool = False
    """Whether the norms of the decoder's rows are folded into the other weights when it is saved."""
    resamples: bool = False
    """Whether latents that hardly fire are resampled at the steps of `resample_at`."""

    def classes(self) -> tuple[type, type]:
        """The training class and its configuration class; imports sae-lens."""
        module, name = self.training_class.split(":")
        home = importlib.import_module(module)
        return getattr(home, name), getattr(home, f"{name}Config")


def _penalised(config: TrainingSettings, _width: int, steps: int) -> dict[str, Any]:
    return SCALED | {"l1_coefficient": config.penalty, "l1_warm_up_steps": int(PENALTY_WARMUP * steps)}


def _jumprelu(config: TrainingSettings, _width: int, steps: int) -> dict[str, Any]:
    return SCALED | {
        "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(config.k), "l0_coefficient": 0.1,
        "l0_warm_up_steps": int(PENALTY_WARMUP * steps), "apply_b_dec_to_input": False,
        "pre_act_loss_coefficient": 3e-6, "jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 2.0,
        "jumprelu_ste_to_input": True,
    }  # fmt: skip


def _batch_topk(config: TrainingSettings, _width: int, steps: int) -> dict[str, Any]:
    # The threshold is a running average from 0 on; a short training needs a faster one.
    return SCALED | {"k": config.k, "topk_threshold_lr": min(1.0, max(0.01, 10 / steps))}


def _matryoshka(config: TrainingSettings, width: int, steps: int) -> dict[str, Any]:
    widths = sorted({max(1, width // level) for level in MATRYOSHKA_DIVISORS})
    return _batch_topk(config, width, steps) | {"matryoshka_widths": widths}


def _topk_rate(width: int) -> float:
    return 2e-4 / math.sqrt(width / 2**14)


SAE_KINDS: dict[str, SaeKind] = {
    "standard": SaeKind(
        description="an L1 penalty (--l1)", training_class="sae_lens:StandardTrainingSAE", settings=_penalised,
        l1=2.0, folds_norms=True,
    ),
    "gated": SaeKind(
        description="an L1 penalty (--l1) on a gate", training_class="sae_lens:GatedTrainingSAE",
        settings=_penalised, l1=2.0, folds_norms=True,
    ),
    "jumprelu": SaeKind(
        description="learned thresholds; L0 approaches --k", training_class="sae_lens:JumpReLUTrainingSAE",
        settings=_jumprelu, folds_norms=True,
    ),
    "topk": SaeKind(
        description="the --k largest latents of each token", training_class="sae_lens:TopKTrainingSAE",
        settings=lambda config, _width, _steps: SCALED | {"k": config.k}, learning_rate=_topk_rate,
    ),
    "batchtopk": SaeKind(
        description="the largest latents of a batch, --k per token", training_class="sae_lens:BatchTopKTrainingSAE",
        settings=_batch_topk, learning_rate=_topk_rate,
    ),
    "matryoshka": SaeKind(
        description="as batchtopk; the first 1/8, 1/4, 1/2 also work alone",
        training_class="sae_lens:MatryoshkaBatchTopKTrainingSAE", settings=_matryoshka, learning_rate=_topk_rate,
    ),
    "paper": SaeKind(
        description="the released code's own: L1 (--l1) and resampling",
        training_class="cratelm.sae.paper:PaperTrainingSAE",
        settings=lambda config, _width, _steps: {"l1_coefficient": config.penalty, "decoder_init_norm": None},
        l1=8e-5, schedule=restarting_schedule, resamples=True,
    ),
}  # fmt: skip
"""Value of `--kind` -> how it is trained. The order is that of the help."""


def describe_kinds() -> str:
    """The kinds as indented lines of a help text."""
    width = max(map(len, SAE_KINDS)) + 2
    return "\n".join(f"    {name:{width}}{kind.description}" for name, kind in SAE_KINDS.items())
