"""What a model loses when a neuron is taken out: the change of loss on held-out text, paired document by document.

A neuron is set to zero, or to its mean over the text, at every token. Three ways give the same numbers:

    direct   a forward pass for each neuron, with its code edited: any model, any set of neurons
    resumed  our models: what the layer writes is linear, so its output is moved by hand and only later layers run
    exact    last layer: logits too are linear up to sigma, so no layer runs at all (`exit.py`):

        logits' = (U - delta W_j) / sigma' + c,     sigma'^2 = s - 2 delta cov(x, d_j) + delta^2 var(d_j)

    with U and W the head's product with x and d_j, and delta the change of the activation.

With `zero`, tokens (exact) and windows (the others) where the neuron is silent are left out: nothing changes there.

A latent of a sparse autoencoder is taken out likewise, its error kept: the activation moves by (level - f_j) d_j, the
other latents stay as they are. Where it codes the neurons, what it writes is linear too, and the quick ways serve.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int, Integer
from torch import Tensor, nn

from cratelm.activations.causal_model import USUAL_CONTEXT, causal_model
from cratelm.activations.taps import Edit, capture, edit
from cratelm.errors import CrateError
from cratelm.steering.exit import Exit, find_exit
from cratelm.steering.generate import check_finite
from cratelm.steering.place import Place, SparseCoder, check_coder, neuron_places

Kind = Literal["zero", "mean"]
Method = Literal["auto", "direct"]
LOGITS_AT_ONCE = 1 << 24
EXACT_AT_ONCE = {"cpu": 1 << 19}
"""Logits that the exact way makes at a time: on a CPU what stays in its cache, five times as fast as more."""
ROWS_AT_ONCE = 32
"""Windows that go through the later layers together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Documents of a split, in windows of the model's context as `evaluate` reads them."""

    tokens: Integer[np.ndarray, " stream"]
    documents: Int[np.ndarray, " bounds"]
    """Where each document starts, and where the last ends."""
    context: int
    """Tokens of a window."""
    real: Bool[np.ndarray, " stream"]
    """False for an end that was put where a document was cut: it is read, but no text has it there, so its loss does
    not count."""

    @property
    def sizes(self) -> Float64[np.ndarray, " documents"]:
        """Predicted tokens of each document that count; the first of the stream is predicted by nothing."""
        return self.by_document(1, np.ones(len(self.tokens) - 1))

    def by_document(self, first: int, values: Float64[np.ndarray, " predicted"]) -> Float64[np.ndarray, " documents"]:
        """Sums over each document's tokens that count, of a number of every predicted token from index `first` on."""
        counted = np.where(self.real[first : first + len(values)], values, 0.0)
        return np.bincount(self.owner(first, len(values)), counted, len(self.documents) - 1)

    def owner(self, first: int, count: int) -> Int[np.ndarray, " predicted"]:
        """The document of each predicted token from index `first` on."""
        return np.searchsorted(self.documents, np.arange(first, first + count), side="right") - 1

    def batches(self, rows: int) -> Iterator[tuple[int, Int[Tensor, "rows context"], Int[Tensor, "rows context"]]]:
        """Index of the first predicted token, inputs and targets."""
        predicted = len(self.tokens) - 1
        whole = predicted // self.context
        spans = [(row * self.context, min(rows, whole - row), self.context) for row in range(0, whole, rows)]
        if predicted % self.context:
            spans.append((whole * self.context, 1, predicted % self.context))
        for first, count, length in spans:
            piece = torch.from_numpy(self.tokens[first : first + count * length + 1].astype(np.int64))
            yield first + 1, piece[:-1].view(count, length), piece[1:].view(count, length)


