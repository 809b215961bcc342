"""Directions of neurons: tokens that drive a neuron, tokens it makes probable, neighbours it feeds, and heads.

All are computed from the weights, except `tokens_alone`. r_i is the direction that neuron i reads and w_i the one it
writes (`parts.py`; in CRATE both are the atom d_i), N a norm with gain g, and N'(v) = g * (v - mean(v)) that norm at a
fixed scale (an RMSNorm does not subtract the mean):

    tokens_in      r_i . N(E[t]) + bias_i      the drive of token t's embedding, without position and attention
    tokens_alone   the code itself             when the model reads only t, after what begins a text: the tokens that
                                               the tokenizer puts first, else <|endoftext|> in GPT-2, Pythia and models
                                               of this package; in Qwen and others nothing, so t is the first token,
                                               a position that records leave out and where codes may be unusual
    tokens_out     H[t] . N'(w_i)              logit of t per unit of code and per unit of scale, N the final norm,
                                               minus the mean over all tokens, which changes no probability
    successors     r_j . N'(w_i)               drive of neuron j of the next layer per unit of i's code, past its
                                               attention; predecessors are the same numbers seen from j
    heads_in       |O_k^T N'^T(r_i)|^2         share of head k of the same layer in what can drive i
    heads_out      |U_k N'(w_i)|^2             share of head k of the next layer in what reads i

CRATE has no residual around ISTA, so `tokens_in` is a direct path only in the first layer, and `tokens_out` only in
the last; in other layers they describe where a direction points.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cratelm.activations.subject import Subject
from cratelm.runtime import ProgressBar
from cratelm.whitebox.parts import Norm, Wiring

_KEEP = 20
"""Length of each list, at either end."""
_BLOCK = 256  # neurons whose scores over a whole vocabulary are in memory at once

Arrays = dict[str, np.ndarray]


@torch.no_grad()
def layer_directions(weights: Wiring, layer: int, *, vocabulary: int, keep: int = _KEEP) -> Arrays:
    """The arrays of one layer's file, except `tokens_alone`."""
    this = weights.layers[layer]
    before = weights.layers[layer - 1] if layer > 0 else None
    after = weights.layers[layer + 1] if layer + 1 < len(weights.layers) else None
    arrays: Arrays = {
        "read_norm": _numpy(this.read.norm(dim=1)), "write_norm": _numpy(this.write.norm(dim=1)),
        "read_write_cosine": _numpy(nn.functional.cosine_similarity(this.read, this.write, dim=1)),
    }  # fmt: skip
    if weights.embedding is not None:
        embedding = this.norm.module(weights.embedding[:vocabulary])
        arrays |= ranked("tokens_in", this.read, embedding, this.read_bias, keep)
    if weights.head is not None and weights.final_norm is not None:
        head = weights.head[:vocabulary]
        arrays |= ranked("tokens_out", weights.final_norm.along(this.write), head - head.mean(dim=0), None, keep)
    if after is not None:
        arrays |= ranked("successors", after.norm.along(this.write), after.read, None, keep)
        if after.attention_norm is not None:
            arrays |= _shares_out(after.subspaces, after.attention_norm, this.write)
    if before is not None:
        arrays |= ranked("predecessors", this.norm.before(this.read), before.write, None, keep)
    if this.output is not None:
        arrays["heads_in"] = _shares(torch.einsum("kdp,nd->nkp", this.output, this.norm.before(this.read)))
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
    keep: int = _KEEP, batch: int = 256,
) -> dict[int, Arrays]:  # fmt: skip
    """The tokens on which each neuron is strongest when the model reads only `start` and that token.

    Without a `start`, the model reads only the token. Codes above 0 are listed; the rest of a list is -1.
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
