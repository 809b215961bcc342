"""CRATE: compression by multi-head subspace self-attention, then sparsification by ISTA (arXiv 2410.16443).

The facing page is `gpt2.py`; the two have the same outline, so that a diff of them is the paper's proposal.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cratelm.model.attention import Attend, Span
from cratelm.model.config import ModelConfig
from cratelm.model.gpt2 import Attention
from cratelm.model.ista import sparse_code


class MSSA(nn.Module):
    """Multi-head subspace self-attention: compress the tokens against K learned subspaces.

        w = U x,   MSSA(x) = O concat_k( softmax(w_k w_k^T / sqrt(p)) w_k ) + b,   causal

    One projection w serves as query, key and value; p = d_model / K. O is a free learned matrix, as in the
    released code (the paper's derivation has U_k itself there, up to a constant).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.subspaces = nn.Linear(config.d_model, config.d_model, bias=False)
        self.attend = Attend(config)
        self.output = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], span: Span | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        """Attend to the past and to oneself."""
        w = self.subspaces(x)
        (past,) = (w,) if span is None else span.extend(w)
        return self.output(self.attend(w, past, past, span))


class ISTA(nn.Module):
    """Sparse coding of each token in a learned overcomplete dictionary D.

    Unrolls proximal gradient steps, from a code of zero, on

        min over a >= 0 of   1/2 ||x - D a||^2 + lambda ||a||_1

    and returns the reconstruction D a. The code a is what the paper calls the neurons. Two steps take four matrix
    products: D^T x,  D a1,  D^T (x - D a1),  D a2.
    """

    recompute = False
    """Whether backward passes compute the inner codes again: one product in twelve more, half the codes kept."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.complete = config.dictionary == "complete"
        self.atoms = nn.Parameter(torch.empty(config.num_neurons, config.d_model))  # D^T: one dictionary atom a row
        self.decoder = nn.Parameter(torch.empty_like(self.atoms)) if config.untied_decoder else None
        self.shrinkage = Shrinkage(config)
        self.neurons = nn.Identity()  # tap

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Code each token, then decode. A complete dictionary codes from the input on, and its code is the output."""
        step_sizes, thresholds = self.shrinkage(self.atoms)
        code = sparse_code(x, self.atoms, step_sizes, thresholds, from_input=self.complete, recompute=self.recompute)
        code = self.neurons(code)
        return code if self.complete else code @ self.directions

    @property
    def directions(self) -> Float[Tensor, "neurons d_model"]:
        """What each neuron adds to the block's output, per unit of its code; of a complete dictionary itself."""
        if self.complete:
            return torch.eye(len(self.atoms), dtype=self.atoms.dtype, device=self.atoms.device)
        return self.atoms if self.decoder is None else self.decoder


class Shrinkage(nn.Module):
    """The step sizes eta_t and the thresholds eta_t * lambda of a layer's steps; the paper's are constants.

    What is learned is its logarithm, so that it stays positive: eta_t one per step, lambda one per neuron.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_steps, self.step_size, self.penalty = config.ista_steps, config.ista_step_size, config.penalty
        self.log_step_sizes = nn.Parameter(torch.empty(config.ista_steps)) if config.learned_step_size else None
        self.log_penalties = nn.Parameter(torch.empty(config.num_neurons)) if config.learned_penalty else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from the constants of the configuration."""
        if self.log_step_sizes is not None:
            nn.init.constant_(self.log_step_sizes, math.log(self.step_size))
        if self.log_penalties is not None:
            nn.init.constant_(self.log_penalties, math.log(self.penalty))

    def forward(
        self, atoms: Float[Tensor, "neurons d_model"]
    ) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps #neurons"]]:
        """Step sizes, and each step's thresholds (one for all neurons or one each), on the device of the atoms."""
        step_sizes, penalties = (
            atoms.new_full((count,), value, dtype=torch.promote_types(atoms.dtype, torch.float32))
            if logarithm is None
            else logarithm.exp()
            for count, value, logarithm in (
                (self.num_steps, self.step_size, self.log_step_sizes),
                (1, self.penalty, self.log_penalties),
            )
        )
        return step_sizes, step_sizes[:, None] * penalties


class CrateBlock(nn.Module):
    """z = x + MSSA(LN(x)), then ISTA(LN(z)). No residual around ISTA: the block's output is its reconstruction."""

    neurons = "ista.neurons"
    """Where this block's neurons are tapped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.d_model)
        self.mssa = MSSA(config) if config.attention == "mssa" else Attention(config)
        self.norm_2 = nn.LayerNorm(config.d_model)
        self.ista = ISTA(config)
        self.residual = config.ista_residual  # a variant: CRATE-alpha has one

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], span: Span | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        """One layer."""
        z = x + self.mssa(self.norm_1(x), span)
        coded = self.ista(self.norm_2(z))
        return z + coded if self.residual else coded