def held_out(
    tokens: Integer[np.ndarray, " stream"], documents: Int[np.ndarray, " bounds"], model: nn.Module, limit: int | None
) -> HeldOut:
    """All tokens, or with a `limit` the beginnings of documents that hold about so many: many documents, few of each.

    Of each document at most a context is read, with its last token (the end of the text) behind it, so that a standard
    error over documents means something. Where that cuts a document short its end is read and not predicted. At least
    two tokens are needed.
    """
    context = min(causal_model(model).context_length or USUAL_CONTEXT, USUAL_CONTEXT)
    real = np.ones(len(tokens), dtype=np.bool_)
    if limit is not None:
        lengths = np.minimum(np.diff(documents), context)
        count = min(int(np.searchsorted(lengths.cumsum(), limit)) + 1, len(lengths))
        pieces = []
        for start, end, length in zip(documents[:count], documents[1 : count + 1], lengths[:count], strict=True):
            pieces += [tokens[start : start + length - 1], tokens[end - 1 : end]]
        tokens = np.concatenate(pieces)
        cut = np.diff(documents)[:count] > context
        documents = np.concatenate([[0], lengths[:count].cumsum()])
        real = np.ones(len(tokens), dtype=np.bool_)
        real[documents[1:][cut] - 1] = False
    if len(tokens) < 2:
        raise CrateError(f"{len(tokens)} tokens hold nothing to predict. Tokenize more text")
    return HeldOut(tokens=tokens, documents=documents, context=context, real=real)


