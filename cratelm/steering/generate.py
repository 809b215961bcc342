"""Read and continue texts with neurons turned, by our models and Hugging Face ones alike, with and without a cache."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cratelm.errors import CrateError
from cratelm.model.generate import Reader, check_sampling, sample
from cratelm.model.language_model import LanguageModel
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
    model = unwrapped(model)
    longest = tokens.shape[1] + max_new_tokens
    reader: Reader | ForeignReader
    if isinstance(model, LanguageModel):
        reader = Reader(model, longest=longest, mask=mask, slide=slide, use_cache=use_cache)
    else:
        reader = ForeignReader(model, mask=mask, slide=slide, use_cache=use_cache)
    generator = torch.Generator(tokens.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    text = Text(tokens, mask)
    with steer(
        model, changes, text=text, positions=positions, coders=coders, keep_error=keep_error, control=control
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
    model = unwrapped(model)
    check_length(model, tokens.shape[1])
    with steer(
        model, changes, text=Text(tokens, mask), positions=positions, coders=coders, keep_error=keep_error,
        control=control,
    ):  # fmt: skip
        if isinstance(model, LanguageModel):
            logits = model.last_logits(tokens, mask=mask)
        else:
            logits = ForeignReader(model, mask=mask, slide=1, use_cache=False).logits(tokens)
    return check_finite(logits, changes)


def all_logits(model: nn.Module, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
    """Logits after every token, by our models and Hugging Face ones alike."""
    model = unwrapped(model)
    check_length(model, tokens.shape[1])
    return model(tokens) if isinstance(model, LanguageModel) else model(input_ids=tokens, use_cache=False).logits


def unwrapped(model: nn.Module) -> nn.Module:
    """The `LanguageModel` inside a `CrateForCausalLM`; any other model itself."""
    inside = getattr(model, "model", None)
    return inside if isinstance(inside, LanguageModel) else model


def context_length(model: nn.Module) -> int | None:
    """The most tokens a pass can read; None where nothing says so."""
    config: Any = model.config
    if isinstance(model, LanguageModel):
        return model.config.context_length
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_length(model: nn.Module, length: int) -> None:
    """Refuse a text that is longer than the model's context."""
    limit = context_length(model)
    if limit is not None and length > limit:
        raise CrateError(f"the prompt has {length} tokens, the model's context is {limit}. Shorten it")
    if length < 1:
        raise CrateError("the prompt is empty. Give at least one token")


def check_finite(logits: Float[Tensor, "batch vocab"], changes: Sequence[Change]) -> Float[Tensor, "batch vocab"]:
    """Refuse logits that are infinite or no numbers, naming the changes they come from."""
    if not bool(logits.isfinite().all()):
        made = ", ".join(map(str, changes)) or "no change"
        raise CrateError(f"the logits are not finite with {made}. Use a smaller strength, such as 2x")
    return logits


class ForeignReader:
    """Logits after a text that grows, from a Hugging Face model: the counterpart of `model.generate.Reader`.

    Once the context is full the oldest `slide` tokens are forgotten and the rest is read again, as there.
    """

    def __init__(self, model: Any, *, mask: Bool[Tensor, "batch seq"] | None, slide: int, use_cache: bool) -> None:
        self.model, self.slide, self.use_cache = model, slide, use_cache
        self.mask = None if mask is None or bool(mask.all()) else mask
        if mask is not None and not bool(mask[:, -1].all()):
            raise CrateError("a prompt ends in padding. Pad on the left, and give mask=False there")
        self.context = context_length(model) or 1 << 60
        if not 1 <= slide <= self.context:
            raise CrateError(f"slide is {slide}, possible are 1 to the context, {self.context}")
        self.accepted = set(inspect.signature(model.forward).parameters)
        self.start: int | None = None
        self.past: Any = None
        self.read = 0

    def logits(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch vocab"]:
        """Logits after all of `tokens`, which begin with those of the last call."""
        count = tokens.shape[1]
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, count - self.mask.shape[1]), value=True)
        if self.start is None:
            self.start = self.read = max(0, count - self.context)
        elif count - self.start > self.context:
            self.start = self.read = count - (self.context - self.slide + 1)
            self.past = None
        new = tokens[:, self.read :]
        options: dict[str, Any] = {"use_cache": self.use_cache}
        if self.past is not None:
            options["past_key_values"] = self.past
        if self.mask is not None:
            real = self.mask[:, self.start :]
            options["attention_mask"] = real.long()
            if "position_ids" in self.accepted:
                options["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        if "logits_to_keep" in self.accepted:
            options["logits_to_keep"] = 1
        output = self.model(input_ids=new, **options)
        if self.use_cache:
            self.past, self.read = output.past_key_values, count
        return output.logits[:, -1].float()
