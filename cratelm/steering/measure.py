"""Measure an intervention: its effect on the next token and on a text's loss, next to the effect of its controls."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cratelm.errors import CrateError
from cratelm.model.generate import pad_left
from cratelm.steering.effects import Effect, Steered
from cratelm.steering.generate import all_logits, check_finite, next_logits
from cratelm.steering.intervention import NO_INTERVENTION, Control, Intervention
from cratelm.steering.positions import Text
from cratelm.steering.steer import steer

MATCHES = 10
"""The matched neuron is drawn from this many neurons that are most similar to the steered one."""
TEXTS_AT_ONCE = 16


def next_token_effect(
    model: nn.Module, texts: Sequence[Sequence[int]], intervention: Intervention, baseline: Intervention | None = None
) -> Effect:
    """Probabilities of the token after each text, without and with the intervention, averaged over the texts.

    `texts` are token ids, none longer than the model's context. Both sides run in the same batches. The baseline is
    `intervention.baseline` by default, so that a dropped autoencoder error does not count as an effect of the changes.
    """
    baseline = intervention.baseline if baseline is None else baseline
    device = next(model.parameters()).device
    sums: list[Tensor] = []
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        tokens, mask = pad_left(texts[first : first + TEXTS_AT_ONCE], device=device)
        padding = None if bool(mask.all()) else mask
        before, after = (
            next_logits(model, tokens, side, mask=padding).double().log_softmax(-1) for side in (baseline, intervention)
        )
        p, q = before.exp(), after.exp()
        divergence = (q * (after - before)).sum(-1)
        sums.append(torch.stack([p.sum(0), q.sum(0), (q - p).square().sum(0), divergence.sum().expand_as(p[0])]))
    p, q, squares, divergence = (torch.stack(sums).sum(0) / len(texts)).cpu().numpy()
    variance = np.maximum(squares - (q - p) ** 2, 0) / max(len(texts) - 1, 1)
    return Effect(
        before=p, after=q, spread=np.sqrt(variance) if len(texts) > 1 else np.zeros_like(p),
        divergence=max(float(divergence[0]), 0.0), texts=len(texts),
    )  # fmt: skip


def steered_effect(
    model: nn.Module, texts: Sequence[Sequence[int]], intervention: Intervention, *,
    matched: Intervention | None = None, seed: int = 0,
) -> Steered:  # fmt: skip
    """The effect of an intervention on the next token, and of each control.

    `matched` applies the same changes to control neurons (`draw_matched_neuron`). If the autoencoders' errors are
    dropped, all effects are relative to the reconstruction, whose own effect is measured separately.
    """

    def effect(intervention: Intervention, control: Control | None = None) -> Effect:
        return next_token_effect(model, texts, replace(intervention, control=control))

    controls = [("opposite sign", effect(intervention, Control(kind="opposite")))]
    if matched is not None and matched.changes:
        name = "matched neuron " + ", ".join(change.name for change in matched.changes)
        controls.insert(0, (name, effect(matched)))
    controls.append(("random direction", effect(intervention, Control(kind="random-direction", seed=seed))))
    reconstruction = None
    if intervention.coders and not intervention.keep_error:
        reconstruction = next_token_effect(model, texts, intervention.baseline, NO_INTERVENTION)
    return Steered(
        changes=tuple(map(str, intervention.changes)), effect=effect(intervention), controls=tuple(controls),
        reconstruction=reconstruction,
    )  # fmt: skip


def draw_matched_neuron(
    lengths: Float[np.ndarray, " neurons"], index: int, density: Float[np.ndarray, " neurons"] | None, *,
    avoid: Sequence[int] = (), seed: int = 0,
) -> int:  # fmt: skip
    """Draw a control neuron that resembles neuron `index` in the length of its decoder direction and in density.

    It is drawn from the ten nearest by |log ratio of lengths| + |log ratio of densities|, among neurons that fire.
    Without densities only the lengths count. `lengths` and `density` cover the whole layer.
    """
    log_lengths = np.log(np.maximum(lengths, 1e-12))
    distance = np.abs(log_lengths - log_lengths[index])
    if density is not None:
        fires = density > 0
        log_density = np.log(np.where(fires, density, 1).astype(np.float64))
        center = log_density[index] if fires[index] else log_density[fires].min(initial=0)
        distance = distance + np.where(fires, np.abs(log_density - center), np.inf)
    distance[[index, *avoid]] = np.inf
    nearest = np.argsort(distance, kind="stable")[:MATCHES]
    nearest = nearest[np.isfinite(distance[nearest])]
    if len(nearest) == 0:
        raise CrateError(f"neuron {index} needs a control, but no other neuron of its layer fires")
    return int(np.random.default_rng([seed, index]).choice(nearest))


@torch.inference_mode()
def text_loss(
    model: nn.Module, tokens: Int[Tensor, "batch seq"], intervention: Intervention = NO_INTERVENTION
) -> float:
    """Mean cross-entropy of the tokens after the first, in nats, under the intervention."""
    if tokens.shape[1] < 2:
        raise CrateError("the loss of a text needs at least 2 tokens, got 1")
    with steer(model, intervention, text=Text(tokens)):
        logits = all_logits(model, tokens)
    check_finite(logits[:, -1], intervention)
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()))


@torch.inference_mode()
def continuation_loss(model: nn.Module, tokens: Int[Tensor, "1 seq"], prompt: int) -> float:
    """Mean cross-entropy, in nats, of the tokens after the first `prompt` tokens under the unchanged model."""
    if tokens.shape[1] <= prompt:
        return float("nan")
    logits = all_logits(model, tokens)[0, prompt - 1 : -1]
    return float(F.cross_entropy(logits.double(), tokens[0, prompt:]))
