"""Neurons and autoencoder latents of the same layers: scores, and the share of the model's behaviour that is kept.

    adjusted = score x kept      kept = (CE_without - CE_sae) / (CE_without - CE), between 0 and 1; 1 for neurons

CE_without is the loss of a predictor by token frequency (kept of the model: of all that it gains over frequencies), or
the model's own with the activation's mean in its place (kept of the layer: of what this layer does). The first means
the same for every model; the second is the usual one, and is inflated where no path bypasses the activation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cratelm.activations.records import read_records, records_folder
from cratelm.interpretation.scoring.correlation import LayerAggregate, aggregate
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.results.gather import RESAMPLES, SEED, Results, RunResult
from cratelm.rundir import read_json
from cratelm.runtime import progress_bar

PREFIX = "sae-"
"""Begins the tap of an autoencoder's latents."""

TRAINING = 3
"""A training step costs so many forward passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """Neurons of one layer of a model, or the latents of an autoencoder there: how interpretable, at what price."""

    title: str
    layer: int
    count: int
    scores: Mapping[str, LayerAggregate]
    """By protocol."""
    evaluation: Mapping[str, Any]
    """The contents of evaluation.json; empty for neurons."""
    parameters: int
    """Of the model and the autoencoder."""
    training_flops: int | None
    """Of both; None where the model's training is not known."""
    l0: float
    """Units on at a token, on average."""

    def kept(self, of: str) -> float:
        """Share of the behaviour kept, of the `model` or the `layer`, between 0 and 1."""
        if not self.evaluation:
            return 1.0
        found = self.evaluation["kept_model" if of == "model" else "recovered_mean"]
        return min(1.0, max(0.0, found if found is not None else 0.0))

    def adjusted(self, protocol: str, of: str) -> float | None:
        """The score times what is kept, in points; None without a score."""
        points = self.scores[protocol].points if protocol in self.scores else None
        return None if points is None else points * self.kept(of)


def compared(results: Results) -> tuple[Units, ...]:
    """For every model with autoencoders that are evaluated and scored: its neurons of those layers, and the latents."""
    runs = {run.path.resolve(): run for run in results.models if run.control is None}
    found: list[Units] = []
    with progress_bar("autoencoders", total=len(runs), unit="runs") as bar:
        for run in runs.values():
            saes = list(_autoencoders(run, results))
            for layer in sorted({units.layer for units in saes}):
                neurons = _units(run, results, "neurons", layer, {}, {})
                found += [neurons] if neurons is not None else []
                found += [units for units in saes if units.layer == layer]
            bar.advance(1)
    return tuple(found)


def _autoencoders(run: RunResult, results: Results) -> Iterator[Units]:
    """The latents of a run that are evaluated and scored, from the same weights."""
    records = records_folder(run.path, results.mode) / "records.json"
    taps = read_json(records, made_by=f"cratelm collect {run.path} --data DIR")["taps"] if records.exists() else {}
    for path in sorted((run.path / "saes").glob("*/evaluation.json")):
        evaluation = read_json(path, made_by=f"cratelm sae evaluate {run.path} --data DIR")
        tap = f"{PREFIX}{path.parent.name}"
        if tap in taps and taps[tap].get("sae_hash") == evaluation["sae_hash"]:
            described = path.with_name("sae.json")
            description = read_json(described, made_by="cratelm sae train") if described.exists() else {}
            units = _units(run, results, tap, evaluation["layer"], evaluation, description)
            if units is not None:
                yield units


def _units(
    run: RunResult, results: Results, tap: str, layer: int, evaluation: Mapping[str, Any],
    description: Mapping[str, Any],
) -> Units | None:  # fmt: skip
    """None where these are not scored."""
    store, scores = Store.open(run.path), {}
    for key in store.scored():
        asked = SetKey(
            mode=results.mode,
            tap=tap,
            layer=layer,
            protocol=key.protocol,
            explainer=results.explainer,
            simulator=results.simulator,
        )
        if key == asked:
            one = aggregate([store.scores(key)], protocol=key.protocol, seed=SEED, resamples=RESAMPLES)
            scores[key.protocol] = one.layers[0]
    if not scores:
        return None
    own = "" if tap == "neurons" else f" + {tap.removeprefix(PREFIX)}"
    title = run.title.removesuffix(f", {run.tap}")
    trained = None if run.training_tokens is None else TRAINING * run.flops_per_token * run.training_tokens
    more = description.get("training_flops", 0 if not evaluation else None)
    density = read_records(run.path, layer, mode=results.mode, tap=tap).statistics["density"]
    return Units(
        title=f"{title}{own or ', neurons'}", layer=layer, count=next(iter(scores.values())).total, scores=scores,
        evaluation=evaluation, parameters=run.parameters + int(evaluation.get("parameters", 0)),
        training_flops=None if trained is None or more is None else trained + more, l0=float(density.sum()),
    )  # fmt: skip
