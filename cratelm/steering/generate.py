"""Read and continue texts with neurons turned, by our models and Hugging Face ones alike, with and without a cache."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cratelm.activations.causal_model import causal_model
from cratelm.errors import CrateError
from cratelm.model.generate import check_sampling, sample
from cratelm.steering.changes import Change
from cratelm.steering.place import SparseCoder
from cratelm.steering.positions import EVERYWHERE, Positions, Text
from cratelm.steering.steer import Control, steer

Step = Callable[[Int[Tensor, " batch"], Float[Tensor, "batch vocab"]], None]
"""Called with each new token of every row and the logits that it was drawn from."""


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokens: Int[Tensor, "batch seq"],
    max_new_tokens: int,
    *,
    changes: Sequence[Change] = (),
    positions: Positions = EVERYWHERE,
    coders: Sequence[SparseCoder] = (),
    keep_error: bool = True,
    control: Control | None = None,
    mask: Bool[Tensor, "batch seq"] | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    seed: int | None = None,
    slide: int = 1,
    use_cache: bool = True,
    on_step: Step | None = None,
) -> Int[Tensor, "batch longer"]:
    """Continue each sequence with the changes made; without any, the model's own text.

    The options are those of `LanguageModel.generate` and of `steer`. Positions are those of the whole text, so what is
    changed does not depend on the cache or on where the context has slid to. `on_step` is called as tokens are made,
    for streaming. Raises `CrateError` where the changes give logits that are not finite.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    causal = causal_model(model)
    longest = tokens.shape[1] + max_new_tokens
    reader = causal.reader(longest=longest, mask=mask, slide=slide, use_cache=use_cache)
    generator = torch.Generator(tokens.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    text = Text(tokens, mask)
    with steer(
        causal.module, changes, text=text, positions=positions, coders=coders, keep_error=keep_error, control=control
    ):  # fmt: skip
        for _ in range(max_new_tokens):
            logits = check_finite(reader.logits(text.tokens), changes)
            new = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            text.append(new)
            if on_step is not None:
                on_step(new, logits)
    return text.tokens


@torch.inference_mode()
def next_logits(
    model: nn.Module,
    tokens: Int[Tensor, "batch seq"],
    *,
    changes: Sequence[Change] = (),
    positions: Positions = EVERYWHERE,
    coders: Sequence[SparseCoder] = (),
    keep_error: bool = True,
    control: Control | None = None,
    mask: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Logits of the token after each text, in float32, with the changes made. Texts are padded on the left."""
    causal = causal_model(model)
    causal.check_length(tokens.shape[1])
    with steer(
        causal.module, changes, text=Text(tokens, mask), positions=positions, coders=coders, keep_error=keep_error,
        control=control,
    ):  # fmt: skip
        logits = causal.last_logits(tokens, mask)
    return check_finite(logits, changes)


def all_logits(model: nn.Module, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
    """Logits after every token."""
    return causal_model(model).logits(tokens)


def check_finite(logits: Float[Tensor, "batch vocab"], changes: Sequence[Change]) -> Float[Tensor, "batch vocab"]:
    """Refuse logits that are infinite or no numbers, naming the changes they come from."""
    if not bool(logits.isfinite().all()):
        made = ", ".join(map(str, changes)) or "no change"
        raise CrateError(f"the logits are not finite with {made}. Use a smaller strength, such as 2x")
    return logits
