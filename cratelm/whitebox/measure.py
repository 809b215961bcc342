"""The white-box view of a model: what each layer does to the objective it was derived from, on real tokens.

Sets of tokens are whole contexts of consecutive text; a rate is taken for each set, a sparsity for each token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from cratelm.activations.taps import INPUT, capture
from cratelm.model.language_model import LanguageModel
from cratelm.runtime import ProgressBar
from cratelm.whitebox.coding_rate import (
    EPSILON,
    check_tokens,
    coding_rate,
    normalised_rate,
    orthonormal,
    projections,
    sparse_objective,
    subspace_rate,
    tokens_needed,
)
from cratelm.whitebox.sparse_coding import (
    codes_by_step,
    dictionary_of,
    hoyer,
    least_objective,
    objective,
    overlap,
    penalties,
    reconstruction_error,
)
from cratelm.whitebox.wiring import own_subspaces

_PASS_TOKENS = 4096  # of a forward pass, or one set if that is more
PENALTY = 0.1
"""lambda of the sparse objective for a model that has none: CRATE's own, so that both can be compared."""
CONVERGED_TOKENS = 256
"""Tokens on which the objective is followed until it converges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureConfig:
    """What to measure on."""

    tokens: int = 32_768
    """Tokens to read, at most; whole sets of them."""
    epsilon: float = EPSILON
    """Precision of the coding rates."""
    tolerance: float = 1e-3
    """A code up to this counts as zero where a share is said to be within tolerance."""
    converged: bool = True
    """Whether to follow the LASSO objective on some tokens until it converges."""


def measure(
    model: LanguageModel, tokens: Integer[np.ndarray, " stream"], config: MeasureConfig, *, bar: ProgressBar
) -> dict[str, Any]:
    """All measurements of all layers, as whitebox.json holds them (`docs/formats.md`).

    Raises CrateError where the stream holds no whole set: as many tokens as the model is wide, in whole contexts.
    """
    width, context = model.config.d_model, model.config.context_length
    size = tokens_needed(width, context)
    found = min(len(tokens), config.tokens)
    check_tokens(found, width, context)
    sets = found // size
    layers = [_Layer(model, layer, config) for layer in range(model.config.num_layers)]
    together = max(1, _PASS_TOKENS // size)
    for first in range(0, sets, together):
        count = min(together, sets - first)
        piece = torch.from_numpy(tokens[first * size : (first + count) * size].astype(np.int64)).to(model.device)
        _read(model, piece.view(-1, context), count, layers)
        bar.advance(count * size)
    return {
        "tokens": sets * size, "sets": sets, "tokens_per_set": size, "width": width, "epsilon": config.epsilon,
        "tolerance": config.tolerance, "layers": [layer.result() for layer in layers],
    }  # fmt: skip


@torch.no_grad()
def _read(model: LanguageModel, rows: Int[Tensor, "rows context"], sets: int, layers: Sequence["_Layer"]) -> None:
    """One forward pass over some sets; each layer takes note of what passed through it."""
    with capture(model, [tap for layer in layers for tap in layer.taps]) as seen:
        model.features(rows)
    for layer in layers:
        layer.see({tap: seen[tap].flatten(0, 1) for tap in layer.taps}, sets)


class _Layer:
    """What is known of one layer so far."""

    def __init__(self, model: LanguageModel, layer: int, config: MeasureConfig) -> None:
        self.layer, self.config = layer, config
        self.block: Any = model.blocks[layer]
        self.ista = getattr(self.block, "ista", None)
        attention = "mssa" if hasattr(self.block, "mssa") else "attention"
        self.subspaces = own_subspaces(getattr(self.block, attention))
        path = f"blocks.{layer}."
        self.normed, self.attended = f"{path}norm_1", f"{path}{attention}"
        self.coded, self.neurons = f"{path}ista{INPUT}", model.neuron_taps[layer]
        self.taps = [self.normed, self.attended, self.neurons, *([self.coded] if self.ista is not None else [])]
        self.rates: dict[str, list[float]] = {}
        self.values: dict[str, list[float]] = {}
        self.fired = torch.zeros(model.config.num_neurons, dtype=torch.bool, device=model.device)
        self.converged: float | None = None
        self.sets = 1

    def see(self, seen: Mapping[str, Float[Tensor, "tokens width"]], sets: int) -> None:
        """Take in some sets, one after the other."""
        self.sets = sets
        normed, code = seen[self.normed], seen[self.neurons]
        before = self._see_rates("before", normed)
        after = self._see_rates("after", normed + seen[self.attended])
        penalty = torch.tensor([PENALTY]) if self.ista is None else penalties(self.ista)
        for name in after:
            self._note(self.rates, f"rate_reduction.change.{name}", after[name] - before[name])
            whole = sparse_objective(after[name], code.unflatten(0, (sets, -1)), penalty)
            self._note(self.rates, f"sparse_objective.{name}", whole)
        self.fired |= (code != 0).any(dim=0)
        if self.ista is None:
            self._see_code(1, code)
        else:
            self._see_steps(self.ista, seen[self.coded])

    def _see_rates(self, when: str, z: Float[Tensor, "tokens d_model"]) -> dict[str, Float[Tensor, " sets"]]:
        """Rates of the tokens, always by the normalisation that stands before the attention.

        Gives the rate reduction of each set, by the projection of the heads.
        """
        one, epsilon = z.unflatten(0, (self.sets, -1)).cpu(), self.config.epsilon
        rate, reductions = coding_rate(one, epsilon=epsilon), {}
        self._note(self.rates, f"rate.{when}", rate)
        for name, heads in self.subspaces.items():
            heads = heads.cpu()
            self._note(self.rates, f"subspace_rate.{when}.{name}", subspace_rate(one, heads, epsilon=epsilon))
            turned = subspace_rate(one, orthonormal(heads), epsilon=epsilon)
            self._note(self.rates, f"orthonormal_rate.{when}.{name}", turned)
            reductions[name] = rate - turned
            self._note(self.rates, f"rate_reduction.{when}.{name}", reductions[name])
            unit = normalised_rate(projections(one, heads), epsilon=epsilon)
            self._note(self.rates, f"normalised_rate.{when}.{name}", unit)
        return reductions

    def _see_code(self, step: int, code: Float[Tensor, "tokens neurons"]) -> None:
        self._note(self.values, f"active.{step}", (code != 0).double().mean(dim=1))
        self._note(
            self.values, f"active_within_tolerance.{step}", (code.abs() > self.config.tolerance).double().mean(1)
        )
        self._note(self.values, f"hoyer.{step}", hoyer(code))

    def _see_steps(self, ista: Any, x: Float[Tensor, "tokens d_model"]) -> None:
        codes, penalty = codes_by_step(ista, x), penalties(ista)
        zero = objective(x, ista.atoms, penalty, torch.zeros_like(codes[-1]))
        self._note(self.values, "objective_at_zero", zero)
        for step, code in enumerate(codes):
            self._note(self.values, f"objective.{step}", objective(x, ista.atoms, penalty, code))
            self._note(self.values, f"reconstruction_error.{step}", reconstruction_error(x, ista.atoms, code))
            if step > 0:
                self._see_code(step, code)
            if step > 1:
                self._note(self.values, f"support_overlap.{step}", overlap(codes[step - 1] != 0, code != 0))
        if self.config.converged and self.converged is None:
            some = x[:CONVERGED_TOKENS]
            least = least_objective(some, ista.atoms, penalty).sum()
            start, last = zero[: len(some)].sum(), objective(some, ista.atoms, penalty, codes[-1][: len(some)]).sum()
            self.converged = float((start - last) / (start - least).clamp(min=1e-12))

    def _note(self, where: dict[str, list[float]], name: str, values: Tensor) -> None:
        """Keep the mean over each set."""
        where.setdefault(name, []).extend(values.double().unflatten(0, (self.sets, -1)).mean(dim=1).tolist())

    def result(self) -> dict[str, Any]:
        """The layer's part of whitebox.json."""
        nested: dict[str, Any] = {"layer": self.layer}
        for name, values in self.rates.items():
            kind, when, *projection = name.split(".")
            place = nested.setdefault(kind, {}).setdefault(when, {}) if projection else nested.setdefault(kind, {})
            place[projection[0] if projection else when] = _estimate(values)
        for name, values in self.values.items():
            kind, _, step = name.partition(".")
            if step:
                nested.setdefault(kind, {})[step] = _estimate(values)
            else:
                nested[kind] = _estimate(values)
        nested["dead"] = float((~self.fired).double().mean())
        if self.ista is not None:
            nested |= {"converged": self.converged, "penalty": float(penalties(self.ista).mean())}
            nested["dictionary"] = asdict(dictionary_of(self.ista))
        return nested


