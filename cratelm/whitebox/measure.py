"""White-box measurements: how each layer changes the objective that CRATE is derived from, on real tokens.

Sets of tokens are whole contexts of consecutive text. Rates are computed per set, sparsities per token.
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
    penalty_per_token,
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
"""lambda of the sparse objective for a model without one: CRATE's default, so that the two can be compared."""
CONVERGED_TOKENS = 256
"""Tokens on which the objective is followed until it converges."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureConfig:
    """What to measure on."""

    tokens: int = 32_768
    """Most tokens to read, in whole sets."""
    epsilon: float = EPSILON
    """Precision of the coding rates."""
    tolerance: float = 1e-3
    """Codes up to this value count as zero in `active_within_tolerance`."""
    converged: bool = True
    """Whether to follow the LASSO objective on some tokens until it converges."""


def measure(
    model: LanguageModel, tokens: Integer[np.ndarray, " stream"], config: MeasureConfig, *, bar: ProgressBar
) -> dict[str, Any]:
    """All measurements of all layers, as whitebox.json holds them (`docs/formats.md`).

    Raises CrateError if the stream is shorter than a set: as many tokens as the model is wide, in whole contexts.
    """
    width, context = model.config.d_model, model.config.context_length
    size = tokens_needed(width, context)
    available = min(len(tokens), config.tokens)
    check_tokens(available, width, context)
    sets = available // size
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
    """Run a forward pass over some sets and add its activations to the measurements of every layer."""
    with capture(model, [tap for layer in layers for tap in layer.taps]) as seen:
        model.features(rows)
    for layer in layers:
        layer.see({tap: seen[tap].flatten(0, 1) for tap in layer.taps}, sets)


class _Layer:
    """Running measurements of one layer."""

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
        """Add the activations of some sets."""
        self.sets = sets
        normed, code = seen[self.normed], seen[self.neurons]
        before = self._see_rates("before", normed)
        after = self._see_rates("after", normed + seen[self.attended])
        penalty = torch.tensor([PENALTY]) if self.ista is None else penalties(self.ista)
        for name in after:
            self._note(self.rates, f"rate_reduction.change.{name}", after[name] - before[name])
            whole = sparse_objective(after[name], code.unflatten(0, (sets, -1)), penalty)
            self._note(self.rates, f"sparse_objective.{name}", whole)
        self._note(self.values, "penalty_per_token", penalty_per_token(code, penalty))
        self.fired |= (code != 0).any(dim=0)
        if self.ista is None:
            self._see_code(1, code)
        else:
            self._see_steps(self.ista, seen[self.coded])

    def _see_rates(self, when: str, z: Float[Tensor, "tokens d_model"]) -> dict[str, Float[Tensor, " sets"]]:
        """Add the rates of tokens after the norm before the attention.

        Returns the rate reduction of each set, by the name of the heads' projection.
        """
        tokens, epsilon = z.unflatten(0, (self.sets, -1)).cpu(), self.config.epsilon
        rate, reductions = coding_rate(tokens, epsilon=epsilon), {}
        self._note(self.rates, f"rate.{when}", rate)
        for name, heads in self.subspaces.items():
            heads = heads.cpu()
            self._note(self.rates, f"subspace_rate.{when}.{name}", subspace_rate(tokens, heads, epsilon=epsilon))
            orthonormal_rate = subspace_rate(tokens, orthonormal(heads), epsilon=epsilon)
            self._note(self.rates, f"orthonormal_rate.{when}.{name}", orthonormal_rate)
            reductions[name] = rate - orthonormal_rate
            self._note(self.rates, f"rate_reduction.{when}.{name}", reductions[name])
            unit = normalised_rate(projections(tokens, heads), epsilon=epsilon)
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
        """Append the mean over each set."""
        where.setdefault(name, []).extend(values.double().unflatten(0, (self.sets, -1)).mean(dim=1).tolist())

    def result(self) -> dict[str, Any]:
        """The layer's entry in whitebox.json."""
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


def logged_numbers(layer: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of one layer that `--measure whitebox` logs during training, by name."""
    name = next(iter(layer["normalised_rate"]["before"]))
    name = "value" if "value" in layer["normalised_rate"]["before"] else name
    yield "rate", layer["rate"]["before"]["mean"]
    for when in ("before", "after"):
        yield f"orthonormal_rate_{when}", layer["orthonormal_rate"][when][name]["mean"]
        yield f"rate_reduction_{when}", layer["rate_reduction"][when][name]["mean"]
    yield "sparse_objective", layer["sparse_objective"][name]["mean"]
    reduction = layer["rate_reduction"]["after"][name]["mean"]
    yield "sparse_objective_per_token", reduction - layer["penalty_per_token"]["mean"]
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
