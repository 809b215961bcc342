"""The language model around the blocks: embed, blocks, head; the same shell for CRATE and GPT-2."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cratelm.errors import CrateError
from cratelm.model.config import Architecture, ModelConfig
from cratelm.model.crate import ISTA, CrateBlock
from cratelm.model.gpt2 import GPT2Block

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
        self.norm = nn.LayerNorm(config.d_model, bias=config.arch == "crate" or config.bias)

    @property
    def neuron_taps(self) -> tuple[str, ...]:
        """The module whose output is the code, one per layer: the neurons that the paper explains."""
        return tuple(f"blocks.{layer}.{block.neurons}" for layer, block in enumerate(self.blocks))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def features(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """The normalised residual stream that the head reads."""
        length = tokens.shape[1]
        if length > self.config.context_length:
            raise CrateError(
                f"a sequence of {length} tokens is longer than the model's context of {self.config.context_length}. "
                "Shorten it, or train with a longer --context"
            )
        x = self.embedding(tokens) + self.positions.weight[:length]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next token at every position."""
        return F.linear(self.features(tokens), self.embedding.weight)

    def token_losses(
        self, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq"]:
        """Cross-entropy of every target, in nats."""
        logits = self(tokens).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

    def loss(self, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats per token."""
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten())

    @torch.inference_mode()
    def generate(
        self,
        tokens: Int[Tensor, "batch seq"],
        max_new_tokens: int,
        *,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        on_token: Callable[[Int[Tensor, " batch"]], None] | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Continue each sequence; `temperature=0` takes the most probable token. Beyond the context it slides.

        `on_token` is called with each new token as it is made, for streaming.
        """
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        for _ in range(max_new_tokens):
            window = tokens[:, -self.config.context_length :]
            logits = F.linear(self.features(window)[:, -1], self.embedding.weight).float()
            new = sample(logits, temperature=temperature, top_k=top_k, generator=generator)
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
                _copy(module.atoms, torch.empty(module.atoms.shape).uniform_(-bound, bound, generator=generator))
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        return self


def _copy(weight: Tensor, drawn: Tensor) -> None:
    """Weights are drawn on the CPU, so that a seed means the same ones on every device."""
    with torch.no_grad():
        weight.copy_(drawn)


def sample(
    logits: Float[Tensor, "batch vocab"], *, temperature: float | int, top_k: int | None, generator: torch.Generator
) -> Int[Tensor, " batch"]:
    """Draw one token per row from softmax(logits / temperature), restricted to the `top_k` most probable."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
