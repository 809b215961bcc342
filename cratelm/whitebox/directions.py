"""Directions of neurons: which tokens drive one and which it makes probable, whom it feeds, through which heads.

All from the weights, but for `tokens_alone`. With r_i what neuron i reads and w_i what it writes
(`parts.py`; in CRATE both are the atom d_i), N a norm with gain g, and N'(v) = g * (v - mean(v)) that norm at a fixed
scale (an RMSNorm takes no mean away):

    tokens_in      r_i . N(E[t]) + bias_i      the drive of token t's embedding, without position and attention
    tokens_alone   the code itself             when the model reads <|endoftext|> and t, nothing else
    tokens_out     H[t] . N'(w_i)              logit of t per unit of code and per unit of scale, N the final norm,
                                               less the mean over all tokens, which changes no probability
    successors     r_j . N'(w_i)               drive of neuron j of the next layer per unit of i's code, past its
                                               attention; predecessors are the same numbers seen from j
    heads_in       |O_k^T N'^T(r_i)|^2         share of head k of the same layer in what can drive i
    heads_out      |U_k N'(w_i)|^2             share of head k of the next layer in what reads i

In CRATE no residual leads around ISTA, so `tokens_in` is a path of its own only in the first layer and `tokens_out`
only in the last; elsewhere they say where a direction points.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cratelm.activations.subject import Subject
from cratelm.runtime import ProgressBar
from cratelm.whitebox.parts import Norm, Wiring

KEEP = 20
"""Length of each list, at either end."""
_BLOCK = 256  # neurons whose scores over a whole vocabulary are in memory at once

Arrays = dict[str, np.ndarray]


@torch.no_grad()
def layer_directions(found: Wiring, layer: int, *, vocabulary: int, keep: int = KEEP) -> Arrays:
    """Everything but `tokens_alone` of one layer's neurons, as it is written."""
    here = found.layers[layer]
    before = found.layers[layer - 1] if layer > 0 else None
    after = found.layers[layer + 1] if layer + 1 < len(found.layers) else None
    arrays: Arrays = {
        "read_norm": _numpy(here.read.norm(dim=1)), "write_norm": _numpy(here.write.norm(dim=1)),
        "read_write_cosine": _numpy(nn.functional.cosine_similarity(here.read, here.write, dim=1)),
    }  # fmt: skip
    if found.embedding is not None:
        arrays |= ranked("tokens_in", here.read, here.norm.module(found.embedding[:vocabulary]), here.read_bias, keep)
    if found.head is not None and found.final_norm is not None:
        head = found.head[:vocabulary]
        arrays |= ranked("tokens_out", found.final_norm.along(here.write), head - head.mean(dim=0), None, keep)
    if after is not None:
        arrays |= ranked("successors", after.norm.along(here.write), after.read, None, keep)
        if after.attention_norm is not None:
            arrays |= _shares_out(after.subspaces, after.attention_norm, here.write)
    if before is not None:
        arrays |= ranked("predecessors", here.norm.before(here.read), before.write, None, keep)
    if here.output is not None:
        arrays["heads_in"] = _shares(torch.einsum("kdp,nd->nkp", here.output, here.norm.before(here.read)))
    return arrays


def ranked(
    name: str, neurons: Float[Tensor, "neurons d_model"], others: Float[Tensor, "others d_model"],
    bias: Float[Tensor, " neurons"] | None, keep: int,
) -> Arrays:  # fmt: skip
    """The others with the largest and with the smallest inner products (plus a bias) of each neuron."""
    count = min(keep, len(others))
    parts: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(neurons), _BLOCK):
        rows = slice(first, first + _BLOCK)
        scores = neurons[rows] @ others.T
        if bias is not None:
            scores += bias[rows, None]
        for end in ("largest", "smallest"):
            top = scores.topk(count, dim=1, largest=end == "largest")
            parts.setdefault(f"{name}.{end}.index", []).append(_numpy(top.indices, np.int32))
            parts.setdefault(f"{name}.{end}.value", []).append(_numpy(top.values))
    return {key: np.concatenate(values) for key, values in parts.items()}


def _shares_out(subspaces: Mapping[str, Tensor], norm: Norm, write: Tensor) -> Arrays:
    return {
        f"heads_out.{name}": _shares(torch.einsum("kpd,nd->nkp", projection, norm.along(write)))
        for name, projection in subspaces.items()
    }


def _shares(projected: Float[Tensor, "neurons heads p"]) -> Float[np.ndarray, "neurons heads"]:
    """Squared lengths, divided by their sum; zeros where that is zero."""
    lengths = projected.square().sum(dim=2)
    return _numpy(lengths / lengths.sum(dim=1, keepdim=True).clamp(min=torch.finfo(lengths.dtype).tiny))


@torch.inference_mode()
def tokens_alone(
    subject: Subject, *, vocabulary: int, start: int | None, device: torch.device, bar: ProgressBar,
    keep: int = KEEP, batch: int = 256,
) -> dict[int, Arrays]:  # fmt: skip
    """The tokens on which each neuron is strongest when the model reads nothing but `start` and that token.

    Without a `start` (a tokenizer that has none), the token alone. Only codes above 0 are listed; -1 fills up.
    """
    best: dict[int, tuple[Tensor, Tensor]] = {}
    for first in range(0, vocabulary, batch):
        ids = torch.arange(first, min(first + batch, vocabulary), device=device)
        rows = ids[:, None] if start is None else torch.stack([torch.full_like(ids, start), ids], dim=1)
        for layer, codes in subject.forward(rows).items():
            values, tokens = codes[:, -1].T, ids.expand(codes.shape[2], -1)
            if layer in best:
                values, tokens = torch.cat([best[layer][0], values], 1), torch.cat([best[layer][1], tokens], 1)
            top = values.topk(min(keep, values.shape[1]), dim=1)
            best[layer] = top.values, tokens.gather(1, top.indices)
        bar.advance(len(ids))
    return {
        layer: {
            "tokens_alone.largest.index": _numpy(torch.where(values > 0, tokens, -1), np.int32),
            "tokens_alone.largest.value": _numpy(values.clamp(min=0)),
        }
        for layer, (values, tokens) in best.items()
    }  # fmt: skip


def _numpy(values: Tensor, kind: type = np.float32) -> np.ndarray:
    return values.detach().cpu().numpy().astype(kind)