def _estimate(values: Sequence[float]) -> dict[str, float | None]:
    return {
        "mean": float(np.mean(values)),
        "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }  # fmt: skip


def summary(layer: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of one layer that a curve over training follows, by name."""
    name = next(iter(layer["normalised_rate"]["before"]))
    name = "value" if "value" in layer["normalised_rate"]["before"] else name
    yield "rate", layer["rate"]["before"]["mean"]
    for when in ("before", "after"):
        yield f"orthonormal_rate_{when}", layer["orthonormal_rate"][when][name]["mean"]
        yield f"rate_reduction_{when}", layer["rate_reduction"][when][name]["mean"]
    yield "sparse_objective", layer["sparse_objective"][name]["mean"]
    yield "subspace_rate_before", layer["normalised_rate"]["before"][name]["mean"]
    yield "subspace_rate_after", layer["normalised_rate"]["after"][name]["mean"]
    last = max(layer["active"], key=int)
    yield "active", layer["active"][last]["mean"]
    yield "hoyer", layer["hoyer"][last]["mean"]
    yield "dead", layer["dead"]
    if "dictionary" in layer:
        yield "objective", layer["objective"][last]["mean"] / layer["objective_at_zero"]["mean"]
        yield "reconstruction_error", layer["reconstruction_error"][last]["mean"]
        yield "stability", max(layer["dictionary"]["stability"])
        yield "coherence", layer["dictionary"]["coherence"]
