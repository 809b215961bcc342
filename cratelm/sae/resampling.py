"""Choose where dead latents restart: at activations whose reconstruction adds most to the model's loss."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from cratelm.activations.taps import capture
from cratelm.data.tokens import sample_batch
from cratelm.sae.splicing import Replacement, spliced_losses

ROWS_PER_PASS = 16


@torch.no_grad()
def costly_inputs(
    model: nn.Module,
    path: str,
    reconstruct: Replacement,
    tokens: Integer[np.ndarray, " stream"],
    *,
    count: int,
    rows: int,
    context: int,
    seed: int,
    step: int,
    begin: Sequence[int] = (),
) -> Float[Tensor, "count d_in"]:
    """Draw `count` activations at a tap, with probability proportional to the loss that the reconstruction adds there.

    Rows are read at random places of the corpus. In each row, tokens are drawn in proportion to the loss added at the
    next token (at least 1e-9); among all of these, `count` are drawn in the same way. The released code draws one
    token in each of 60,000 rows; here a row gives several if there are more latents than rows. The model reads `begin`
    before every row.
    """
    generator = np.random.default_rng((seed % 2**63, step))
    device, each = next(model.parameters()).device, -(-count // rows)
    costs, inputs = [], []
    for first in range(0, rows, ROWS_PER_PASS):
        chosen = range(first, min(first + ROWS_PER_PASS, rows))
        read, targets = sample_batch(tokens, seed=seed + 1, step=step, rows=chosen, context=context)
        longer = torch.from_numpy(np.concatenate([read, targets[:, -1:]], axis=1)).to(device)
        with capture(model, [path]) as captured:
            before = spliced_losses(model, longer, begin=begin)
        added = spliced_losses(model, longer, {path: reconstruct}, begin) - before
        cost = added.clamp(min=1e-9).double().cpu().numpy()
        where = torch.from_numpy(_drawn(cost, each, generator))
        activations = captured[path].reshape(len(cost), cost.shape[1] + len(begin), -1)[:, len(begin) :].cpu()
        inputs.append(activations[torch.arange(len(cost))[:, None], where].flatten(0, 1))
        costs.append(np.take_along_axis(cost, where.numpy(), axis=1).ravel())
    pool, weights = torch.cat(inputs), np.concatenate(costs)
    return pool[torch.from_numpy(_drawn(weights[None], count, generator)[0])].float().to(device)


def _drawn(weights: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw `count` indices of each row without replacement, with probability proportional to weight.

    If `count` is larger than a row, its order is repeated.
    """
    order = np.argsort(-(np.log(weights) + generator.gumbel(size=weights.shape)), axis=1)
    return np.take(order, np.arange(count) % weights.shape[1], axis=1)
