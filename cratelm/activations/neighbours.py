"""Similar neurons of a layer: by decoder direction, and by the tokens they fire on."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

KEEP = 20
"""Nearest neurons kept for each."""
_BLOCK = 1024  # neurons compared with all others at once


def nearest_directions(
    directions: Float[Tensor, "neurons d_model"],
) -> tuple[Int[np.ndarray, "neurons kept"], Float[np.ndarray, "neurons kept"]]:
    """Each neuron's nearest others by cosine similarity of their decoder directions: (index, cosine), nearest first."""
    unit = torch.nn.functional.normalize(directions.float(), dim=1)
    return _nearest(len(unit), lambda rows: unit[rows] @ unit.T)


def nearest_cofiring(
    fires: Bool[Tensor, "tokens neurons"],
) -> tuple[Int[np.ndarray, "neurons kept"], Float[np.ndarray, "neurons kept"]]:
    """Each neuron's nearest others by Jaccard similarity: tokens on which both fire / tokens on which either does."""
    active = fires.float()
    count = active.sum(dim=0)

    def similarity(rows: slice) -> Tensor:
        both = active[:, rows].T @ active
        return both / (count[rows, None] + count - both).clamp(min=1)

    return _nearest(active.shape[1], similarity)


def _nearest(neurons: int, similarity) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[no-untyped-def]
    """The KEEP most similar other neurons of every neuron, a block of neurons at a time."""
    keep = min(KEEP, neurons - 1)
    indices, values = [], []
    for first in range(0, neurons, _BLOCK):
        rows = slice(first, min(first + _BLOCK, neurons))
        block = similarity(rows)
        block[torch.arange(len(block)), torch.arange(rows.start, rows.stop)] = -torch.inf
        top = block.topk(keep, dim=1)
        indices.append(top.indices.to(torch.int32).cpu().numpy())
        values.append(top.values.float().cpu().numpy())
    return np.concatenate(indices), np.concatenate(values)
