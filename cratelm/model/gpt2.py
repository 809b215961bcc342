"""GPT-2, the paper's baseline: attention with separate queries, keys and values, then a two-matrix MLP.

The facing page is `crate.py`; the two have the same outline, so that a diff of them is the paper's proposal.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cratelm.model.attention import Attend, Span
from cratelm.model.config import ModelConfig


class Attention(nn.Module):
    """Causal multi-head self-attention.

        q, k, v = Q x, K x, V x,   Attention(x) = O concat_k( softmax(q_k k_k^T / sqrt(p)) v_k )

    with p = d_model / number of heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.attend = Attend(config)
        self.output = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], span: Span | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        """Attend to the past and to oneself."""
        q, k, v = self.query_key_value(x).chunk(3, dim=-1)
        k, v = (k, v) if span is None else span.extend(k, v)
        return self.output(self.attend(q, k, v, span))


class MLP(nn.Module):
    """MLP(x) = W2 act(W1 x). The activations act(W1 x) are the neurons.

    The paper's baseline has ReLU, so that these neurons, too, are non-negative and can be exactly zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.num_neurons, bias=config.bias)
        self.activation = nn.ReLU() if config.activation == "relu" else nn.GELU(approximate="tanh")
        self.keep = nn.Identity() if config.top_k_activations is None else Largest(config.top_k_activations)
        self.neurons = MeasuredTap() if config.activation_l1 else nn.Identity()  # tap
        self.down = nn.Linear(config.num_neurons, config.d_model, bias=config.bias)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Transform each token."""
        return self.down(self.neurons(self.keep(self.activation(self.up(x)))))


class Largest(nn.Module):
    """Zero but for the k largest activations of each token (a variant)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, code: Float[Tensor, "*tokens neurons"]) -> Float[Tensor, "*tokens neurons"]:
        """Set all but the k largest activations to 0."""
        largest = code.topk(self.k, dim=-1)
        return torch.zeros_like(code).scatter(-1, largest.indices, largest.values)


class MeasuredTap(nn.Identity):
    """A tap that remembers the L1 norm of the last pass, as a mean over tokens (a variant trains against it)."""

    l1: Tensor

    def forward(self, code: Tensor) -> Tensor:
        """The code, unchanged."""
        self.l1 = code.abs().sum(-1).mean()
        return code


class GPT2Block(nn.Module):
    """z = x + Attention(LN(x)), then z + MLP(LN(z))."""

    neurons = "mlp.neurons"
    """Where this block's neurons are tapped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model, bias=config.bias)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.d_model, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], span: Span | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        """One layer."""
        z = x + self.attention(self.norm_1(x), span)
        return z + self.mlp(self.norm_2(z))
