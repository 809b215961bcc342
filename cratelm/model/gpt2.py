"""GPT-2, the paper's baseline: attention with separate queries, keys and values, then a two-matrix MLP.

The facing page is `crate.py`; the two have the same outline, so that a diff of them is the paper's proposal.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cratelm.model.config import ModelConfig


class Attention(nn.Module):
    """Causal multi-head self-attention.

        q, k, v = Q x, K x, V x,   Attention(x) = O concat_k( softmax(q_k k_k^T / sqrt(p)) v_k )

    with p = d_model / number of heads.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.output = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Attend to the past and to oneself."""
        heads = self.query_key_value(x).unflatten(-1, (3, self.num_heads, -1))  # (batch, seq, 3, heads, p)
        q, k, v = heads.transpose(1, 3).unbind(dim=2)  # each (batch, heads, seq, p)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(attended.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """MLP(x) = W2 act(W1 x). The activations act(W1 x) are the neurons.

    The paper's baseline has ReLU, so that these neurons, too, are non-negative and can be exactly zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.num_neurons, bias=config.bias)
        self.activation = nn.ReLU() if config.activation == "relu" else nn.GELU(approximate="tanh")
        self.neurons = nn.Identity()  # tap
        self.down = nn.Linear(config.num_neurons, config.d_model, bias=config.bias)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Transform each token."""
        return self.down(self.neurons(self.activation(self.up(x))))


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

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """One layer."""
        z = x + self.attention(self.norm_1(x))
        return z + self.mlp(self.norm_2(z))
