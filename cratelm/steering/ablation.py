"""Ablate neurons: the change of loss on held-out text when neurons are removed, paired document by document.

A neuron's activation is set to zero, or to its mean over the text, at every token. Three methods give the same numbers:

    direct   one forward pass per neuron with an edited code: any model, any set of neurons
    resumed  `LanguageModel`s: a layer's output is linear in its code, so the output is moved and only later layers run
    exact    last layer: the logits are linear up to sigma, so no layer runs at all (`readout.py`):

        logits' = (U - delta W_j) / sigma' + c,     sigma'^2 = s - 2 delta cov(x, d_j) + delta^2 var(d_j)

    with U and W the products of the head with x and d_j, and delta the change of the activation.

With `zero`, tokens (exact) and windows (otherwise) on which the neuron is silent are skipped: their loss is unchanged.

A latent of a sparse autoencoder is ablated in the same way with the autoencoder's error kept: the activation moves by
(level - f_j) d_j and the other latents stay. If the autoencoder encodes the neurons, the fast methods apply to it too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int, Integer
from torch import Tensor, nn

from cratelm.activations.causal_model import USUAL_CONTEXT, causal_model
from cratelm.activations.taps import Edit, capture, edit
from cratelm.errors import CrateError
from cratelm.steering.ablation_file import AblationKind
from cratelm.steering.changes import Change
from cratelm.steering.generate import check_finite
from cratelm.steering.intervention import Intervention
from cratelm.steering.place import NeuronPlace, SparseCoder, check_coder, neuron_places
from cratelm.steering.readout import Readout, find_readout
from cratelm.steering.steer import steer
from cratelm.training.evaluate import passes

AblationMethod = Literal["auto", "direct"]
LOGITS_PER_PASS = 1 << 24
EXACT_AT_ONCE = {"cpu": 1 << 19}
"""Logits per chunk of the exact method, by device type; on a CPU the chunk must fit the cache."""
WINDOWS_AT_ONCE = 32
"""Windows per pass through the later layers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Documents of a split, in windows of the model's context, as `evaluate` reads them."""

    tokens: Integer[np.ndarray, " stream"]
    documents: Int[np.ndarray, " bounds"]
    """Start of each document, then the end of the last."""
    context: int
    """Tokens per window."""
    real: Bool[np.ndarray, " stream"]
    """False for tokens that are input only, their own loss is ignored: the end token that replaces the rest of a
    truncated document, and the beginnings of windows."""
    begins: Bool[np.ndarray, " stream"] | None = None
    """True for the tokens with which every window of the model begins; None without any."""

    @property
    def sizes(self) -> Float64[np.ndarray, " documents"]:
        """Number of scored tokens per document; the first token of the stream has no prediction."""
        return self.by_document(1, np.ones(len(self.tokens) - 1))

    def by_document(self, first: int, values: Float64[np.ndarray, " predicted"]) -> Float64[np.ndarray, " documents"]:
        """Sum per document over scored tokens; `values[i]` belongs to token `first + i`."""
        scored = np.where(self.real[first : first + len(values)], values, 0.0)
        return np.bincount(self.owner(first, len(values)), scored, len(self.documents) - 1)

    def owner(self, first: int, count: int) -> Int[np.ndarray, " predicted"]:
        """The document of each of `count` tokens from index `first` on."""
        return np.searchsorted(self.documents, np.arange(first, first + count), side="right") - 1

    def batches(self, rows: int) -> Iterator[tuple[int, Int[Tensor, "rows context"], Int[Tensor, "rows context"]]]:
        """(index of the first target, inputs, targets) of each batch."""
        for first, count, length in passes(len(self.tokens) - 1, self.context, rows):
            piece = torch.from_numpy(self.tokens[first : first + count * length + 1].astype(np.int64))
            yield first + 1, piece[:-1].view(count, length), piece[1:].view(count, length)


