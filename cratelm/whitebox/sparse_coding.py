"""The ISTA block and its objective: codes after each step, the LASSO, properties of the dictionary.

1/2 ||x - D a||^2 + sum_i lambda_i a_i,   a >= 0
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cratelm.model.ista import sparse_code

_Tokens = Float[Tensor, "tokens d_model"]
Code = Float[Tensor, "tokens neurons"]
PerToken = Float[Tensor, " tokens"]

CONVERGED_STEPS = 200
"""Accelerated proximal steps after which the objective is taken as converged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dictionary:
    """Properties of a dictionary D, whose atoms are the rows of a matrix."""

    squared_norm: float
    """||D||^2, the largest eigenvalue of D D^T; gradient steps below 1 / ||D||^2 never raise the objective."""
    stability: tuple[float, ...]
    """eta_t ||D||^2 of each step: from 2 on gradient steps diverge."""
    coherence: float
    """Mutual coherence: the largest |cosine| of two atoms."""
    mean_coherence: float
    """Mean over atoms of the largest |cosine| with another."""
    atom_norm: tuple[float, float, float]
    """Smallest, mean and largest length of an atom."""


def codes_by_step(ista: Any, x: _Tokens) -> list[Code]:
    """a_0 (zero, or x for a complete dictionary), a_1, ..., by the model's own arithmetic. The last is its code."""
    step_sizes, thresholds = ista.shrinkage(ista.atoms)
    start = x if ista.complete else x.new_zeros(len(x), len(ista.atoms))
    return [start] + [
        sparse_code(x, ista.atoms, step_sizes[:count], thresholds[:count], from_input=ista.complete)
        for count in range(1, len(step_sizes) + 1)
    ]


def penalties(ista: Any) -> Float[Tensor, " #neurons"]:
    """lambda, one for all neurons or one each."""
    step_sizes, thresholds = ista.shrinkage(ista.atoms)
    return (thresholds[0] / step_sizes[0]).detach()


def objective(x: _Tokens, atoms: Float[Tensor, "neurons d_model"], penalty: Tensor, code: Code) -> PerToken:
    """The LASSO of each token, in float64."""
    wide, atoms, x = code.double(), atoms.double(), x.double()
    return 0.5 * (x - wide @ atoms).square().sum(dim=1) + (wide.abs() * penalty.double()).sum(dim=1)


def reconstruction_error(x: _Tokens, atoms: Float[Tensor, "neurons d_model"], code: Code) -> PerToken:
    """||x - D a|| / ||x|| of each token."""
    return (x - code @ atoms).norm(dim=1) / x.norm(dim=1).clamp(min=1e-12)


def least_objective(
    x: _Tokens, atoms: Float[Tensor, "neurons d_model"], penalty: Tensor, *, steps: int = CONVERGED_STEPS
) -> PerToken:
    """The converged LASSO of each token, by accelerated steps (FISTA) of size 1 / ||D||^2, in float64.

    At most the LASSO of a zero code, since accelerated steps may overshoot.
    """
    x, atoms, penalty = x.double(), atoms.double(), penalty.double()
    size = 1 / float(torch.linalg.eigvalsh(atoms.T @ atoms)[-1])
    code = ahead = x.new_zeros(len(x), len(atoms))
    momentum, least = 1.0, objective(x, atoms, penalty, code)
    for _ in range(steps):
        new = (ahead + size * ((x - ahead @ atoms) @ atoms.T - penalty)).relu_()
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / following * (new - code)
        code, momentum = new, following
    return torch.minimum(least, objective(x, atoms, penalty, code))


def dictionary_of(ista: Any) -> Dictionary:
    """Properties of a block's dictionary."""
    atoms = ista.atoms.detach().double()
    step_sizes, _ = ista.shrinkage(ista.atoms)
    squared = float(torch.linalg.eigvalsh(atoms.T @ atoms)[-1])
    lengths = atoms.norm(dim=1)
    unit = atoms / lengths.clamp(min=1e-12)[:, None]
    closest = torch.empty(len(unit), dtype=unit.dtype)
    for first in range(0, len(unit), 1024):
        cosines = (unit[first : first + 1024] @ unit.T).abs()
        rows = torch.arange(len(cosines))
        cosines[rows, rows + first] = 0
        closest[first : first + 1024] = cosines.max(dim=1).values.cpu()
    return Dictionary(
        squared_norm=squared, stability=tuple(squared * size for size in step_sizes.tolist()),
        coherence=float(closest.max()), mean_coherence=float(closest.mean()),
        atom_norm=(float(lengths.min()), float(lengths.mean()), float(lengths.max())),
    )  # fmt: skip


def hoyer(code: Code) -> PerToken:
    """Hoyer's sparseness (sqrt(n) - ||a||_1 / ||a||_2) / (sqrt(n) - 1): 0 for a flat code, 1 for one active neuron.

    A code of zeros counts as 1.
    """
    root = code.shape[1] ** 0.5
    length = code.norm(dim=1)
    spread = code.abs().sum(dim=1) / length.clamp(min=1e-30)
    return torch.where(length > 0, (root - spread) / (root - 1), 1.0)


def overlap(first: Bool[Tensor, "tokens neurons"], second: Bool[Tensor, "tokens neurons"]) -> PerToken:
    """Jaccard similarity of two supports of each token: neurons in both / neurons in either; 1 where both are empty."""
    both, either = (first & second).sum(dim=1), (first | second).sum(dim=1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)
