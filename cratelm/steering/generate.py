"""Generate text and read logits under an intervention, for `LanguageModel`s and Hugging Face models alike."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cratelm.activations.causal_model import causal_model
from cratelm.errors import CrateError
from cratelm.model.generate import check_sampling, sample
from cratelm.steering.intervention import NO_INTERVENTION, Intervention
from cratelm.steering.positions import Text
from cratelm.steering.steer import apply_edits, steer, steering_edits

OnStep = Callable[[Int[Tensor, " batch"], Float[Tensor, "batch vocab"]], None]
"""Called with the new token of every row and the logits that it was drawn from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """How tokens are drawn; the meaning of each field is that of `LanguageModel.generate`."""

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int | None = None
    seed: int | None = None
    slide: int = 1
    """Tokens that are dropped at once when the context is full."""
    use_cache: bool = True


class Continuation:
    """Continue a text one token at a time under an intervention.

    Positions count in the whole text, so the changes depend neither on the cache nor on where the context has slid to.
    """

    def __init__(
        self, model: nn.Module, tokens: Int[Tensor, "batch seq"], max_new_tokens: int, intervention: Intervention,
        decoding: Decoding, mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> None:  # fmt: skip
        check_sampling(temperature=decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p)
        causal = causal_model(model)
        self.model, self.intervention, self.decoding = causal.module, intervention, decoding
        self.text = Text(tokens, mask)
        self._edits = steering_edits(self.model, intervention, self.text)
        self._reader = causal.reader(
            longest=tokens.shape[1] + max_new_tokens, mask=mask, slide=decoding.slide, use_cache=decoding.use_cache
        )
        self._generator = torch.Generator(tokens.device)
        if decoding.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(decoding.seed)

    @torch.inference_mode()
    def step(self) -> tuple[Int[Tensor, " batch"], Float[Tensor, "batch vocab"]]:
        """Append one token to each row; return the tokens and the logits that they were drawn from."""
        options = self.decoding
        with apply_edits(self.model, self._edits):
            logits = check_finite(self._reader.logits(self.text.tokens), self.intervention)
        new = sample(
            logits, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
            generator=self._generator,
        )  # fmt: skip
        self.text.append(new)
        return new, logits


def generate(
    model: nn.Module,
    tokens: Int[Tensor, "batch seq"],
    max_new_tokens: int,
    intervention: Intervention = NO_INTERVENTION,
    *,
    decoding: Decoding = Decoding(),
    mask: Bool[Tensor, "batch seq"] | None = None,
    on_step: OnStep | None = None,
) -> Int[Tensor, "batch longer"]:
    """Continue each sequence under the intervention.

    Pad shorter texts on the left and pass `mask`. `on_step` streams the tokens as they are drawn. Raises `CrateError`
    if the intervention makes logits that are not finite.
    """
    continuation = Continuation(model, tokens, max_new_tokens, intervention, decoding, mask)
    for _ in range(max_new_tokens):
        new, logits = continuation.step()
        if on_step is not None:
            on_step(new, logits)
    return continuation.text.tokens


@torch.inference_mode()
def next_logits(
    model: nn.Module,
    tokens: Int[Tensor, "batch seq"],
    intervention: Intervention = NO_INTERVENTION,
    *,
    mask: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch vocab"]:
    """Logits of the token after each text, in float32, under the intervention. Texts are padded on the left."""
    causal = causal_model(model)
    causal.check_length(tokens.shape[1])
    with steer(causal.module, intervention, text=Text(tokens, mask)):
        logits = causal.last_logits(tokens, mask)
    return check_finite(logits, intervention)


def all_logits(model: nn.Module, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
    """Logits after every token."""
    return causal_model(model).logits(tokens)


def check_finite(logits: Float[Tensor, "batch vocab"], intervention: Intervention) -> Float[Tensor, "batch vocab"]:
    """Return the logits; raise `CrateError` if one is inf or NaN, naming the changes."""
    if not bool(logits.isfinite().all()):
        if not intervention.changes:
            raise CrateError(
                "the logits are not finite: the weights of the model are damaged. Hint: another checkpoint"
            )
        raise CrateError(f"the logits are not finite with {intervention}. Use a smaller strength, such as 2x")
    return logits
