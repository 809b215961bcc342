"""Measure reconstruction and loss of an autoencoder, in two passes over held-out text.

The first pass compares activations with their reconstructions. The second replaces the activation with the
reconstruction, the mean activation and zeros, and measures the loss of the model for each.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Integer
from torch import Tensor, nn

from cratelm.activations.subject import Corpus, Subject
from cratelm.errors import CrateError
from cratelm.runtime import ProgressBar
from cratelm.sae.autoencoder import Autoencoder
from cratelm.sae.splicing import Replacement, spliced_losses
from cratelm.training.document_means import mean_over_documents

EDGES = np.linspace(-7, 0, 29)
"""Edges of the bins of log10 density; sparser latents are counted in the first bin."""


@dataclass(frozen=True, kw_only=True)
class HeldOutRows:
    """Held-out text in rows of the model's context; each token after the first is predicted once."""

    tokens: Integer[np.ndarray, " stream"]
    context: int
    at_once: int

    @property
    def predicted(self) -> int:
        """Number of predicted tokens: whole rows, or one shorter row if the text is shorter."""
        whole = (len(self.tokens) - 1) // self.context * self.context
        return whole or len(self.tokens) - 1

    def __iter__(self) -> Iterator[Int[Tensor, "rows longer"]]:
        """Batches of rows with one more token than the model reads; the last token is only predicted."""
        length = min(self.context, self.predicted)
        starts = np.arange(0, self.predicted, length)
        for first in range(0, len(starts), self.at_once):
            index = starts[first : first + self.at_once, None] + np.arange(length + 1)
            yield torch.from_numpy(self.tokens[index].astype(np.int64))


class Reconstruction:
    """Sums over tokens that compare activations x, latents f and reconstructions x'.

    | number                  | formula                                                              |
    |-------------------------|----------------------------------------------------------------------|
    | l0                      | mean of the number of f_i > 0                                        |
    | fvu                     | sum ||x - x'||^2 / sum ||x - mean x||^2                              |
    | explained_variance      | 1 - Var(x - x') / Var(x), Var summed over dimensions                 |
    | cosine                  | mean of <x, x'> / (||x|| ||x'||), over tokens where both are not 0    |
    | norm_ratio              | mean of ||x'|| / ||x||, over tokens where x is not 0                 |
    | relative_bias           | mean ||x'||^2 / mean <x, x'>: above 1 too large, below 1 shrunk      |
    | dead_share              | share of latents that fired on none of the tokens                    |
    """

    def __init__(self, d_in: int, width: int, device: torch.device) -> None:
        self.count = 0
        self.sums: dict[str, float] = {}
        self.x = torch.zeros(d_in, dtype=torch.float64, device=device)
        self.error = torch.zeros_like(self.x)
        self.fired = torch.zeros(width, dtype=torch.int64, device=device)

    def update(
        self, x: Float[Tensor, "tokens d_in"], latents: Float[Tensor, "tokens width"], out: Float[Tensor, "tokens d_in"]
    ) -> None:
        """Add tokens."""
        self.count += len(x)
        self.fired += (latents > 0).sum(dim=0)
        # Differences of large sums of squares need float64.
        x, out = x.double(), out.double()
        self.x += x.sum(dim=0)
        self.error += (x - out).sum(dim=0)
        norm, norm_out, product = x.norm(dim=1), out.norm(dim=1), (x * out).sum(dim=1)
        both, nonzero = (norm > 0) & (norm_out > 0), norm > 0
        sums = {
            "squares": norm.square().sum(), "errors": (x - out).square().sum(), "out": norm_out.square().sum(),
            "product": product.sum(), "cosine": (product / (norm * norm_out))[both].sum(), "both": both.sum(),
            "ratio": (norm_out / norm)[nonzero].sum(), "nonzero": nonzero.sum(),
        }  # fmt: skip
        self.sums = {name: self.sums.get(name, 0.0) + float(value) for name, value in sums.items()}

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """The mean activation."""
        return (self.x / self.count).float()

    @property
    def density(self) -> Float64[np.ndarray, " width"]:
        """Share of tokens on which each latent fired."""
        return (self.fired.double() / self.count).cpu().numpy()

    def result(self) -> dict[str, float | None]:
        """The numbers of the table; None where the divisor is 0."""
        sums, count = self.sums, self.count
        spread = sums["squares"] - float((self.x**2).sum()) / count
        error_spread = sums["errors"] - float((self.error**2).sum()) / count
        return {
            "l0": float(self.fired.sum()) / count, "fvu": _ratio(sums["errors"], spread),
            "explained_variance": None if spread <= 0 else 1 - error_spread / spread,
            "cosine": _ratio(sums["cosine"], sums["both"]), "norm_ratio": _ratio(sums["ratio"], sums["nonzero"]),
            "relative_bias": _ratio(sums["out"], sums["product"]),
            "dead_share": float((self.fired == 0).double().mean()),
        }  # fmt: skip


