"""The models behind a live browser: what each layer makes of a text that is typed in, and the text with neurons turned.

One request at a time works in a model, because hooks are the model's and not the request's; a continuation gives the
model up between tokens, so that a short request does not wait for a long one.
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
from cratelm.errors import CrateError
from cratelm.model.generate import sample
from cratelm.report.server.requests import Limits, SteerRequest, TextRequest
from cratelm.steering.changes import Change
from cratelm.steering.effects import token_rows
from cratelm.steering.generate import check_finite
from cratelm.steering.measure import next_token_effect
from cratelm.steering.positions import Text
from cratelm.steering.steer import check_changes, steer

SHOWN = 10
"""Tokens listed whose probability rises, and falls."""


@dataclass(frozen=True, kw_only=True)
class LiveModel:
    """A model, its tokenizer, and how strongly its neurons fire at most."""

    model: nn.Module
    tokenizer: Tokenizer
    strings: Sequence[str]
    """Text of each token id."""
    maximum: Callable[[int, int], float | None]
    """(layer, neuron) -> its largest recorded activation; None where none is recorded."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def causal(self) -> CausalModel:
        """The adapter of the model."""
        return causal_model(self.model, self.tokenizer)

    def tokens(self, text: str, limits: Limits) -> Tensor:
        """Token ids of a text, (1, seq). Raises CrateError for an empty text and for one above the limits."""
        causal = self.causal
        ids = causal.encode(text)
        most = min(limits.text_tokens, causal.context_length or limits.text_tokens)
        if len(ids) > most:
            raise CrateError(f"the text has {len(ids)} tokens, at most {most} are read. Shorten it")
        return torch.tensor([ids], device=causal.device)

    def changes(self, request: SteerRequest) -> list[Change]:
        """What is to be done, in the model's own units."""
        made = []
        for turned in request.changes:
            maximum = self.maximum(turned.layer, turned.index) if turned.strength.of_maximum else None
            if turned.strength.of_maximum and maximum is None:
                raise CrateError(
                    f"no activation of neuron {turned.layer}/{turned.index} is recorded, so multiples of its largest "
                    "mean nothing. Give its strength in the model's own units"
                )
            made.append(turned.resolve(maximum))
        check_changes(self.model, made)
        return made


class LiveModels:
    """Models by slug, opened when they are first asked for; see `report.live.Live`."""

    def __init__(self, contexts: Mapping[str, int], opener: Callable[[str], LiveModel], *, limits: Limits) -> None:
        self._contexts, self._opener, self.limits = dict(contexts), opener, limits
        self._open: dict[str, LiveModel] = {}
        self._opening = threading.Lock()

    def contexts(self) -> Mapping[str, int]:
        """The models there are, and the longest text each reads, in tokens."""
        return self._contexts

    def look(self, request: TextRequest) -> dict[str, Any]:
        """Every layer's strongest neurons at each token, or one neuron along the text. Activations in own units."""
        live = self._model(request.model)
        tokens = live.tokens(request.text, self.limits)
        places = live.causal.places()
        if request.layer is not None and request.layer not in places:
            raise CrateError(f"there is no layer {request.layer}; there are {min(places)} to {max(places)}")
        wanted = places if request.layer is None else {request.layer: places[request.layer]}
        with live.lock, torch.inference_mode(), capture(live.model, wanted.values()) as codes:
            live.causal.read(tokens, list(wanted.values()))
        found = {layer: codes[tap][0].float().cpu().numpy() for layer, tap in wanted.items()}
        shown = {"tokens": [live.strings[token] for token in tokens[0].tolist()]}
        if request.neuron is None:
            return shown | {"layers": [_strongest(layer, code, request.strongest) for layer, code in found.items()]}
        assert request.layer is not None
        code = found[request.layer]
        if request.neuron >= code.shape[1]:
            raise CrateError(f"layer {request.layer} has neurons 0 to {code.shape[1] - 1}, not {request.neuron}")
        return shown | {"values": _numbers(code[:, request.neuron])}

    def effect(self, request: SteerRequest) -> dict[str, Any]:
        """Probabilities of the next token without and with the changes: those that rise and fall most."""
        live = self._model(request.model)
        tokens, changes = live.tokens(request.text, self.limits), live.changes(request)
        with live.lock, torch.inference_mode():
            effect = next_token_effect(live.model, [tokens[0].tolist()], changes)
        likeliest = np.argsort(-effect.before, kind="stable")[:SHOWN]
        return {
            "changes": list(map(str, changes)), "divergence": effect.divergence, "moved": effect.moved,
            "likeliest": token_rows(effect, likeliest, live.strings),
            "rises": token_rows(effect, effect.largest(SHOWN), live.strings),
            "falls": token_rows(effect, effect.largest(SHOWN, decreases=True), live.strings),
        }  # fmt: skip

    def continuations(self, request: SteerRequest) -> Iterator[dict[str, Any]]:
        """`{"plain": text}` and `{"steered": text}`, piece by piece in turns; `{"done": true}` at last.

        Both are drawn with the same seed, so they differ by nothing but the changes. What is wrong with the request is
        raised here, before the first piece.
        """
        live = self._model(request.model)
        tokens, changes = live.tokens(request.text, self.limits), live.changes(request)
        return self._pieces(live, tokens, changes, request)

    def _pieces(
        self, live: LiveModel, tokens: Tensor, changes: Sequence[Change], request: SteerRequest
    ) -> Iterator[dict[str, Any]]:
        sides = {
            name: _Side(live, tokens, made, request) for name, made in (("plain", ()), ("steered", tuple(changes)))
        }
        for _ in range(request.tokens):
            for name, side in sides.items():
                with live.lock:
                    piece = side.next()
                if piece:
                    yield {name: piece}
        for name, side in sides.items():
            if piece := side.rest():
                yield {name: piece}
        yield {"done": True}

    def _model(self, slug: str) -> LiveModel:
        if slug not in self._contexts:
            raise CrateError(f"there is no model {slug[:60]!r} to run here; there are {', '.join(self._contexts)}")
        with self._opening:
            if slug not in self._open:
                self._open[slug] = self._opener(slug)
            return self._open[slug]


