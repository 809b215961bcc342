"""The changes that were asked of `cratelm steer`, in the model's own units, with their controls and excerpts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cratelm.errors import CrateError

if TYPE_CHECKING:
    from cratelm.activations.records import LayerRecords
    from cratelm.steering.changes import Change, Request, Strength
    from cratelm.steering.measure import How
    from cratelm.steering.place import SparseCoder
    from cratelm.workflows.opening import OpenModel


@dataclass(frozen=True, kw_only=True)
class Changing:
    """What to change, and everything about it that depends on the model and the run."""

    chosen: "OpenModel"
    requests: tuple["Request", ...]
    how: "How"
    taps: dict[int, str]
    """Layer -> the tap of the records of its autoencoder's latents."""
    which: Any
    """`maximum` or `p99.9`: what 1x is."""
    seed: int

    def records(self, request: "Request") -> "LayerRecords | None":
        """The records of the layer that a request is about."""
        return self.chosen.records(request.layer, self.taps[request.layer] if request.latent else "neurons")

    def changes(self, strength: "Strength | None" = None, requests: Sequence["Request"] = ()) -> list["Change"]:
        """The changes in the model's own units; a strength of a sweep is put in where none was given."""
        from cratelm.steering.changes import swept

        asked = requests or self.requests
        return [self._resolve(one if strength is None else swept(one, strength)) for one in asked]

    def matched(self, strength: "Strength | None" = None) -> list["Change"]:
        """The same done to control neurons: multiples are of their own maxima."""
        from cratelm.steering.measure import matched_row
        from cratelm.steering.place import neuron_places

        found: list[Request] = []
        for one in self.requests:
            directions = (
                next(coder.directions for coder in self.how.coders if coder.layer == one.layer)
                if one.latent else neuron_places(self.chosen.model)[one.layer].directions
            )  # fmt: skip
            records = self.records(one)
            taken = [other.index for other in (*self.requests, *found) if other.layer == one.layer]
            index = matched_row(
                directions.double().norm(dim=1).cpu().numpy(), one.index,
                None if records is None else records.statistics["density"], avoid=taken, seed=self.seed,
            )  # fmt: skip
            found.append(replace(one, index=index))
        return self.changes(strength, found)

    def excerpts(self, count: int) -> list[list[int]]:
        """The first neuron's top excerpts up to its peak, as token ids, strongest first; at most a context of each."""
        records = self.records(self.requests[0])
        if records is None or count == 0:
            return []
        own = records[self.requests[0].index].excerpts
        width = max(width for width, _, _ in own)
        tops = [excerpts for (wide, _, kind), excerpts in own.items() if wide == width and kind == "top"]
        ranked = sorted((one for top in tops for one in top), key=lambda one: -float(one.activations.max()))
        read = [one.tokens[: int(one.activations.argmax()) + 1].tolist() for one in ranked[:count]]
        return [tokens[-(self.chosen.causal.context_length or len(tokens)) :] for tokens in read]

    def _resolve(self, request: "Request") -> "Change":
        from cratelm.steering.reference import reference

        if not request.needs_maximum:
            return request.resolve()
        if (records := self.records(request)) is None:
            run = self.chosen.run or "RUN"
            more = f" --sae {self.taps[request.layer].removeprefix('sae-')}" if request.latent else ""
            raise CrateError(
                f"{request.name}: multiples of its maximum need records of it. Give a number, as in set:0.5, or run: "
                f"cratelm collect {run} --data DIR{more}"
            )
        return request.resolve(reference(records, request.index, self.which))


def open_changes(chosen: "OpenModel", options: Any) -> Changing:
    """Read and check what the options of `cratelm steer` ask for, before anything is computed."""
    from cratelm.steering.changes import check_indices, parse_request
    from cratelm.steering.measure import How
    from cratelm.steering.place import check_coder, neuron_places
    from cratelm.steering.positions import parse_positions

    if not options.neuron:
        raise CrateError("no neuron was named. Give --neuron LAYER/NEURON=HOW:STRENGTH, as in 1/85=set:2x")
    requests = tuple(parse_request(text, swept=options.sweep is not None) for text in options.neuron)
    after = None if options.after is None else chosen.one_token(options.after, "--after")
    positions = parse_positions(options.positions, after=after)
    coders, taps = _coders(chosen, options.sae)
    for coder in coders:
        check_coder(chosen.model, coder)
    sizes = {layer: place.neurons for layer, place in neuron_places(chosen.model).items()}
    check_indices([one for one in requests if not one.latent], sizes)
    latents = {coder.layer: len(coder.directions) for coder in coders}
    check_indices([one for one in requests if one.latent], latents, "latents of a --sae")
    how = How(positions=positions, coders=tuple(coders), keep_error=not options.drop_error)
    return Changing(
        chosen=chosen, requests=requests, how=how, taps=taps, which=options.reference, seed=options.seed
    )  # fmt: skip


def _coders(chosen: "OpenModel", names: Sequence[Path]) -> tuple[list["SparseCoder"], dict[int, str]]:
    """The autoencoders that were named, as steering takes them, and the taps of their latents' records."""
    if not names:
        return [], {}
    from cratelm.workflows.steering.autoencoders import open_coder

    coders, taps = [], {}
    for name in names:
        coder, tap = open_coder(chosen, name)
        if coder.layer in taps:
            raise CrateError(f"two sparse autoencoders of layer {coder.layer} were given. Give one for each layer")
        coders.append(coder)
        taps[coder.layer] = tap
    return coders, taps
