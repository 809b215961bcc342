"""One interface to every causal language model: ours, and those of Hugging Face's `transformers`.

`causal_model(module)` chooses the implementation. Code outside `model/` gets logits, losses, the context length and the
cost from this adapter, so it need not know which kind of model it has.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from cratelm.activations.hugging_face_reader import HuggingFaceReader
from cratelm.activations.places import (
    attention_widths,
    decoders,
    find_places,
    map_directions,
    num_layers,
    stopping_after,
    vocabulary_rows,
)  # fmt: skip
from cratelm.activations.taps import INPUT, find_tap
from cratelm.data.special_tokens import LED_BY_END_OF_TEXT, SpecialTokens, special_tokens
from cratelm.errors import CrateError
from cratelm.model.generate import Reader, TextReader
from cratelm.model.language_model import LanguageModel
from cratelm.model.loss import rows_at_once

USUAL_CONTEXT = 1024
"""Default tokens per row of a Hugging Face model: the paper's context. The model may accept 131072 tokens."""

LossesFrom = Callable[[int, Float[Tensor, "batch seq d_model"], Int[Tensor, "batch seq"]], Tensor]
"""(layer, the stream that its block reads, targets) -> cross-entropy of every target, in nats."""


class CausalModel(ABC):
    """A causal language model: token ids to logits, whatever library its module comes from."""

    has_known_parts: bool
    """Whether its blocks, norms and embedding have the names of `cratelm.model`; if not, they are searched for."""

    def __init__(
        self, module: nn.Module, tokenizer: Tokenizer | None = None, special: SpecialTokens | None = None
    ) -> None:  # fmt: skip
        """`special` are the tokens that begin and end texts, by default what the tokenizer alone shows."""
        self.module, self.tokenizer = module, tokenizer
        if special is None and tokenizer is not None:
            special = special_tokens(tokenizer, post_processor=not self.has_known_parts)
        self.special = special or SpecialTokens()

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """Longest sequence a forward pass accepts, in tokens; None if the configuration does not say."""

    @property
    def usual_context(self) -> int:
        """Tokens per row by default: the context length, for a Hugging Face model at most `USUAL_CONTEXT`."""
        return min(self.context_length or USUAL_CONTEXT, USUAL_CONTEXT)

    @property
    def vocabulary_rows(self) -> int:
        """Number of token ids that have an embedding."""
        return vocabulary_rows(self.module)

    @property
    def num_layers(self) -> int:
        return num_layers(self.module)

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Trainable numbers without position embeddings, a tied head counted once, as the paper counts."""

    @property
    @abstractmethod
    def flops_per_token(self) -> int:
        """Floating-point operations per token of a forward pass at full context."""

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """Layers, width, heads, neurons, vocabulary and context as `run.json` records them."""

    def places(self, tap: str = "neurons") -> dict[int, str]:
        """Layer -> module path of a tap (`places.find_places`)."""
        return find_places(self.module, tap)

    def directions(self, places: Mapping[int, str]) -> dict[int, Float[Tensor, "neurons d_model"]] | None:
        """Decoder directions of the neurons at these places; None if one of them has none."""
        return decoders(self.module, places)

    def row_length(self, requested: int | None = None) -> int:
        """Tokens per row: `requested` if given, otherwise `usual_context`. Raises CrateError beyond the context."""
        limit = self.context_length or 1 << 30
        if requested is not None and not 1 <= requested <= limit:
            raise CrateError(f"--context must be 1 to {limit} tokens (the model's context), got {requested}")
        return requested or self.usual_context

    def check_length(self, length: int) -> None:
        """Raise CrateError for an empty text and for one longer than the context."""
        limit = self.context_length
        if limit is not None and length > limit:
            raise CrateError(f"the prompt has {length} tokens, the model's context is {limit}. Shorten it")
        if length < 1:
            raise CrateError("the prompt is empty. Give at least one token")

    @property
    @abstractmethod
    def row_beginning(self) -> tuple[int, ...] | None:
        """Tokens before every row that the model reads, in mid-document too; empty for a family without any.

        None: end-of-text stands before each document, as in the model's training; other rows begin mid-document.
        """

    @property
    def text_beginning(self) -> tuple[int, ...]:
        """Tokens before a text: the beginning of a row, or the end-of-text token that leads a document."""
        return self.end_tokens if self.row_beginning is None else self.row_beginning

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The end-of-text token; empty if the tokenizer has none."""
        return () if self.special.end is None else (self.special.end,)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, after `text_beginning`. Raises CrateError for an empty text."""
        assert self.tokenizer is not None, "a text needs the model's tokenizer"
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not tokens:
            raise CrateError("the prompt is empty. Give some text with --prompt")
        return [*self.text_beginning, *tokens]

    def logits(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next token at every position."""
        self.check_length(tokens.shape[1])
        return self._logits(tokens)

    @abstractmethod
    def _logits(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]: ...

    @abstractmethod
    def last_logits(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch vocab"]:
        """Logits of the token after the last, in float32; `mask` is False at padding, on the left."""

    @abstractmethod
    def token_losses(
        self, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """Cross-entropy of every target, in nats."""

    @property
    def losses_from(self) -> "LossesFrom | None":
        """Token losses of the blocks from a given layer on, run on a given stream; None if they cannot run alone."""
        return None

    @abstractmethod
    def streams_around(self, last: int) -> dict[str, str] | None:
        """Name -> tap of every term that is added to the residual stream around the neurons of layer `last`.

        None if the terms are known only as a sum.
        """

    @abstractmethod
    def reader(
        self, *, longest: int, mask: Bool[Tensor, "batch seq"] | None, slide: int, use_cache: bool
    ) -> TextReader:
        """A reader of a growing text of at most `longest` tokens; `model.generate.TextReader` explains `slide`."""

    def read(self, tokens: Int[Tensor, "batch seq"], places: Collection[str]) -> None:
        """Run a forward pass through all places (for hooks there), without the head and the layers behind them."""
        with stopping_after(self.module, places):
            self._read(tokens, places)

    @abstractmethod
    def _read(self, tokens: Int[Tensor, "batch seq"], places: Collection[str]) -> object: ...


class OwnModel(CausalModel):
    """A `LanguageModel` of this package."""

    has_known_parts = True
    module: LanguageModel

    @property
    def row_beginning(self) -> tuple[int, ...] | None:
        return self.special.begin or None

    @property
    def context_length(self) -> int:
        return self.module.config.context_length

    @property
    def usual_context(self) -> int:
        return self.context_length

    @property
    def num_parameters(self) -> int:
        return self.module.config.num_parameters

    @property
    def flops_per_token(self) -> int:
        return self.module.config.flops_per_token()

    def shape(self) -> dict[str, Any]:
        return self.module.config.as_dict()

    def _logits(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        return self.module(tokens)

    def last_logits(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch vocab"]:
        return self.module.last_logits(tokens, mask=mask)

    def token_losses(
        self, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        return self.module.token_losses(tokens, targets)

    @property
    def losses_from(self) -> "LossesFrom":
        return self.module.losses_from

    def streams_around(self, last: int) -> dict[str, str]:
        config = self.module.config
        if config.arch == "crate" and not config.ista_residual:
            return {}
        attention, neurons = ("mssa", "ista") if config.arch == "crate" else ("attention", "mlp")
        taps = {"embeddings": f"blocks.0{INPUT}"}
        for layer in range(last + 1):
            taps[f"attention of layer {layer}"] = f"blocks.{layer}.{attention}"
            if layer < last:
                taps[f"neurons of layer {layer}"] = f"blocks.{layer}.{neurons}"
        return taps

    def reader(
        self, *, longest: int, mask: Bool[Tensor, "batch seq"] | None, slide: int, use_cache: bool
    ) -> TextReader:
        return Reader(self.module, longest=longest, mask=mask, slide=slide, use_cache=use_cache)

    def _read(self, tokens: Int[Tensor, "batch seq"], places: Collection[str]) -> object:  # noqa: ARG002
        return self.module.features(tokens)


class HuggingFaceModel(CausalModel):
    """Any causal language model of `transformers`."""

    has_known_parts = False
    module: Any

    @property
    def row_beginning(self) -> tuple[int, ...] | None:
        return self.special.begin or (None if self._config("model_type") in LED_BY_END_OF_TEXT else ())

    @property
    def context_length(self) -> int | None:
        return self._config("max_position_embeddings") or None

    @property
    def num_parameters(self) -> int:
        modules = self.module.modules()
        embeddings = [part.weight for part in modules if isinstance(part, nn.Embedding)]
        positions = [weight.numel() for weight in embeddings if len(weight) != self.vocabulary_rows]
        return sum(weight.numel() for weight in self.module.parameters()) - sum(positions)

    @property
    def flops_per_token(self) -> int:
        """An estimate: 2 per weight and multiply-add.

            2 (weights of all matrices + vocabulary x width of a tied head) + 4 context x width of the heads, per layer

        Every matrix counts as used by every token, so for a mixture of experts it is an upper bound. An attention that
        is not recognised counts 0.
        """
        embeddings = {id(part.weight) for part in self.module.modules() if isinstance(part, nn.Embedding)}
        matrices = [weight for weight in self.module.parameters() if weight.ndim >= 2]
        head = self.module.get_output_embeddings()
        tied = head.weight.numel() if head is not None and id(head.weight) in embeddings else 0
        attention = 0
        with contextlib.suppress(CrateError):
            attention = 4 * (self.context_length or 0) * sum(attention_widths(self.module))
        return 2 * (sum(weight.numel() for weight in matrices if id(weight) not in embeddings) + tied) + attention

    def shape(self) -> dict[str, Any]:
        neurons = None
        with contextlib.suppress(CrateError, IndexError):
            neurons = [len(rows) for rows in (map_directions(self.module, self.places()) or {}).values()][0]
        return {
            "num_layers": self.num_layers, "d_model": self._config("hidden_size"),
            "num_heads": self._config("num_attention_heads"), "num_neurons": neurons,
            "vocab_size": self.vocabulary_rows, "context_length": self._config("max_position_embeddings"),
        }  # fmt: skip

    def _config(self, name: str) -> Any:
        """A setting, by the name that all models of `transformers` share."""
        return getattr(self.module.config.get_text_config(), name, None)

    def _logits(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        return self.module(input_ids=tokens, use_cache=False).logits

    def last_logits(
        self, tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch vocab"]:
        return self.reader(longest=tokens.shape[1], mask=mask, slide=1, use_cache=False).logits(tokens)

    def token_losses(
        self, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        logits = self.logits(tokens)
        rows = rows_at_once(logits.shape[-1], logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        chunks = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
        losses = [F.cross_entropy(chunk.to(wide), target, reduction="none") for chunk, target in chunks]
        return torch.cat(losses).view(targets.shape)

    def streams_around(self, last: int) -> None:  # noqa: ARG002
        return None

    def reader(
        self, *, longest: int, mask: Bool[Tensor, "batch seq"] | None, slide: int, use_cache: bool  # noqa: ARG002
    ) -> TextReader:  # fmt: skip
        return HuggingFaceReader(self.module, self.context_length, mask=mask, slide=slide, use_cache=use_cache)

    def _read(self, tokens: Int[Tensor, "batch seq"], places: Collection[str]) -> object:
        body = self.module.base_model
        inside = set(body.modules())
        return body(tokens) if all(find_tap(self.module, place) in inside for place in places) else self.module(tokens)


def causal_model(
    module: nn.Module, tokenizer: Tokenizer | None = None, special: SpecialTokens | None = None
) -> CausalModel:
    """The adapter of a model; of a `CrateForCausalLM`, the adapter of the `LanguageModel` inside."""
    inside = getattr(module, "model", None)
    if isinstance(inside, LanguageModel):
        module = inside
    adapter = OwnModel if isinstance(module, LanguageModel) else HuggingFaceModel
    return adapter(module, tokenizer, special)
