"""Logits after a text that grows, from a Hugging Face model."""

import inspect
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from cratelm.model.generate import TextReader


class HuggingFaceReader(TextReader):
    """Reads tokens with a model of `transformers` and its key-value cache."""

    def __init__(
        self, module: Any, context: int | None, *, mask: Bool[Tensor, "batch seq"] | None, slide: int, use_cache: bool
    ) -> None:
        super().__init__(context or 1 << 60, mask=mask, slide=slide)
        self.module, self.use_cache = module, use_cache
        self.accepted = set(inspect.signature(self.module.forward).parameters)
        self.past: Any = None
        self.num_read = 0

    def forget(self) -> None:
        """Drop the cache."""
        self.past = None

    def read(self, tokens: Int[Tensor, "batch seq"], start: int) -> Float[Tensor, "batch vocab"]:
        """Logits after the tokens from index `start` on."""
        new = tokens[:, start if self.past is None else self.num_read :]
        options: dict[str, Any] = {"use_cache": self.use_cache}
        if self.past is not None:
            options["past_key_values"] = self.past
        if self.mask is not None:
            real = self.mask[:, start:]
            options["attention_mask"] = real.long()
            if "position_ids" in self.accepted:
                options["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
        if "logits_to_keep" in self.accepted:
            options["logits_to_keep"] = 1
        output = self.module(input_ids=new, **options)
        if self.use_cache:
            self.past, self.num_read = output.past_key_values, tokens.shape[1]
        return output.logits[:, -1].float()
