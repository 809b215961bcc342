"""The language model around the blocks: embed, blocks, head; the same shell for CRATE and GPT-2."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cratelm.errors import CrateError
from cratelm.model.attention import Normalised, ShiftedKeys
from cratelm.model.config import Architecture, ModelConfig
from cratelm.model.crate import ISTA, CrateBlock, Shrinkage
from cratelm.model.generate import Cache, Reader, check_sampling, sample, spans_of
from cratelm.model.gpt2 import GPT2Block, MeasuredTap
from cratelm.model.loss import mean_loss, token_losses

BLOCKS: dict[Architecture, type[CrateBlock] | type[GPT2Block]] = {"crate": CrateBlock, "gpt2": GPT2Block}


class LanguageModel(nn.Module):
    """Tokens to logits: learned positions, blocks, a final LayerNorm and a head tied to the embedding.

    x = E[token] + P[position],   x = block_1 ... block_L (x),   logits = E LN(x)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(BLOCKS[config.arch](config) for _ in range(config.num_layers))
        final_norm = nn.LayerNorm(config.d_model, bias=config.arch == "crate" or config.bias)
        self.norm = nn.Identity() if config.dictionary == "complete" else final_norm

    @property
    def neuron_taps(self) -> tuple[str, ...]:
        """The module whose output is the code, one per layer: the neurons that the paper explains."""
        return tuple(f"blocks.{layer}.{block.neurons}" for layer, block in enumerate(self.blocks))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def features(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        mask: Bool[Tensor, "batch seq"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """The normalised residual stream that the head reads.

        `mask` is False where a token is padding (on the left); positions count the others. With a cache, `tokens` come
        after those it holds, which they attend to, and are added to it.
        """
        length = tokens.shape[1] + (0 if cache is None else cache.length)
        if length > self.config.context_length:
            raise CrateError(
                f"a sequence of {length} tokens is longer than the model's context of {self.config.context_length}. "
                "Shorten it, or train with a longer --context"
            )
        spans = spans_of(self.config, tokens, mask, cache)
        if spans[0] is None:
            positions = self.positions.weight[:length]
        else:
            positions = self.positions(spans[0].positions[:, -tokens.shape[1] :])
        x = self.embedding(tokens) + positions
        for block, span in zip(self.blocks, spans, strict=True):
            x = block(x, span)
        return self.norm(x)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        mask: Bool[Tensor, "batch seq"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next token at every position; `features` explains `mask` and `cache`."""
        return F.linear(self.features(tokens, mask=mask, cache=cache), self.embedding.weight)

    def last_logits(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        mask: Bool[Tensor, "batch seq"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch vocab"]:
        """Logits of the token after the last, in float32."""
        return F.linear(self.features(tokens, mask=mask, cache=cache)[:, -1], self.embedding.weight).float()

    def token_losses(
        self, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """Cross-entropy of every target, in nats."""
        features = self.features(tokens).flatten(0, 1)
        return token_losses(features, self.embedding.weight, targets.flatten()).view_as(targets)

    def losses_from(
        self, layer: int, x: Float[Tensor, "batch seq d_model"], targets: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """Cross-entropy of every target, in nats, when the blocks from `layer` on read `x`."""
        for block in self.blocks[layer:]:
            x = block(x)
        features = self.norm(x).flatten(0, 1)
        return token_losses(features, self.embedding.weight, targets.flatten()).view_as(targets)

    def loss(self, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats per token."""
        return mean_loss(self.features(tokens).flatten(0, 1), self.embedding.weight, targets.flatten())

    def objective(
        self, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss, and what training adds to it: `activation_l1` times the L1 norm of the activations.

        The norm is summed over the layers and a mean over tokens; without that switch the second is zero.
        """
        loss = self.loss(tokens, targets)
        norms = [vars(module).pop("l1") for module in self.modules() if isinstance(module, MeasuredTap)]
        return loss, self.config.activation_l1 * sum(norms, start=torch.zeros_like(loss))

    def recompute_codes(self, recompute: bool = True) -> None:
        """Trade time for memory in training: ISTA blocks keep their last code only and compute the others again."""
        for module in self.modules():
            if isinstance(module, ISTA):
                module.recompute = recompute

    @torch.inference_mode()
    def generate(
        self,
        tokens: Int[Tensor, "batch seq"],
        max_new_tokens: int,
        *,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | int | None = None,
        seed: int | None = None,
        mask: Bool[Tensor, "batch seq"] | None = None,
        slide: int = 1,
        use_cache: bool = True,
        on_token: Callable[[Int[Tensor, " batch"]], None] | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Continue each sequence; `temperature=0` takes the most probable token.

        Prompts of different length are padded on the left (`pad_left`), and `mask` is False there. Beyond the context
        it slides: the oldest `slide` tokens are forgotten at a time and the rest is read again, since its positions
        have changed. With 1 every token sees as many as it can, at a pass over the context for each; a quarter of the
        context costs next to nothing. `on_token` is called with each new token as it is made, for streaming.
        """
        check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        longest = tokens.shape[1] + max_new_tokens
        reader = Reader(self, longest=longest, mask=mask, slide=slide, use_cache=use_cache)
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        for _ in range(max_new_tokens):
            new = sample(reader.logits(tokens), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            tokens = torch.cat([tokens, new[:, None]], dim=1)
            if on_token is not None:
                on_token(new)
        return tokens

    def initialise(self, seed: int) -> "LanguageModel":
        """Draw fresh weights as the released code does; the same seed gives the same weights on every machine.

        | tensor                            | distribution                                    |
        |-----------------------------------|-------------------------------------------------|
        | linear maps, embeddings           | N(0, 0.02^2), biases 0                          |
        | the last map of a residual branch | N(0, (0.02 / sqrt(2 num_layers))^2)             |
        | ISTA's atoms                      | uniform within sqrt(6 / d_model), std sqrt(2/d) |
        | LayerNorm                         | gain 1, bias 0                                  |
        """
        generator = torch.Generator().manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                ends_branch = name.endswith((".output", ".mlp.down"))
                std = 0.02 / math.sqrt(2 * self.config.num_layers) if ends_branch else 0.02
                _copy(module.weight, torch.empty(module.weight.shape).normal_(0, std, generator=generator))
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, ISTA):
                bound = math.sqrt(6 / self.config.d_model)
                for matrix in [module.atoms] if module.decoder is None else [module.atoms, module.decoder]:
                    _copy(matrix, torch.empty(matrix.shape).uniform_(-bound, bound, generator=generator))
            elif isinstance(module, nn.LayerNorm | ShiftedKeys | Normalised | Shrinkage):
                module.reset_parameters()
        return self


def _copy(weight: Tensor, drawn: Tensor) -> None:
    """Weights are drawn on the CPU, so that a seed means the same ones on every device."""
    with torch.no_grad():
        weight.copy_(drawn)
