"""The models of `cratelm serve`: the activations of a text that a user types, and its continuation under steering.

One request at a time runs in a model, because hooks belong to the model, not to the request. A continuation releases
the model between tokens, so a short request does not wait for a long one.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor, nn

from cratelm.activations.causal_model import CausalModel, causal_model
from cratelm.activations.taps import capture
from cratelm.data.special_tokens import SpecialTokens
from cratelm.errors import CrateError
from cratelm.report.server.requests import Limits, SteerRequest, TextRequest
from cratelm.steering.effects import token_rows
from cratelm.steering.generate import Continuation, Decoding
from cratelm.steering.intervention import NO_INTERVENTION, Intervention
from cratelm.steering.measure import next_token_effect
from cratelm.steering.steer import steering_edits

_SHOWN = 10
"""Tokens listed whose probability rises, and whose probability falls."""


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """A model, its tokenizer, and the largest recorded activations of its neurons."""

    model: nn.Module
    tokenizer: Tokenizer
    strings: Sequence[str]
    """Text of each token id."""
    maximum: Callable[[int, int], float | None]
    """(layer, neuron) -> its largest recorded activation; None without records."""
    special: SpecialTokens | None = None
    """The tokens that begin and end texts."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def causal(self) -> CausalModel:
        """The adapter of the model."""
        return causal_model(self.model, self.tokenizer, self.special)

    def tokens(self, text: str, limits: Limits) -> Tensor:
        """Token ids of a text, (1, seq). Raises `CrateError` for an empty text and for one above the limits."""
        causal = self.causal
        ids, begin = causal.encode(text), len(causal.text_beginning)
        most = min(limits.text_tokens, (causal.context_length or 1 << 30) - begin)
        if len(ids) - begin > most:
            raise CrateError(f"the text must have at most {most} tokens, got {len(ids) - begin}")
        return torch.tensor([ids], device=causal.device)

    def intervention(self, request: SteerRequest) -> Intervention:
        """The requested changes in activation units, checked against the model."""
        changes = []
        for neuron in request.changes:
            maximum = self.maximum(neuron.layer, neuron.index) if neuron.strength.of_maximum else None
            if neuron.strength.of_maximum and maximum is None:
                raise CrateError(
                    f"neuron {neuron.layer}/{neuron.index} has no recorded activations, so multiples of its largest "
                    "are not defined. Use an absolute strength"
                )
            changes.append(neuron.resolve(maximum))
        intervention = Intervention(changes=changes)
        steering_edits(self.causal.module, intervention)
        return intervention


