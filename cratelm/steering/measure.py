"""Measure what turning neurons does: to the next token, to a text's loss, and beside it what controls do."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cratelm.errors import CrateError
from cratelm.model.generate import pad_left
from cratelm.steering.changes import Change
from cratelm.steering.effects import Effect, Steered
from cratelm.steering.generate import all_logits, check_finite, next_logits
from cratelm.steering.place import SparseCoder, neuron_places
from cratelm.steering.positions import EVERYWHERE, Positions, Text
from cratelm.steering.steer import Control, steer

MATCHES = 10
"""A control neuron is drawn from so many that are most like the changed one."""
TEXTS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class How:
    """Everything about a steering but the changes themselves."""

    positions: Positions = EVERYWHERE
    coders: tuple[SparseCoder, ...] = ()
    keep_error: bool = True


PLAIN = How()


def next_token_effect(
    model: nn.Module, texts: Sequence[Sequence[int]], changes: Sequence[Change], how: How = PLAIN,
    control: Control | None = None,
) -> Effect:  # fmt: skip
    """Probabilities of the token after each text, without and with the changes, averaged over the texts.

    `texts` are token ids, none longer than the model's context. Both sides run in one and the same batches. Where an
    autoencoder's error is dropped it is dropped on both sides, so that the effect is that of the changes alone.
    """
    base = PLAIN if how.keep_error else how
    return _effect(model, texts, base, how, changes, control)


def reconstruction_effect(model: nn.Module, texts: Sequence[Sequence[int]], how: How) -> Effect:
    """What putting the autoencoders' reconstructions in the place of activations does, nothing else being changed."""
    return _effect(model, texts, PLAIN, replace(how, keep_error=False), (), None)


def _effect(
    model: nn.Module, texts: Sequence[Sequence[int]], base: How, how: How, changes: Sequence[Change],
    control: Control | None,
) -> Effect:  # fmt: skip
    """The model with `changes` in one way of running it, against the model without changes in another (`base`)."""
    device = next(model.parameters()).device
    sums: list[Tensor] = []
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        tokens, mask = pad_left(texts[first : first + TEXTS_AT_ONCE], device=device)
        given = None if bool(mask.all()) else mask
        before = next_logits(
            model, tokens, coders=base.coders, keep_error=base.keep_error, mask=given
        ).double().log_softmax(-1)  # fmt: skip
        after = next_logits(
            model, tokens, changes=changes, positions=how.positions, coders=how.coders, keep_error=how.keep_error,
            control=control, mask=given,
        ).double().log_softmax(-1)  # fmt: skip
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
    model: nn.Module, texts: Sequence[Sequence[int]], changes: Sequence[Change], how: How = PLAIN, *,
    matched: Sequence[Change] | None = None, seed: int = 0,
) -> Steered:  # fmt: skip
    """What changes do to the next token, with the same measured for each control beside it.

    `matched` are the changes of the control neurons that `matched_neuron` found, if there are any. Where an
    autoencoder's error is dropped all are measured against its reconstruction, and what that alone does stands beside.
    """
    controls = [("opposite sign", next_token_effect(model, texts, changes, how, Control(kind="opposite")))]
    if matched:
        name = "matched neuron " + ", ".join(one.name for one in matched)
        controls.insert(0, (name, next_token_effect(model, texts, matched, how)))
    random = Control(kind="random-direction", seed=seed)
    controls.append(("random direction", next_token_effect(model, texts, changes, how, random)))
    return Steered(
        changes=tuple(map(str, changes)), effect=next_token_effect(model, texts, changes, how),
        controls=tuple(controls),
        reconstruction=None if how.keep_error or not how.coders else reconstruction_effect(model, texts, how),
    )  # fmt: skip


def matched_neuron(
    model: nn.Module, layer: int, index: int, density: Float[np.ndarray, " neurons"] | None, *,
    avoid: Sequence[int] = (), seed: int = 0,
) -> int:  # fmt: skip
    """A random neuron of the same layer that is like this one: in the length of its direction and in its density.

    Drawn from the ten nearest by |log ratio| of lengths plus |log ratio| of densities, among those that ever fire.
    Without densities (of all neurons, as the records have them) the length alone decides.
    """
    lengths = neuron_places(model)[layer].directions.double().norm(dim=1).cpu().numpy()
    return matched_row(lengths, index, density, avoid=avoid, seed=seed)


def matched_row(
    lengths: Float[np.ndarray, " neurons"], index: int, density: Float[np.ndarray, " neurons"] | None, *,
    avoid: Sequence[int] = (), seed: int = 0,
) -> int:  # fmt: skip
    """`matched_neuron` from the lengths of all directions."""
    logarithm = np.log(np.maximum(lengths, 1e-12))
    distance = np.abs(logarithm - logarithm[index])
    if density is not None:
        fires = density > 0
        rates = np.log(np.where(fires, density, 1).astype(np.float64))
        own = rates[index] if fires[index] else rates[fires].min(initial=0)
        distance = distance + np.where(fires, np.abs(rates - own), np.inf)
    distance[[index, *avoid]] = np.inf
    nearest = np.argsort(distance, kind="stable")[:MATCHES]
    nearest = nearest[np.isfinite(distance[nearest])]
    if len(nearest) == 0:
        raise CrateError(f"no other neuron of the layer fires, so there is no control for neuron {index}")
    return int(np.random.default_rng([seed, index]).choice(nearest))


@torch.inference_mode()
def text_loss(
    model: nn.Module, tokens: Int[Tensor, "batch seq"], changes: Sequence[Change] = (), how: How = PLAIN
) -> float:
    """Mean cross-entropy of a text's tokens after the first, in nats, with the changes made."""
    if tokens.shape[1] < 2:
        raise CrateError("a text of one token has no loss. Give a longer one")
    with steer(
        model, changes, text=Text(tokens), positions=how.positions, coders=how.coders, keep_error=how.keep_error
    ):
        logits = all_logits(model, tokens)
    check_finite(logits[:, -1], changes)
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()))


@torch.inference_mode()
def continuation_loss(model: nn.Module, tokens: Int[Tensor, "1 seq"], prompt: int) -> float:
    """What the unchanged model pays for a token after the first `prompt` ones of a text, in nats on average."""
    if tokens.shape[1] <= prompt:
        return float("nan")
    logits = all_logits(model, tokens)[0, prompt - 1 : -1]
    return float(F.cross_entropy(logits.double(), tokens[0, prompt:]))
