"""Logits after a text that grows, from a Hugging Face model."""

import inspect
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cratelm.errors import CrateError


class HuggingFaceReader:
    """The counterpart of `model.generate.Reader` for a model of `transformers`, with its cache.

    When the context is full, the oldest `slide` tokens are dropped and the rest is read again.
    """

    def __init__(
        self, module: Any, context: int | None, *, mask: Bool[Tensor, "batch seq"] | None, slide: int, use_cache: bool
    ) -> None:
        self.module, self.slide, self.use_cache = module, slide, use_cache
        self.mask = None if mask is None or bool(mask.all()) else mask
        if mask is not None and not bool(mask[:, -1].all()):
            raise CrateError("a prompt ends in padding. Pad on the left, and give mask=False there")
        self.context = context or 1 << 60
        if not 1 <= slide <= self.context:
            raise CrateError(f"slide must be 1 to {self.context} (the context), got {slide}")
        self.accepted = set(inspect.signature(self.module.forward).parameters)
        self.start: int | None = None
        self.past: Any = None
        self.num_read = 0

    def logits(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch vocab"]:
        """Logits after all of `tokens`, which begin with those of the last call."""
        count = tokens.shape[1]
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, count - self.mask.shape[1]), value=True)
        if self.start is None:
            self.start = self.num_read = max(0, count - self.context)
        elif count - self.start > self.context:
            self.start = self.num_read = count - (self.context - self.slide + 1)
            self.past = None
        new = tokens[:, self.num_read :]
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
        output = self.module(input_ids=new, **options)
        if self.use_cache:
            self.past, self.num_read = output.past_key_values, count
        return output.logits[:, -1].float()
