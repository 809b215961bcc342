"""What a language model is made of: `ModelConfig`, the paper's table of sizes, and what a size costs."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from cratelm.errors import CrateError

Architecture = Literal["crate", "gpt2"]
Size = Literal["1l", "2l", "3l", "s", "b"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture of a CRATE or GPT-2 language model. Defaults are the paper's."""

    arch: Architecture
    num_layers: int
    d_model: int
    """Width of the residual stream."""
    num_heads: int
    """Subspaces of MSSA, or attention heads."""
    vocab_size: int
    """Rows of the embedding; may exceed the tokenizer's vocabulary (the paper pads 50257 to 50304)."""
    context_length: int = 1024
    """Longest sequence, in tokens."""
    expansion: int = 4
    """Neurons per layer, in units of `d_model`: CRATE's dictionary size, GPT-2's hidden size."""
    ista_steps: int = 2
    """CRATE: proximal gradient steps of the ISTA block."""
    ista_step_size: float = 0.1
    """CRATE: step size eta."""
    penalty: float = 0.1
    """CRATE: sparsity penalty lambda; the threshold of a step is eta * lambda."""
    activation: Literal["relu", "gelu"] = "relu"
    """GPT-2: nonlinearity of the MLP. The paper's baseline has ReLU, OpenAI's GPT-2 has (tanh-approximated) GELU."""
    bias: bool = False
    """GPT-2: biases in linear maps and LayerNorms. The paper's baseline has none."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, at least 1 is needed"
            for name in (
                "num_layers",
                "d_model",
                "num_heads",
                "vocab_size",
                "context_length",
                "expansion",
                "ista_steps",
            )
            if getattr(self, name) < 1
        ]
        if self.arch not in ("crate", "gpt2"):
            problems.append(f"arch is {self.arch!r}, known are crate and gpt2")
        if self.activation not in ("relu", "gelu"):
            problems.append(f"activation is {self.activation!r}, known are relu and gelu")
        if self.num_heads >= 1 and self.d_model % self.num_heads:
            problems.append(f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}")
        if problems:
            raise CrateError("unusable model configuration: " + "; ".join(problems))

    @property
    def num_neurons(self) -> int:
        """Neurons per layer."""
        return self.expansion * self.d_model

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, position embeddings left out and the tied head counted once, as the paper counts."""
        d, h = self.d_model, self.num_neurons
        if self.arch == "crate":
            return self.vocab_size * d + self.num_layers * (2 * d * d + h * d + 5 * d) + 2 * d
        biases = self.num_layers * (7 * d + h) + d if self.bias else 0
        return self.vocab_size * d + self.num_layers * (4 * d * d + 2 * h * d + 2 * d) + d + biases

    def flops_per_token(self, sequence: int | None = None) -> int:
        """Floating-point operations of one forward pass per token: 2 per multiply-add of every matrix product.

        Attention is counted dense (4 * sequence * d_model), ISTA with the 2 * ista_steps products it needs, the head
        with the whole vocabulary. A training step costs three times as much.
        """
        d, h, length = self.d_model, self.num_neurons, sequence or self.context_length
        if self.arch == "crate":
            layer = 4 * d * d + 4 * self.ista_steps * h * d
        else:
            layer = 8 * d * d + 4 * h * d
        return self.num_layers * (layer + 4 * length * d) + 2 * self.vocab_size * d

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without those that belong to the other architecture."""
        other = ("activation", "bias") if self.arch == "crate" else ("ista_steps", "ista_step_size", "penalty")
        return {name: value for name, value in asdict(self).items() if name not in other}


SIZES: dict[Size, tuple[int, int, int]] = {
    "1l": (1, 128, 4),
    "2l": (2, 128, 4),
    "3l": (3, 128, 4),
    "s": (6, 768, 12),
    "b": (12, 768, 12),
}
"""The paper's model sizes: layers, width, heads."""


def sized(arch: Architecture, size: Size, *, vocab_size: int = 50304, **changes: Any) -> ModelConfig:
    """The configuration of one of the paper's models, with some fields changed."""
    if size not in SIZES:
        raise CrateError(f"unknown size {size!r}, known are {', '.join(SIZES)}")
    layers, width, heads = SIZES[size]
    config = ModelConfig(arch=arch, num_layers=layers, d_model=width, num_heads=heads, vocab_size=vocab_size)
    return replace(config, **changes)