def held_out(
    tokens: Integer[np.ndarray, " stream"], documents: Int[np.ndarray, " bounds"], model: nn.Module, limit: int | None,
    begin: Sequence[int] = (),
) -> HeldOut:  # fmt: skip
    """All tokens, or about `limit` tokens from the beginnings of the first documents; `begin` before every window.

    With a limit, at most one context of each document is read, so that many documents count and a standard error over
    documents is meaningful. A truncated document gets its end token, which is not scored. Needs at least 2 tokens.
    """
    context = min(causal_model(model).context_length or USUAL_CONTEXT, USUAL_CONTEXT) - len(begin)
    real = np.ones(len(tokens), dtype=np.bool_)
    if limit is not None:
        lengths = np.minimum(np.diff(documents), context)
        count = min(int(np.searchsorted(lengths.cumsum(), limit)) + 1, len(lengths))
        pieces = []
        for start, end, length in zip(documents[:count], documents[1 : count + 1], lengths[:count], strict=True):
            pieces += [tokens[start : start + length - 1], tokens[end - 1 : end]]
        tokens = np.concatenate(pieces)
        truncated = np.diff(documents)[:count] > context
        documents = np.concatenate([[0], lengths[:count].cumsum()])
        real = np.ones(len(tokens), dtype=np.bool_)
        real[documents[1:][truncated] - 1] = False
    if len(tokens) < 2:
        raise CrateError(f"the held-out text must have at least 2 tokens, got {len(tokens)}. Tokenize more text")
    text = HeldOut(tokens=tokens, documents=documents, context=context, real=real)
    return _begun(text, begin) if begin else text