def evaluate_sae(
    model: nn.Module, sae: Autoencoder, subject: Subject, corpus: Corpus, *, max_tokens: int | None, at_once: int,
    bar: ProgressBar, unigram: Callable[[Integer[np.ndarray, " predicted"]], float],
) -> dict[str, Any]:  # fmt: skip
    """All numbers of one autoencoder on held-out tokens, as evaluation.json stores them.

    `unigram` maps tokens to the loss of predicting them by frequency alone, the baseline of a model that lost all else.
    """
    tokens = corpus.tokens if max_tokens is None else corpus.tokens[: max_tokens + 1]
    if len(tokens) < 2:
        raise CrateError(
            f"--tokens must leave at least 2 tokens to evaluate, got {len(tokens)}. Hint: tokenize more text"
        )
    rows = HeldOutRows(tokens=tokens, context=subject.context, at_once=at_once)
    sae.check_width(subject.layers[sae.layer])
    device, path = next(model.parameters()).device, sae.place(model)
    seen = Reconstruction(sae.d_in, sae.width, device)
    for batch in rows:
        x = subject.forward(batch[:, :-1].to(device))[sae.layer].flatten(0, 1)
        latents = sae.encode(x)
        seen.update(x, latents, sae.decode(latents))
        bar.advance(len(x))
    edits: dict[str, Replacement | None] = {
        "clean": None, "sae": sae, "zero": torch.zeros_like,
        "mean": lambda x: seen.mean.to(x.dtype).expand_as(x),
    }  # fmt: skip
    losses: dict[str, list[np.ndarray]] = {name: [] for name in edits}
    for batch in rows:
        for name, change in edits.items():
            changes = None if change is None else {path: change}
            batch_losses = spliced_losses(model, batch.to(device), changes, subject.row_beginning or ())
            losses[name].append(batch_losses.double().cpu().numpy().ravel())
        bar.advance(batch[:, 1:].numel())
    flat = {name: np.concatenate(parts) for name, parts in losses.items()}
    owner = np.searchsorted(corpus.documents, np.arange(1, rows.predicted + 1), side="right") - 1
    return {
        "tokens": rows.predicted, "documents": len(np.unique(owner)), **seen.result(),
        **costs(flat, owner, unigram(tokens[1 : rows.predicted + 1])),
        "decoder_cosine": float(nearest_cosine(sae.W_dec).mean()), "log_density": histogram(seen.density),
    }  # fmt: skip


def costs(
    losses: Mapping[str, Float64[np.ndarray, " predicted"]],
    owner: Int[np.ndarray, " predicted"],
    unigram: float,
) -> dict[str, Any]:
    """The losses in nats per token, CE added with its standard error, and the shares recovered.

    Recovered is (CE_ablated - CE_sae) / (CE_ablated - CE), not clipped. CE_ablated is the loss with zeros or the mean
    (the kept share of the layer's effect) or the unigram loss (the kept share of the model's gain over frequencies).
    """
    means = {name: float(values.mean()) for name, values in losses.items()}
    added = losses["sae"] - losses["clean"]

    def kept(ablated: float) -> float | None:
        return (ablated - means["sae"]) / (ablated - means["clean"]) if ablated > means["clean"] else None

    return {
        "ce": means["clean"], "ce_sae": means["sae"], "ce_zero": means["zero"], "ce_mean": means["mean"],
        "ce_unigram": unigram, "ce_added": float(added.mean()), "ce_added_error": standard_error(added, owner),
        "recovered_zero": kept(means["zero"]), "recovered_mean": kept(means["mean"]), "kept_model": kept(unigram),
    }  # fmt: skip


def standard_error(values: Float64[np.ndarray, " tokens"], owner: Int[np.ndarray, " tokens"]) -> float | None:
    """Standard error of a mean over tokens with documents as the sampling unit; None for one document."""
    _, document = np.unique(owner, return_inverse=True)
    sizes = np.bincount(document)
    return float(mean_over_documents(np.bincount(document, values), sizes)[1]) if len(sizes) > 1 else None


def unigram_loss(counts: Int[np.ndarray, " vocab"], tokens: Integer[np.ndarray, " predicted"]) -> float:
    """Mean of -log p(token) in nats, with p from counts of another text and add-one smoothing."""
    p = (counts + 1) / (counts + 1).sum()
    return float(-np.log(p[tokens.astype(np.int64)]).mean())


def histogram(density: Float64[np.ndarray, " width"]) -> dict[str, Any]:
    """Histogram of log10 density; dead latents are counted separately."""
    alive = density[density > 0]
    counts, _ = np.histogram(np.log10(alive).clip(EDGES[0], EDGES[-1]), EDGES)
    return {"edges": EDGES.round(4).tolist(), "counts": counts.tolist(), "dead": int((density == 0).sum())}


@torch.no_grad()
def nearest_cosine(directions: Float[Tensor, "width d_in"]) -> Float[Tensor, " width"]:
    """For each latent, the largest cosine between its decoder row and another's."""
    unit = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
    nearest = []
    for first in range(0, len(unit), 1024):
        cosines = unit[first : first + 1024] @ unit.T
        cosines[torch.arange(len(cosines)), first + torch.arange(len(cosines))] = -1
        nearest.append(cosines.max(dim=1).values)
    return torch.cat(nearest)


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 else None
