"""Neurons and autoencoder latents of the same layers: scores, and the share of the model's behaviour that remains.

    adjusted = score x kept      kept = (CE_without - CE_sae) / (CE_without - CE), between 0 and 1; 1 for neurons

CE_without is the loss of a predictor by token frequency (kept of the model: the share of its gain over frequencies), or
the model's loss with the activation replaced by its mean (kept of the layer: the share of the layer's effect). The
first is comparable between models; the second is the usual one, and is inflated where no path bypasses the activation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cratelm.activations.records import read_records, records_folder
from cratelm.interpretation.scoring.correlation import LayerAggregate, aggregate
from cratelm.interpretation.store.database import Store
from cratelm.report.results.gather import RESAMPLES, SEED, Results, RunResult
from cratelm.rundir import read_json
from cratelm.runtime import progress_bar

PREFIX = "sae-"
"""Prefix of the taps of autoencoder latents."""

TRAINING = 3
"""Cost of a training step in forward passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """The neurons of one layer of a model, or the latents of an autoencoder at this layer."""

    title: str
    layer: int
    scores: Mapping[str, LayerAggregate]
    """By protocol."""
    evaluation: Mapping[str, Any]
    """The contents of evaluation.json; empty for neurons."""
    parameters: int
    """Of the model and the autoencoder."""
    training_flops: int | None
    """Of both; None where the model's training is not known."""
    l0: float
    """Mean number of active units per token."""

    def kept(self, of: str) -> float:
        """Share of the behaviour of the `model` or the `layer` that remains, between 0 and 1."""
        if not self.evaluation:
            return 1.0
        return min(1.0, max(0.0, self.evaluation.get("kept_model" if of == "model" else "recovered_mean") or 0.0))

    def adjusted(self, protocol: str, of: str) -> float | None:
        """The score times the share kept, in points; None without a score."""
        points = self.scores[protocol].points if protocol in self.scores else None
        return None if points is None else points * self.kept(of)


def compared(results: Results) -> tuple[Units, ...]:
    """For every model with autoencoders that are evaluated and scored: the neurons of those layers, and the latents."""
    runs = {run.path.resolve(): run for run in results.models if run.control is None}
    units: list[Units] = []
    with progress_bar("autoencoders", total=len(runs), unit="runs") as bar:
        for run in runs.values():
            latents = list(_autoencoders(run, results))
            for layer in sorted({sae.layer for sae in latents}):
                neurons = _units(run, results, "neurons", layer, {}, {})
                units += [neurons] if neurons is not None else []
                units += [sae for sae in latents if sae.layer == layer]
            bar.advance(1)
    return tuple(units)


def _autoencoders(run: RunResult, results: Results) -> Iterator[Units]:
    """The latents of a run that are scored and evaluated with the same weights."""
    records = records_folder(run.path, results.mode) / "records.json"
    taps = read_json(records, made_by=f"cratelm collect {run.path} --data DIR")["taps"] if records.exists() else {}
    for path in sorted((run.path / "saes").glob("*/evaluation.json")):
        evaluation = read_json(path, made_by=f"cratelm sae evaluate {run.path} --data DIR")
        tap = f"{PREFIX}{path.parent.name}"
        if tap in taps and taps[tap].get("sae_hash") == evaluation["sae_hash"]:
            config = path.with_name("sae.json")
            description = read_json(config, made_by="cratelm sae train") if config.exists() else {}
            units = _units(run, results, tap, evaluation["layer"], evaluation, description)
            if units is not None:
                yield units


def _units(
    run: RunResult, results: Results, tap: str, layer: int, evaluation: Mapping[str, Any],
    description: Mapping[str, Any],
) -> Units | None:  # fmt: skip
    """The units of one tap; None if they are not scored."""
    store, asked = Store.open(run.path), replace(results.asked, tap=tap, layer=layer)
    scores = {
        key.protocol: aggregate(
            [store.scores(key)], protocol=key.protocol, seed=SEED, resamples=RESAMPLES
        ).layers[0]
        for key in store.scored() if replace(key, protocol="") == asked
    }  # fmt: skip
    if not scores:
        return None
    name = ", neurons" if tap == "neurons" else f" + {tap.removeprefix(PREFIX)}"
    trained = None if run.training_tokens is None else TRAINING * run.flops_per_token * run.training_tokens
    more = description.get("training_flops", 0 if not evaluation else None)
    density = read_records(run.path, layer, mode=results.mode, tap=tap).statistics["density"]
    return Units(
        title=run.title.removesuffix(f", {run.tap}") + name, layer=layer, scores=scores, evaluation=evaluation,
        parameters=run.parameters + int(evaluation.get("parameters", 0)), l0=float(density.sum()),
        training_flops=None if trained is None or more is None else trained + more,
    )  # fmt: skip