class _Side:
    """One of the two texts as it grows."""

    def __init__(self, live: LiveModel, tokens: Tensor, changes: Sequence[Change], request: SteerRequest) -> None:
        self.model, self.changes, self.request = live.causal.module, changes, request
        self.text = Text(tokens)
        self.generator = torch.Generator(tokens.device)
        self.generator.manual_seed(request.seed)
        slide = max(1, (live.causal.context_length or 4) // 4)
        longest = tokens.shape[1] + request.tokens
        self.reader = live.causal.reader(longest=longest, mask=None, slide=slide, use_cache=True)
        self.pieces = Pieces(live.tokenizer, tokens[0].tolist())

    def next(self) -> str:
        """Draw one more token; the text it adds, which is empty while a character is not complete."""
        with torch.inference_mode(), steer(self.model, self.changes, text=self.text):
            logits = check_finite(self.reader.logits(self.text.tokens), self.changes)
        new = sample(
            logits, temperature=self.request.temperature, top_k=None, top_p=None, generator=self.generator
        )  # fmt: skip
        self.text.append(new)
        return self.pieces.add(int(new))

    def rest(self) -> str:
        """What was held back, with signs for broken characters."""
        return self.pieces.rest()


class Pieces:
    """Text of tokens as they come: a character that several tokens make is held back until it is whole."""

    MOST_HELD = 8
    """Tokens held back; more can be no character, and are shown with signs for what is broken."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self._stream, self._held = DecodeStream(skip_special_tokens=False), list[int]()
        for token in before[-self.MOST_HELD :]:  # what a token adds can depend on those before it
            self.add(token)

    def add(self, token: int) -> str:
        """The text that one more token adds."""
        self._held.append(token)
        text = self._stream.step(self.tokenizer, token)
        if text is None:
            return self.rest() if len(self._held) > self.MOST_HELD else ""
        self._held = []
        return str(text)

    def rest(self) -> str:
        """What is held back, broken as it is."""
        text = str(self.tokenizer.decode(self._held, skip_special_tokens=False))
        self._stream, self._held = DecodeStream(skip_special_tokens=False), []
        return text


def _strongest(layer: int, code: np.ndarray, count: int) -> dict[str, Any]:
    """Of each token the neurons that fire most, strongest first: [neuron, activation] pairs."""
    count = min(count, code.shape[1])
    top = np.argpartition(-code, count - 1, axis=1)[:, :count]
    rows = []
    for row, neurons in zip(code, top, strict=True):
        order = neurons[np.argsort(-row[neurons], kind="stable")]
        rows.append([[int(neuron), value] for neuron in order if (value := _finite(row[neuron])) > 0])
    return {"layer": layer, "density": float((code > 0).mean()), "strongest": rows}


def _numbers(values: np.ndarray) -> list[float]:
    return [_finite(value) for value in values]


def _finite(value: float | np.floating) -> float:
    """A number that JSON can hold."""
    return float(np.nan_to_num(value, posinf=3e38, neginf=-3e38))