def _begun(text: HeldOut, begin: Sequence[int]) -> HeldOut:
    """The text with the same tokens before every window, which is longer by their number."""
    places = np.repeat(np.arange(0, len(text.tokens), text.context), len(begin))
    documents = text.documents + len(begin) * (text.documents // text.context + 1)
    tokens = np.insert(text.tokens, places, np.resize(begin, len(places)))
    documents[0], documents[-1] = 0, len(tokens)
    begins = np.insert(np.zeros(len(text.tokens), dtype=np.bool_), places, True)
    return HeldOut(
        tokens=tokens, documents=documents, context=text.context + len(begin), begins=begins,
        real=np.insert(text.real, places, False),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class _Target:
    """Neurons of a layer and the activations that replace theirs."""

    place: NeuronPlace
    index: Int[Tensor, " neurons"]
    level: Float[Tensor, " neurons"]


@dataclass
class Ablation:
    """The losses of a text under a model, and their change when neurons are ablated."""

    model: nn.Module
    text: HeldOut
    layers: Sequence[int]
    """Layers whose neurons will be ablated."""
    coders: Mapping[int, SparseCoder] = field(default_factory=dict)
    """Layer -> sparse autoencoder, whose latents are then ablated instead of the layer's neurons."""
    places: Mapping[int, NeuronPlace] = field(init=False)
    readout: Readout | None = field(init=False)
    """None if the logits are not sums over neurons."""
    plain: Float64[np.ndarray, " predicted"] = field(init=False)
    """Loss of every predicted token under the intact model, in nats."""
    means: dict[int, Tensor] = field(init=False)
    """Mean activation of each neuron over the text."""
    densities: dict[int, Float64[np.ndarray, " neurons"]] = field(init=False)
    """Share of tokens on which each neuron is above 0."""

    def __post_init__(self) -> None:
        self.causal = causal_model(self.model)
        self.model = self.causal.module
        neurons = neuron_places(self.model)
        self.places = dict(neurons)
        for layer, coder in self.coders.items():
            check_coder(self.model, coder)
            self.places[layer] = _latent_place(neurons.get(layer), coder)
        try:
            self.readout = find_readout(self.model)
        except CrateError:
            self.readout = None
        self._measure_intact()

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def _measure_intact(self) -> None:
        taps = {layer: self.places[layer].tap for layer in self.layers}
        sums: dict[int, Tensor] = {}
        fires: dict[int, Tensor] = {}
        losses = []
        begins, count = self.text.begins, len(self.text.tokens) - 1
        for first, inputs, targets in self._batches():
            with capture(self.model, taps.values()) as codes:
                losses.append(self.causal.token_losses(inputs, targets).flatten())
            for layer, tap in taps.items():
                code = self._code(layer, codes[tap].flatten(0, -2))
                if begins is not None:
                    code = code[torch.from_numpy(~begins[first - 1 : first - 1 + len(code)])]
                sums[layer] = sums.get(layer, 0) + code.double().sum(0)
                fires[layer] = fires.get(layer, 0) + (code > 0).double().sum(0)
        self.plain = torch.cat(losses).double().cpu().numpy()
        if not np.isfinite(self.plain).all():
            raise CrateError("the loss of this model is not finite: its training has diverged. Train it again")
        count -= 0 if begins is None else int(begins[:count].sum())
        self.means = {layer: total / count for layer, total in sums.items()}
        self.densities = {layer: (total / count).cpu().numpy() for layer, total in fires.items()}

    def _batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        vocabulary = self.readout.head.shape[0] if self.readout is not None else 50304
        rows = max(1, min(WINDOWS_AT_ONCE, LOGITS_PER_PASS // (vocabulary * self.text.context)))
        for first, inputs, targets in self.text.batches(rows):
            yield first, inputs.to(self.device), targets.to(self.device)

    def _target(self, layer: int, neurons: Sequence[int], kind: AblationKind) -> _Target:
        index = torch.tensor(list(neurons), device=self.device)
        level = self.means[layer][index] if kind == "mean" else torch.zeros(len(index), device=self.device).double()
        return _Target(place=self.places[layer], index=index, level=level)

    @torch.inference_mode()
    def each(
        self, layer: int, neurons: Sequence[int], kind: AblationKind, *, method: AblationMethod = "auto"
    ) -> Float64[np.ndarray, "neurons documents"]:
        """Summed change of loss of every document, in nats, when each neuron is ablated alone."""
        target = self._target(layer, neurons, kind)
        fast = method == "auto" and (layer not in self.coders or bool(target.place.written))
        exact = fast and self.readout is not None and layer == self.readout.place.layer
        resumed = fast and not exact and self.causal.losses_from is not None
        block = self.readout.block if exact and self.readout is not None else f"blocks.{layer}"
        taps = [target.place.tap, *([block] if exact or resumed else [])]
        total = np.zeros((len(target.index), len(self.text.sizes)))
        for first, inputs, targets in self._batches():
            with capture(self.model, taps) as seen:
                self.causal.read(inputs, taps)
            code = self._code(layer, seen[target.place.tap].reshape(*inputs.shape, -1))[..., target.index]
            delta = code - target.level.to(code)
            if exact:
                change = self._exactly(seen[block].flatten(0, 1), delta.flatten(0, 1), targets.flatten(), target)
            else:
                change = self._rerun(target, delta, inputs, targets, seen[block] if resumed else None)
            for row, values in enumerate(change.reshape(len(target.index), -1).double().cpu().numpy()):
                total[row] += self.text.by_document(first, values)
        return total

    def _exactly(
        self, x: Float[Tensor, "tokens d_model"], delta: Float[Tensor, "tokens neurons"],
        targets: Int[Tensor, " tokens"], target: _Target,
    ) -> Float[Tensor, "neurons tokens"]:  # fmt: skip
        readout = self.readout
        assert readout is not None
        cx, cd = readout.centred(x), readout.centred(target.place.directions[target.index].to(x))
        variance, variance_d = cx.square().mean(1) + readout.epsilon, cd.square().mean(1)
        covariance = cx @ cd.T / x.shape[1]
        logits_x, logits_d = (cx * readout.gain) @ readout.head.T, (cd * readout.gain) @ readout.head.T
        constant = readout.bias @ readout.head.T + (0 if readout.head_bias is None else readout.head_bias)
        change = torch.zeros(len(cd), len(x), dtype=x.dtype, device=x.device)
        rows = max(1, EXACT_AT_ONCE.get(x.device.type, LOGITS_PER_PASS) // logits_x.shape[1])
        before = _cross_entropy(logits_x / readout.sigma(x) + constant, targets)
        for neuron in range(len(cd)):
            for tokens in delta[:, neuron].nonzero().squeeze(1).split(rows):
                step = delta[tokens, neuron]
                sigma = torch.ones_like(step)
                if readout.kind != "none":
                    sigma = variance[tokens] - 2 * step * covariance[tokens, neuron] + step * step * variance_d[neuron]
                    sigma = sigma.sqrt()
                logits = torch.addr(logits_x[tokens], step, logits_d[neuron], alpha=-1)
                logits = logits.div_(sigma[:, None]).add_(constant)
                change[neuron, tokens] = _cross_entropy(logits, targets[tokens]) - before[tokens]
        return change

    def _rerun(
        self, target: _Target, delta: Tensor, inputs: Tensor, targets: Tensor, x: Tensor | None
    ) -> Float[Tensor, "neurons rows seq"]:
        """Run the later layers from the moved output x; if x is None, run the whole model with an edited code."""
        layer, index = target.place.layer, target.index
        later, losses_of = self.causal.losses_from, self.causal.token_losses
        plain = losses_of(inputs, targets) if x is None or later is None else later(layer + 1, x, targets)
        change = torch.zeros(len(index), *targets.shape, dtype=plain.dtype, device=plain.device)
        # Pairs of a neuron and a window on which the ablation changes an activation.
        for pairs in (delta != 0).any(1).T.nonzero().split(WINDOWS_AT_ONCE):
            neuron, row = pairs.unbind(1)
            if x is None or later is None:
                set_one = partial(_set_one, neuron=index[neuron], level=target.level[neuron])
                with edit(self.model, {target.place.tap: self._edit(layer, set_one)}):
                    losses = losses_of(inputs[row], targets[row])
            else:
                move = delta[row, :, neuron][..., None] * target.place.directions[index[neuron]][:, None].to(x)
                losses = later(layer + 1, x[row] - move, targets[row])
            change[neuron, row] = losses - plain[row]
        return change

    def _code(self, layer: int, value: Tensor) -> Tensor:
        """The activations of the layer's neurons or latents, from the value of its tap."""
        return self.coders[layer].encode(value).to(value) if layer in self.coders else value

    def _edit(self, layer: int, change: Edit) -> Edit:
        """An edit of the layer's neurons or latents as an edit of its tap."""
        if layer not in self.coders:
            return change
        coder = self.coders[layer]

        def edit_latents(x: Tensor) -> Tensor:
            latents = coder.encode(x)
            return x + (coder.decode(change(latents)) - coder.decode(latents)).to(x)

        return edit_latents

    @torch.inference_mode()
    def together(self, neurons: Sequence[tuple[int, int]], kind: AblationKind) -> Float64[np.ndarray, " documents"]:
        """Summed change of loss of every document, in nats, when all (layer, neuron) are ablated together."""
        changes = [
            Change(
                layer=layer, index=neuron, how="set", latent=layer in self.coders,
                value=float(self.means[layer][neuron]) if kind == "mean" else 0.0,
            )
            for layer, neuron in neurons
        ]  # fmt: skip
        intervention = Intervention(changes=changes, coders=list(self.coders.values()))
        total = np.zeros(len(self.text.sizes))
        for first, inputs, targets in self._batches():
            with steer(self.model, intervention):
                losses = self.causal.token_losses(inputs, targets).flatten().double().cpu().numpy()
            check_finite(torch.from_numpy(losses)[None], intervention)
            total += self.text.by_document(first, losses - self.plain[first - 1 : first - 1 + len(losses)])
        return total


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _latent_place(neurons: NeuronPlace | None, coder: SparseCoder) -> NeuronPlace:
    """The latents as a place; `written` is empty if no linear map leads from their output to the residual stream."""
    if neurons is not None and coder.tap == neurons.tap:
        directions = coder.directions @ neurons.directions.to(coder.directions)
        return replace(neurons, directions=directions)
    return NeuronPlace(layer=coder.layer, tap=coder.tap, written="", directions=coder.directions)


def _set_one(code: Tensor, neuron: Tensor, level: Tensor) -> Tensor:
    """Set one neuron per row to its level."""
    new = code.clone().unflatten(0, (len(neuron), -1)) if code.ndim == 2 else code.clone()
    new[torch.arange(len(neuron)), :, neuron] = level.to(new)[:, None]
    return new.view_as(code)
