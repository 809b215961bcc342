"""What a language model is made of: `ModelConfig`, the paper's table of sizes, and what a size costs."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from cratelm.errors import CrateError

Architecture = Literal["crate", "gpt2"]
Size = Literal["1l", "2l", "3l", "s", "b"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The architecture of a CRATE or GPT-2 language model. Defaults are the paper's; variants: `docs/variants.md`."""

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

    rotary: bool = False
    """Variant: queries and keys rotated by position; the learned position embedding stays."""
    shifted_keys: bool = False
    """Variant: a key is a learned mix, per channel, of its token's projection and the previous token's."""
    normalised: bool = False
    """Variant: queries and keys of unit length per head, with a learned temperature."""
    strict_mask: bool = False
    """Variant: a token attends to the past without itself."""

    ista_steps: int = 2
    """CRATE: proximal gradient steps of the ISTA block."""
    ista_step_size: float = 0.1
    """CRATE: step size eta."""
    penalty: float = 0.1
    """CRATE: sparsity penalty lambda; the threshold of a step is eta * lambda."""
    attention: Literal["mssa", "qkv"] = "mssa"
    """CRATE variant: `qkv` puts GPT-2's attention in front of ISTA."""
    learned_step_size: bool = False
    """CRATE variant: each step of each layer learns its step size, from `ista_step_size`."""
    learned_penalty: bool = False
    """CRATE variant: each neuron learns its penalty, and so its threshold, from `penalty`."""
    ista_residual: bool = False
    """CRATE variant: x = z + ISTA(LN(z))."""
    untied_decoder: bool = False
    """CRATE variant: decode with a separate matrix; with `ista_residual`, CRATE-alpha."""
    dictionary: Literal["overcomplete", "complete"] = "overcomplete"
    """CRATE variant: `complete` codes in d_model neurons, from the input, and outputs the code; no final norm."""

    activation: Literal["relu", "gelu"] = "relu"
    """GPT-2: nonlinearity of the MLP. The paper's baseline has ReLU, OpenAI's GPT-2 has (tanh-approximated) GELU."""
    bias: bool = False
    """GPT-2: biases in linear maps and LayerNorms. The paper's baseline has none."""
    activation_l1: float = 0.0
    """GPT-2 variant: weight of the L1 norm of the activations in the training objective."""
    top_k_activations: int | None = None
    """GPT-2 variant: number of activations of a token, the largest, that each layer keeps."""

    def __post_init__(self) -> None:
        if mistyped := _mistyped(self):
            raise CrateError("unusable model configuration: " + "; ".join(mistyped))
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}"
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
            problems.append(f"arch must be crate or gpt2, got {self.arch!r}")
        if self.activation not in ("relu", "gelu"):
            problems.append(f"activation must be relu or gelu, got {self.activation!r}")
        if self.num_heads >= 1 and self.d_model % self.num_heads:
            problems.append(f"d_model must be a multiple of num_heads {self.num_heads}, got {self.d_model}")
        problems += _problems_of_variants(self)
        if problems:
            raise CrateError("unusable model configuration: " + "; ".join(problems))

    @property
    def num_neurons(self) -> int:
        """Neurons per layer."""
        return self.expansion * self.d_model

    @property
    def shares_projection(self) -> bool:
        """Whether one projection serves as query, key and value, as in the paper's MSSA."""
        return self.arch == "crate" and self.attention == "mssa"

    @property
    def departures(self) -> dict[str, Any]:
        """The switches that are on: fields that name a variant and do not have the paper's value."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in _VARIANTS and getattr(self, field.name) != field.default
        }

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, position embeddings left out and the tied head counted once, as the paper counts."""
        d, h = self.d_model, self.num_neurons
        attention = (
            (2 if self.shares_projection else 4) * d * d + self.shifted_keys * d + self.normalised * self.num_heads
        )
        if self.arch == "crate":
            atoms = (2 if self.untied_decoder else 1) * h * d
            learned = self.learned_step_size * self.ista_steps + self.learned_penalty * h
            layer = attention + self.shares_projection * d + atoms + learned + 4 * d
            final_norm = 0 if self.dictionary == "complete" else 2 * d
        else:
            layer = attention + 2 * h * d + 2 * d + self.bias * (7 * d + h)
            final_norm = d + self.bias * d
        return self.vocab_size * d + self.num_layers * layer + final_norm

    def flops_per_token(self, sequence: int | None = None) -> int:
        """Floating-point operations of one forward pass per token: 2 per multiply-add of every matrix product.

        Attention is counted dense (4 * sequence * d_model), ISTA with the 2 * ista_steps products it needs, the head
        with the whole vocabulary. A training step costs three times as much.
        """
        d, h, length = self.d_model, self.num_neurons, sequence or self.context_length
        projections = (4 if self.shares_projection else 8) * d * d
        products = 2 * self.ista_steps if self.arch == "crate" else 2
        layer = projections + 2 * products * h * d + 4 * length * d
        return self.num_layers * layer + 2 * self.vocab_size * d

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without those of the other architecture and the switches that are off."""
        others = _VARIANTS | set(("activation", "bias") if self.arch == "crate" else _ISTA)
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in others}
        return values | self.departures


_ISTA = ("ista_steps", "ista_step_size", "penalty")
_ONLY_CRATE = ("attention", "learned_step_size", "learned_penalty", "ista_residual", "untied_decoder", "dictionary")
_ONLY_GPT2 = ("activation_l1", "top_k_activations")
_VARIANTS = {"rotary", "shifted_keys", "normalised", "strict_mask", *_ONLY_CRATE, *_ONLY_GPT2}

_CHOICES = {"activation": ("relu", "gelu"), "attention": ("mssa", "qkv"), "dictionary": ("overcomplete", "complete")}


_KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    int: ("a whole number", (int,)), float: ("a finite number", (int, float)), bool: ("true or false", (bool,)),
    int | None: ("a whole number or none", (int, type(None))),
}  # fmt: skip


def _mistyped(config: ModelConfig) -> list[str]:
    """The error for each field with a value of a wrong type, without the fields that have choices."""
    problems = []
    for field in fields(config):
        value = getattr(config, field.name)
        wanted, types = _KINDS.get(field.type, ("", (type(value),)))
        if type(value) not in types or (isinstance(value, float) and not math.isfinite(value)):
            problems.append(f"{field.name} must be {wanted}, got {value!r}")
    return problems


def _problems_of_variants(config: ModelConfig) -> list[str]:
    """The error for each switch that does not fit the other switches or the architecture."""
    foreign = set(config.departures) & set(_ONLY_GPT2 if config.arch == "crate" else _ONLY_CRATE)
    problems = [f"{name} does not belong to {config.arch}" for name in sorted(foreign)]
    problems += [
        f"{name} must be {' or '.join(known)}, got {getattr(config, name)!r}"
        for name, known in _CHOICES.items()
        if getattr(config, name) not in known
    ]
    if config.rotary and config.num_heads >= 1 and config.d_model // config.num_heads % 2:
        problems.append(
            f"rotary needs heads of even width, d_model / num_heads is {config.d_model // config.num_heads}"
        )
    if config.dictionary == "complete" and config.expansion != 1:
        problems.append(f"dictionary complete needs expansion 1, got {config.expansion}")
    if config.dictionary == "complete" and config.untied_decoder:
        problems.append("dictionary complete has no decoder, so untied_decoder must be false")
    if config.ista_step_size <= 0 or config.penalty < 0 or (config.learned_penalty and config.penalty == 0):
        problems.append("ista_step_size and a learned penalty must be above 0, a fixed penalty at least 0")
    if config.activation_l1 < 0:
        problems.append(f"activation_l1 must be at least 0, got {config.activation_l1}")
    top_k = config.top_k_activations
    if top_k is not None and not 1 <= top_k <= config.num_neurons:
        problems.append(f"top_k_activations must be 1 to {config.num_neurons}, got {top_k}")
    return problems


SIZES: dict[Size, tuple[int, int, int]] = {
    "1l": (1, 128, 4),
    "2l": (2, 128, 4),
    "3l": (3, 128, 4),
    "s": (6, 768, 12),
    "b": (12, 768, 12),
}
"""The paper's model sizes: layers, width, heads."""


def sized(arch: Architecture, size: Size, *, vocab_size: int = 50304, **changes: Any) -> ModelConfig:
    """The configuration of one of the paper's models, with some fields changed.

    `dictionary="complete"` alone gives the released code's model of that name, with expansion 1 and one ISTA step.
    """
    if size not in SIZES:
        raise CrateError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    layers, width, heads = SIZES[size]
    config = ModelConfig(arch=arch, num_layers=layers, d_model=width, num_heads=heads, vocab_size=vocab_size)
    if changes.get("dictionary") == "complete":
        changes = {"expansion": 1, "ista_steps": 1} | changes
    return replace(config, **changes)


def padded_vocabulary(vocab_size: int) -> int:
    """The vocabulary rounded up to a multiple of 64, as the paper pads 50257 to 50304."""
    return -(-vocab_size // 64) * 64
