"""CRATE: compression by multi-head subspace self-attention, then sparsification by ISTA (arXiv 2410.16443).

The facing page is `gpt2.py`; the two have the same outline, so that a diff of them is the paper's proposal.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cratelm.model.config import ModelConfig


class MSSA(nn.Module):
    """Multi-head subspace self-attention: compress the tokens against K learned subspaces.

        w = U x,   MSSA(x) = O concat_k( softmax(w_k w_k^T / sqrt(p)) w_k ) + b,   causal

    One projection w serves as query, key and value; p = d_model / K. O is a free learned matrix, as in the
    released code (the paper's derivation has U_k itself there, up to a constant).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.subspaces = nn.Linear(config.d_model, config.d_model, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Attend to the past and to oneself."""
        w = self.subspaces(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (batch, heads, seq, p)
        compressed = F.scaled_dot_product_attention(w, w, w, is_causal=True)
        return self.output(compressed.transpose(1, 2).flatten(-2))


class ISTA(nn.Module):
    """Sparse coding of each token in a learned overcomplete dictionary D.

    Unrolls proximal gradient steps, from a code of zero, on

        min over a >= 0 of   1/2 ||x - D a||^2 + lambda ||a||_1

    and returns the reconstruction D a. The code a is what the paper calls the neurons. Two steps take four matrix
    products: D^T x,  D a1,  D^T (x - D a1),  D a2.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_steps, self.step_size, self.penalty = config.ista_steps, config.ista_step_size, config.penalty
        self.atoms = nn.Parameter(torch.empty(config.num_neurons, config.d_model))  # D^T: one dictionary atom a row
        self.neurons = nn.Identity()  # tap

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Code each token, then decode."""
        threshold = self.step_size * self.penalty
        code = F.relu(self.step_size * F.linear(x, self.atoms) - threshold)
        for _ in range(self.num_steps - 1):
            residual = x - code @ self.atoms
            code = F.relu(code + self.step_size * F.linear(residual, self.atoms) - threshold)
        return self.neurons(code) @ self.atoms


class CrateBlock(nn.Module):
    """z = x + MSSA(LN(x)), then ISTA(LN(z)). No residual around ISTA: the block's output is its reconstruction."""

    neurons = "ista.neurons"
    """Where this block's neurons are tapped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model)
        self.mssa = MSSA(config)
        self.norm_2 = nn.LayerNorm(config.d_model)
        self.ista = ISTA(config)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """One layer."""
        z = x + self.mssa(self.norm_1(x))
        return self.ista(self.norm_2(z))
