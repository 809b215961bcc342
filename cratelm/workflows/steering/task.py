"""The task of `cratelm steer`: its changes as an `Intervention`, the matched control, excerpts to measure on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cratelm.activations.records import LayerRecords
from cratelm.errors import CrateError
from cratelm.steering.changes import ChangeRequest, Strength, check_indices, parse_request, swept
from cratelm.steering.generate import Decoding, generate
from cratelm.steering.intervention import Intervention
from cratelm.steering.measure import draw_matched_neuron
from cratelm.steering.place import check_coder, neuron_places
from cratelm.steering.positions import parse_positions
from cratelm.steering.reference import reference
from cratelm.workflows.opening import OpenModel
from cratelm.workflows.steering.autoencoders import open_coders


@dataclass(frozen=True, kw_only=True)
class SteeringTask:
    """The requested changes, checked against the model and the run."""

    opened: OpenModel
    requests: tuple[ChangeRequest, ...]
    setting: Intervention
    """Positions, autoencoders and their errors; without changes."""
    taps: dict[int, str]
    """Layer -> tap of the records of its autoencoder's latents."""
    options: Any
    """The options of `cratelm steer`."""

    def records(self, request: ChangeRequest) -> LayerRecords | None:
        """The records of the request's layer, if the run has them."""
        return self.opened.records(request.layer, self.taps[request.layer] if request.latent else "neurons")

    def intervention(
        self, strength: Strength | None = None, requests: Sequence[ChangeRequest] | None = None
    ) -> Intervention:
        """The requests (by default all of them) as an intervention; `strength` is that of a sweep."""
        requests = self.requests if requests is None else requests
        requests = requests if strength is None else [swept(request, strength) for request in requests]
        return replace(self.setting, changes=[self._resolve(request) for request in requests])

    def matched(self, strength: Strength | None = None) -> Intervention:
        """The same changes to matched neurons; relative strengths are multiples of the maximum of each."""
        matched: list[ChangeRequest] = []
        for request in self.requests:
            directions = (
                next(coder.directions for coder in self.setting.coders if coder.layer == request.layer)
                if request.latent else neuron_places(self.opened.model)[request.layer].directions
            )  # fmt: skip
            records = self.records(request)
            index = draw_matched_neuron(
                directions.double().norm(dim=1).cpu().numpy(), request.index,
                None if records is None else records.statistics["density"], seed=self.options.seed,
                avoid=[other.index for other in (*self.requests, *matched) if other.layer == request.layer],
            )  # fmt: skip
            matched.append(replace(request, index=index))
        return self.intervention(strength, matched)

    def excerpts(self, count: int) -> list[list[int]]:
        """Token ids of the first neuron's top excerpts, strongest first, each up to its peak and at most a context."""
        records = self.records(self.requests[0])
        if records is None or count == 0:
            return []
        sets = records[self.requests[0].index].excerpts
        widest = max(width for width, _, _ in sets)
        top = [
            excerpt for (width, _, kind), set_ in sets.items() if width == widest and kind == "top" for excerpt in set_
        ]
        top.sort(key=lambda excerpt: -float(excerpt.activations.max()))
        texts = [excerpt.tokens[: int(excerpt.activations.argmax()) + 1].tolist() for excerpt in top[:count]]
        return [tokens[-(self.opened.causal.context_length or len(tokens)) :] for tokens in texts]

    def continuation(self, prompt: list[int], intervention: Intervention) -> tuple[Tensor, str]:
        """Continue the prompt as the options ask: tokens of prompt and continuation, text of the continuation alone."""

        options, decode = self.options, self.opened.tokenizer.decode
        decoding = Decoding(temperature=options.temperature, top_k=options.top_k, seed=options.seed)
        device = next(self.opened.model.parameters()).device
        tokens = generate(
            self.opened.model, torch.tensor([prompt], device=device), options.tokens, intervention, decoding=decoding
        )
        return tokens, str(decode(tokens[0].tolist()))[len(decode(prompt)) :]

    def _resolve(self, request: ChangeRequest) -> Any:
        if not request.needs_maximum:
            return request.resolve()
        if (records := self.records(request)) is None:
            run = self.opened.run or "RUN"
            sae = f" --sae {self.taps[request.layer].removeprefix('sae-')}" if request.latent else ""
            raise CrateError(
                f"{request.name}: multiples of its maximum need records. Give an absolute strength, such as set:0.5, "
                f"or run: cratelm collect {run} --data DIR{sae}"
            )
        return request.resolve(reference(records, request.index, self.options.reference))


def open_task(opened: OpenModel, options: Any) -> SteeringTask:
    """Parse and check the options of `cratelm steer` before anything is computed."""
    if not options.neuron:
        raise CrateError("--neuron must name a change. Example: --neuron 1/85=set:2x")
    requests = tuple(parse_request(text, swept=options.sweep is not None) for text in options.neuron)
    after = None if options.after is None else opened.one_token(options.after, "--after")
    positions = parse_positions(options.positions, after=after)
    coders, taps = open_coders(opened, options.sae)
    for coder in coders:
        check_coder(opened.model, coder)
    sizes = {layer: place.neurons for layer, place in neuron_places(opened.model).items()}
    check_indices([request for request in requests if not request.latent], sizes)
    sizes = {coder.layer: len(coder.directions) for coder in coders}
    check_indices([request for request in requests if request.latent], sizes, "latents of a --sae")
    setting = Intervention(positions=positions, coders=coders, keep_error=not options.drop_error)
    return SteeringTask(opened=opened, requests=requests, setting=setting, taps=taps, options=options)
