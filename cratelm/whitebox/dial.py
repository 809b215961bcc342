"""The sparsity dial: run a trained model with another penalty, step size or number of ISTA steps, without retraining.

    a_t = ReLU( a_{t-1} + s eta D^T (x - D a_{t-1}) - s eta m lambda ),   t = 1 .. n

with s, m and n varied. With s = m = 1 and the model's n it is exactly the trained model. For a model without ISTA, and
for comparison also with it, a threshold sets activations below a multiple of their layer's root mean square to 0.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer
from torch import Tensor, nn

from cratelm.activations.taps import capture, edit
from cratelm.errors import CrateError
from cratelm.model.crate import Shrinkage
from cratelm.model.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A setting of the dial."""

    penalty: float = 1.0
    """m: the penalty of every neuron times this."""
    step_size: float = 1.0
    """s: every step size, and with it the threshold, times this."""
    steps: int | None = None
    """n: ISTA steps; None for the model's own number. Beyond it the last step is repeated."""
    threshold: float = 0.0
    """Activations below this many times their layer's root mean square become 0."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be above 0, got {value}"
            for name, value in (("penalty", self.penalty), ("step_size", self.step_size))
            if not (value > 0 and math.isfinite(value))
        ]
        if self.steps is not None and self.steps < 1:
            problems.append(f"steps must be at least 1, got {self.steps}")
        if not (self.threshold >= 0 and math.isfinite(self.threshold)):
            problems.append(f"threshold must be 0 or more, got {self.threshold}")
        if problems:
            raise CrateError("unusable setting of the dial: " + "; ".join(problems))

    @property
    def changes_ista(self) -> bool:
        """Whether the penalty, the step size or the number of steps differs from the model's."""
        return (self.penalty, self.step_size, self.steps) != (1.0, 1.0, None)


@contextlib.contextmanager
def dialled(model: nn.Module, setting: Setting, *, scales: Mapping[str, float] | None = None) -> Iterator[None]:
    """Run the model at a setting inside the block; `forward` and the weights stay as they are.

    `scales` is the root mean square of each tap's activations (`activation_scales`), for a threshold. Raises CrateError
    if the setting changes ISTA and the model has no ISTA block, or has a penalty of 0, which no factor changes.
    """
    blocks = [part for part in model.modules() if isinstance(part, Shrinkage)]
    if setting.changes_ista and not blocks:
        raise CrateError(
            "this model has no ISTA block, so it has no penalty, step size or steps to change. Use --threshold"
        )
    if setting.penalty != 1 and any(part.log_penalties is None and part.penalty == 0 for part in blocks):
        raise CrateError("this model has a penalty of 0, and any multiple of it is 0. Use --threshold")
    with contextlib.ExitStack() as stack:
        if setting.changes_ista:
            for block in blocks:
                stack.callback(block.register_forward_hook(_scale_shrinkage(setting)).remove)
        if setting.threshold > 0:
            assert scales is not None, "a threshold is in units of the activations' scale"
            cuts = {tap: _cut(setting.threshold * scale) for tap, scale in scales.items()}
            stack.enter_context(edit(model, cuts))
        yield


def _scale_shrinkage(setting: Setting) -> Any:
    def scale(_module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        step_sizes, thresholds = output
        steps = setting.steps or len(step_sizes)
        which = torch.arange(steps, device=step_sizes.device).clamp(max=len(step_sizes) - 1)
        return setting.step_size * step_sizes[which], setting.step_size * setting.penalty * thresholds[which]

    return scale


def _cut(least: float) -> Any:
    return lambda code: code * (code.abs() >= least)


@torch.inference_mode()
def activation_scales(model: LanguageModel, tokens: Integer[np.ndarray, " stream"]) -> dict[str, float]:
    """The root mean square of each layer's activations, zeros included, over one batch of whole contexts."""
    return {tap: float(code.double().square().mean().sqrt()) for tap, code in _codes(model, tokens).items()}


@torch.inference_mode()
def active_neurons(model: LanguageModel, tokens: Integer[np.ndarray, " stream"]) -> list[float]:
    """L0: the mean number of active neurons per token in each layer, over one batch of whole contexts."""
    codes = _codes(model, tokens)
    return [float((codes[tap] != 0).double().sum(dim=-1).mean()) for tap in model.neuron_taps]


def _codes(model: LanguageModel, tokens: Integer[np.ndarray, " stream"]) -> dict[str, Tensor]:
    """Tap -> its code, over one batch of whole contexts."""
    context = model.config.context_length
    whole = len(tokens) // context * context
    if whole == 0:
        raise CrateError(f"--tokens must be at least the model's context of {context}, got {len(tokens)}")
    rows = torch.from_numpy(tokens[:whole].astype(np.int64)).view(-1, context).to(model.device)
    with capture(model, model.neuron_taps) as codes:
        model.features(rows)
    return codes