@dataclass
class Ablation:
    """The plain losses of a text, and the change when neurons are taken out."""

    model: nn.Module
    text: HeldOut
    layers: Sequence[int]
    """Whose neurons will be taken out."""
    coders: Mapping[int, SparseCoder] = field(default_factory=dict)
    """Layer -> the sparse autoencoder there, whose latents are then meant in the place of the neurons."""
    places: Mapping[int, Place] = field(init=False)
    exit: Exit | None = field(init=False)
    """None where logits are no sum over neurons."""
    plain: Float64[np.ndarray, " predicted"] = field(init=False)
    """Loss of every predicted token, in nats."""
    means: dict[int, Tensor] = field(init=False)
    """Mean activation of each neuron over the text."""
    densities: dict[int, Float64[np.ndarray, " neurons"]] = field(init=False)
    """Share of the text's tokens on which each neuron is above 0."""

    def __post_init__(self) -> None:
        self.causal = causal_model(self.model)
        self.model = self.causal.module
        neurons = neuron_places(self.model)
        self.places = dict(neurons)
        for layer, coder in self.coders.items():
            check_coder(self.model, coder)
            self.places[layer] = _latent_place(neurons.get(layer), coder)
        try:
            self.exit = find_exit(self.model)
        except CrateError:
            self.exit = None
        self._read_plainly()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def _read_plainly(self) -> None:
        taps = {layer: self.places[layer].tap for layer in self.layers}
        sums: dict[int, Tensor] = {}
        fires: dict[int, Tensor] = {}
        losses = []
        for _, inputs, targets in self._batches():
            with capture(self.model, taps.values()) as codes:
                losses.append(self.causal.token_losses(inputs, targets).flatten())
            for layer, tap in taps.items():
                code = self._code(layer, codes[tap].flatten(0, -2))
                sums[layer] = sums.get(layer, 0) + code.double().sum(0)
                fires[layer] = fires.get(layer, 0) + (code > 0).double().sum(0)
        self.plain = torch.cat(losses).double().cpu().numpy()
        if not np.isfinite(self.plain).all():
            raise CrateError("the loss of this model is not finite: its training has diverged. Train anew")
        self.means = {layer: total / len(self.plain) for layer, total in sums.items()}
        self.densities = {layer: (total / len(self.plain)).cpu().numpy() for layer, total in fires.items()}

    def _batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        vocabulary = self.exit.head.shape[0] if self.exit is not None else 50304
        rows = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (vocabulary * self.text.context)))
        for first, inputs, targets in self.text.batches(rows):
            yield first, inputs.to(self.device), targets.to(self.device)

    @torch.inference_mode()
    def each(
        self, layer: int, neurons: Sequence[int], kind: Kind, *, method: Method = "auto"
    ) -> Float64[np.ndarray, "neurons documents"]:
        """Summed change of loss of every document, in nats, when each neuron alone is taken out."""
        place, index = self.places[layer], torch.tensor(list(neurons), device=self.device)
        level = torch.zeros(len(index), dtype=torch.float64, device=self.device)
        if kind == "mean":
            level = self.means[layer][index]
        quick = method == "auto" and (layer not in self.coders or bool(place.written))
        exact = quick and self.exit is not None and layer == self.exit.place.layer
        resumed = quick and not exact and self.causal.losses_from is not None
        block = self.exit.block if exact and self.exit is not None else f"blocks.{layer}"
        taps = [place.tap, *([block] if exact or resumed else [])]
        total = np.zeros((len(index), len(self.text.sizes)))
        for first, inputs, targets in self._batches():
            with capture(self.model, taps) as seen:
                self.causal.read(inputs, taps)
            code = self._code(layer, seen[place.tap].reshape(*inputs.shape, -1))[..., index]
            delta = code - level.to(code)
            if exact:
                change = self._exactly(seen[block].flatten(0, 1), delta.flatten(0, 1), targets.flatten(), index)
            else:
                x = seen[block] if resumed else None
                change = self._rerun(place, x, inputs, targets, delta, index, level)
            for row, one in enumerate(change.reshape(len(index), -1).double().cpu().numpy()):
                total[row] += self.text.by_document(first, one)
        return total

    def _exactly(
        self, x: Float[Tensor, "tokens d_model"], delta: Float[Tensor, "tokens neurons"],
        targets: Int[Tensor, " tokens"], index: Int[Tensor, " neurons"],
    ) -> Float[Tensor, "neurons tokens"]:  # fmt: skip
        way = self.exit
        assert way is not None
        cx, cd = way.centred(x), way.centred(self.places[way.place.layer].directions[index].to(x))
        variance, own = cx.square().mean(1) + way.epsilon, cd.square().mean(1)
        shared = cx @ cd.T / x.shape[1]
        whole, part = (cx * way.gain) @ way.head.T, (cd * way.gain) @ way.head.T
        constant = way.bias @ way.head.T + (0 if way.head_bias is None else way.head_bias)
        change = torch.zeros(len(index), len(x), dtype=x.dtype, device=x.device)
        rows = max(1, EXACT_AT_ONCE.get(x.device.type, LOGITS_AT_ONCE) // whole.shape[1])
        before = _cross_entropy(whole / way.sigma(x) + constant, targets)
        for row in range(len(index)):
            at = delta[:, row].nonzero().squeeze(1)
            for some in at.split(rows):
                by = delta[some, row]
                sigma = torch.ones_like(by)
                if way.kind != "none":
                    sigma = (variance[some] - 2 * by * shared[some, row] + by * by * own[row]).sqrt()
                logits = torch.addr(whole[some], by, part[row], alpha=-1).div_(sigma[:, None]).add_(constant)
                change[row, some] = _cross_entropy(logits, targets[some]) - before[some]
        return change

    def _rerun(
        self, place: Place, x: Tensor | None, inputs: Tensor, targets: Tensor, delta: Tensor, index: Tensor,
        level: Tensor,
    ) -> Float[Tensor, "neurons rows seq"]:  # fmt: skip
        """Later layers from a moved output, or with `x` None everything with an edited code."""
        later = self.causal.losses_from
        plain = (
            self.causal.token_losses(inputs, targets)
            if x is None or later is None
            else later(place.layer + 1, x, targets)
        )
        change = torch.zeros(len(index), *targets.shape, dtype=plain.dtype, device=plain.device)
        # Pairs of a neuron and a window in which it moves anything.
        for pairs in (delta != 0).any(1).T.nonzero().split(ROWS_AT_ONCE):
            neuron, row = pairs.unbind(1)
            if x is None or later is None:
                with edit(self.model, {place.tap: self._one_edit(place.layer, index[neuron], level[neuron])}):
                    losses = self.causal.token_losses(inputs[row], targets[row])
            else:
                move = delta[row, :, neuron][..., None] * place.directions[index[neuron]][:, None].to(x)
                losses = later(place.layer + 1, x[row] - move, targets[row])
            change[neuron, row] = losses - plain[row]
        return change

    def _code(self, layer: int, value: Tensor) -> Tensor:
        """The activations of what is taken out, from what its tap gives."""
        return self.coders[layer].encode(value).to(value) if layer in self.coders else value

    def _one_edit(self, layer: int, neuron: Tensor, level: Tensor) -> Edit:
        return self._edit(layer, lambda code: _put_one(code, neuron, level))

    def _group_edit(self, layer: int, index: Tensor, level: Tensor) -> Edit:
        return self._edit(layer, lambda code: _put_all(code, index, level))

    def _edit(self, layer: int, change: Edit) -> Edit:
        """A change of a code as a change of what the tap gives."""
        if layer not in self.coders:
            return change
        coder = self.coders[layer]

        def through(x: Tensor) -> Tensor:
            latents = coder.encode(x)
            return x + (coder.decode(change(latents)) - coder.decode(latents)).to(x)

        return through

    @torch.inference_mode()
    def together(
        self, neurons: Sequence[tuple[int, int]], kind: Kind
    ) -> Float64[np.ndarray, " documents"]:  # fmt: skip
        """Summed change of loss of every document when all (layer, neuron) are taken out at once."""
        edits = {}
        for layer in {layer for layer, _ in neurons}:
            index = torch.tensor([neuron for where, neuron in neurons if where == layer], device=self.device)
            level = torch.zeros(len(index), device=self.device) if kind == "zero" else self.means[layer][index]
            edits[self.places[layer].tap] = self._group_edit(layer, index, level)
        total = np.zeros(len(self.text.sizes))
        for first, inputs, targets in self._batches():
            with edit(self.model, edits):
                losses = self.causal.token_losses(inputs, targets).flatten().double().cpu().numpy()
            check_finite(torch.from_numpy(losses)[None], ())
            total += self.text.by_document(first, losses - self.plain[first - 1 : first - 1 + len(losses)])
        return total


def mean_change(
    sums: Float64[np.ndarray, "*any documents"], sizes: Float64[np.ndarray, " documents"]
) -> tuple[Float64[np.ndarray, "*any"], Float64[np.ndarray, "*any"]]:
    """Change of loss in nats per token and its standard error; documents are the sampling unit.

    As of a ratio: with S_d and n_d the summed change and the tokens of document d, the change is C = sum S_d / sum n_d
    and its variance D / (D - 1) * sum (S_d - C n_d)^2 / (sum n_d)^2; NaN for one document.
    """
    count, total = len(sizes), sizes.sum()
    mean = sums.sum(-1) / total
    spread = ((sums - mean[..., None] * sizes) ** 2).sum(-1) * count / max(1, count - 1)
    error = np.sqrt(spread) / total if count > 1 else np.full_like(spread, np.nan)
    return np.asarray(mean), np.asarray(error)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _latent_place(neurons: Place | None, coder: SparseCoder) -> Place:
    """The latents as what writes; `written` stays empty where what they write reaches the stream by no linear map."""
    if neurons is not None and coder.tap == neurons.tap:
        directions = coder.directions @ neurons.directions.to(coder.directions)
        return replace(neurons, directions=directions)
    return Place(layer=coder.layer, tap=coder.tap, written="", directions=coder.directions)


def _put_one(code: Tensor, neuron: Tensor, level: Tensor) -> Tensor:
    """Another neuron of each row at its level."""
    new = code.clone().unflatten(0, (len(neuron), -1)) if code.ndim == 2 else code.clone()
    new[torch.arange(len(neuron)), :, neuron] = level.to(new)[:, None]
    return new.view_as(code)


def _put_all(code: Tensor, index: Tensor, level: Tensor) -> Tensor:
    new = code.clone()
    new[..., index] = level.to(new)
    return new