class LiveModels:
    """Models by slug, opened at their first request; see `report.server.requests.Live`."""

    def __init__(self, contexts: Mapping[str, int], opener: Callable[[str], LiveModel], *, limits: Limits) -> None:
        self._contexts, self._opener, self.limits = dict(contexts), opener, limits
        self._open: dict[str, LiveModel] = {}
        self._opening = threading.Lock()

    def contexts(self) -> Mapping[str, int]:
        """Slug of each model -> its longest text in tokens."""
        return self._contexts

    def activations(self, request: TextRequest) -> dict[str, Any]:
        """The strongest neurons of every layer at each token, or one neuron at every token."""
        live = self._model(request.model)
        tokens = live.tokens(request.text, self.limits)
        places = live.causal.places()
        if request.layer is not None and request.layer not in places:
            raise CrateError(f"layer must be {min(places)} to {max(places)}, got {request.layer}")
        taps = places if request.layer is None else {request.layer: places[request.layer]}
        with live.lock, torch.inference_mode(), capture(live.model, taps.values()) as captured:
            live.causal.read(tokens, list(taps.values()))
        begin = len(live.causal.text_beginning)  # the user did not type these tokens, and no records hold them
        codes = {
            layer: captured[tap].reshape(tokens.numel(), -1)[begin:].float().cpu().numpy()
            for layer, tap in taps.items()
        }
        answer = {"tokens": [live.strings[token] for token in tokens[0, begin:].tolist()]}
        if request.neuron is None:
            return answer | {"layers": [_strongest(layer, code, request.strongest) for layer, code in codes.items()]}
        assert request.layer is not None
        code = codes[request.layer]
        if request.neuron >= code.shape[1]:
            raise CrateError(f"layer {request.layer} has neurons 0 to {code.shape[1] - 1}, got {request.neuron}")
        return answer | {"values": [_finite(value) for value in code[:, request.neuron]]}

    def effect(self, request: SteerRequest) -> dict[str, Any]:
        """Probabilities of the next token without and with the changes: the tokens that rise and fall most."""
        live = self._model(request.model)
        tokens, intervention = live.tokens(request.text, self.limits), live.intervention(request)
        with live.lock, torch.inference_mode():
            effect = next_token_effect(live.model, [tokens[0].tolist()], intervention)
        likeliest = np.argsort(-effect.before, kind="stable")[:_SHOWN]
        return {
            "changes": list(map(str, intervention.changes)), "divergence": effect.divergence, "moved": effect.moved,
            "likeliest": token_rows(effect, likeliest, live.strings),
            "rises": token_rows(effect, effect.largest(_SHOWN), live.strings),
            "falls": token_rows(effect, effect.largest(_SHOWN, decreases=True), live.strings),
        }  # fmt: skip

    def continuations(self, request: SteerRequest) -> Iterator[dict[str, Any]]:
        """Pieces `{"plain": text}` and `{"steered": text}` in turn, then `{"done": true}`.

        Both texts are drawn with the same seed, so they differ only by the changes. Errors in the request are raised
        here, before the first piece.
        """
        live = self._model(request.model)
        tokens, intervention = live.tokens(request.text, self.limits), live.intervention(request)
        return self._pieces(live, tokens, intervention, request)

    def _pieces(
        self, live: LiveModel, tokens: Tensor, intervention: Intervention, request: SteerRequest
    ) -> Iterator[dict[str, Any]]:
        slide = max(1, (live.causal.context_length or 4) // 4)
        decoding = Decoding(temperature=request.temperature, seed=request.seed, slide=slide)
        sides = {
            name: (
                Continuation(live.model, tokens, request.tokens, side, decoding),
                Pieces(live.tokenizer, tokens[0].tolist()),
            )
            for name, side in (("plain", NO_INTERVENTION), ("steered", intervention))
        }
        for _ in range(request.tokens):
            for name, (continuation, pieces) in sides.items():
                with live.lock:
                    token, _logits = continuation.step()
                if piece := pieces.add(int(token)):
                    yield {name: piece}
        for name, (_, pieces) in sides.items():
            if piece := pieces.rest():
                yield {name: piece}
        yield {"done": True}

    def _model(self, slug: str) -> LiveModel:
        if slug not in self._contexts:
            raise CrateError(f"model must be one of {', '.join(self._contexts)}, got {slug[:60]!r}")
        with self._opening:
            if slug not in self._open:
                self._open[slug] = self._opener(slug)
            return self._open[slug]


class Pieces:
    """Text of streamed tokens: a character that spans several tokens is held back until it is complete."""

    MOST_HELD = 8
    """Most tokens held back; more cannot be one character, so they are shown with replacement characters."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._stream, self._held = DecodeStream(skip_special_tokens=False), list[int]()
        for token in before[-self.MOST_HELD :]:  # the text of a token can depend on the tokens before it
            self.add(token)

    def add(self, token: int) -> str:
        """The text that this token completes."""
        self._held.append(token)
        text = self._stream.step(self.tokenizer, token)
        if text is None:
            return self.rest() if len(self._held) > self.MOST_HELD else ""
        self._held = []
        return str(text)

    def rest(self) -> str:
        """The text held back, with replacement characters."""
        text = str(self.tokenizer.decode(self._held, skip_special_tokens=False))
        self._stream, self._held = DecodeStream(skip_special_tokens=False), []
        return text


def _strongest(layer: int, code: np.ndarray, count: int) -> dict[str, Any]:
    """[neuron, activation] pairs of the strongest neurons at each token, strongest first."""
    count = min(count, code.shape[1])
    top = np.argpartition(-code, count - 1, axis=1)[:, :count]
    rows = []
    for row, neurons in zip(code, top, strict=True):
        order = neurons[np.argsort(-row[neurons], kind="stable")]
        rows.append([[int(neuron), value] for neuron in order if (value := _finite(row[neuron])) > 0])
    return {"layer": layer, "density": float((code > 0).mean()), "strongest": rows}


def _finite(value: float | np.floating) -> float:
    """The nearest number that JSON can represent."""
    return float(np.nan_to_num(value, posinf=3e38, neginf=-3e38))
