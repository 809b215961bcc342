"""Every explainer and simulator of a report's runs side by side; chance in explanations; models in pairs.

A language model is asked about a sample of the neurons, so lookup's mean over the same neurons stands beside its own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Float64

from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.scoring.correlation import (
    NO_EXPLANATION,
    NO_SIMULATION,
    LayerScores,
    aggregate,
    layer_points,
)
from cratelm.interpretation.scoring.statistics import (
    bootstrap_means,
    components,
    generator,
    holm,
    interval,
    mean_and_variance,
    p_value,
    shown_layers,
)
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.identities import SimulatorName
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.results.gather import (
    RESAMPLES,
    SEED,
    Results,
    RunResult,
    matched_pairs,
    other_neurons,
    same_neurons,
)
from cratelm.report.tables.form import Cell, Column, Table

Z_95, Z_POWER = 1.959964, 0.841621
"""Standard errors of a two-sided 95 % test, and of a power of 80 %."""

CONTROLS = ("shuffled", "constant")
"""By explanation, in the order of their columns."""
SIDE_BY_SIDE = (
    Column("Protocol"), Column("Model"), Column("Explained by"), Column("Simulated by"), Column("Layers", "count"),
    Column("Mean", "0.1", "points"), Column("95 % interval", "interval", "points"),
    Column("Scored", "share", "of those chosen"), Column("Failed", "count"), Column("Shuffled", "0.1", "points"),
    Column("Constant", "0.1", "points"), Column("Lookup, same neurons", "0.1", "points"),
)  # fmt: skip
CHANCE = (
    Column("Protocol"), Column("Model"), Column("Explained by"), Column("Simulated by"),
    Column("Explanations", "count", "of each neuron"), Column("Neurons", "count"),
    Column("SD over neurons", "0.1", "points"), Column("SD over explanations", "0.1", "points"),
    Column("Share of explanations", "0.1", "% of the variance"),
)  # fmt: skip
SIMULATORS = (
    Column("Protocol"), Column("Model"), Column("Explained by"), Column("Simulated by"), Column("Neurons", "count"),
    Column("SD over neurons", "0.1", "points"), Column("SD over simulators", "0.1", "points"),
    Column("Share of simulators", "0.1", "% of the variance"),
)  # fmt: skip
PAIRED = (
    Column("Protocol"), Column("Models"), Column("Difference", "0.1", "points"),
    Column("95 % interval", "interval", "points"), Column("p", "0.001"), Column("p after Holm", "0.001"),
    Column("SD over neurons", "0.1", "points"), Column("Neurons for 2 points", "count", "of each model"),
    Column("Layers", "count", "compared"), Column("Layers left out"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """The scores of one run by one protocol, explainer, simulator, control and sample."""

    run: RunResult
    key: SetKey
    """Its layer is open."""
    layers: tuple[LayerScores, ...] = field(repr=False)


def explainer_tables(results: Results) -> tuple[Table, ...]:
    """All explainers side by side where a language model is one; chance where neurons were explained several times;
    pairs of models."""
    found = [one for run in results.rows for one in _measured(run, results)]
    tables = []
    if any(_is_asked(one.key) for one in found):
        rows = tuple(_side_by_side(one, found) for one in found if not one.key.control and not one.key.sample)
        tables.append(Table(
            name="explainers", caption=f"Explainers and simulators side by side ({results.mode} mode)",
            columns=SIDE_BY_SIDE, rows=tuple(sorted(rows, key=lambda row: results.protocols.index(str(row[0])))),
            notes=(
                "A simulator is named by its method and model: all-at-once and token-by-token read expected "
                "activations from the probabilities of a prompt, on a scale of 0 to 10 or, where the name says so, "
                "0 to 9; structured lets a chat write them; +linear and +percentile are calibrated; what else "
                "stands behind a + is a choice of the released chain made otherwise. Numbers of different methods "
                "are not the same measurement.",
                "Failed: neurons for which a language model gave no usable answer, which no score counts. Lookup, same "
                "neurons: lookup's mean over the neurons scored in the row.",
                *_not_made(found), *_of_other_neurons(found, results),
            ),
        ))  # fmt: skip
    if rows := tuple(_chance(found)):
        tables.append(Table(
            name="samples", caption="How much of a score is the explanation's luck", columns=CHANCE, rows=rows,
            notes=("Components of variance of neurons explained several times, from those scored each time.",),
        ))  # fmt: skip
    if rows := tuple(_simulators(found)):
        tables.append(Table(
            name="simulators", caption="How much of a score is the simulator's", columns=SIMULATORS, rows=rows,
            notes=(
                "Components of variance of neurons whose one explanation several simulators simulated, from those that "
                "each scored; what one simulator gives all neurons more than another is part of the simulators' share.",
            ),
        ))  # fmt: skip
    if rows := tuple(_paired(results, found)):
        tables.append(Table(
            name="paired", caption=f"Models layer by layer ({results.described})", columns=PAIRED, rows=rows,
            notes=(
                "The mean over layers of the differences of layer means, over the layers in which both models have a "
                "score; from 6 layers on without the last. Interval and p by two-level bootstrap, each model drawn "
                "apart, p corrected for the protocols of a pair by Holm. Neurons for 2 points: how many a layer's mean "
                "needs to tell 2 points (two-sided 5 %, power 80 %).",
            ),
        ))  # fmt: skip
    return tuple(tables)


def _measured(run: RunResult, results: Results) -> Iterator[Measured]:
    store = Store.open(run.path)
    keys = [key for key in store.scored() if (key.mode, key.tap) == (results.mode, run.tap)]
    for kind, own in groupby(sorted(keys, key=_open), key=_open):
        layers = tuple(store.scores(key) for key in sorted(own, key=lambda key: key.layer))
        yield Measured(run, SetKey(**dict(zip(SetKey.__slots__, (*kind[:2], 0, *kind[2:]), strict=True))), layers)


def _is_asked(key: SetKey) -> bool:
    """Whether a language model explained or simulated."""
    return not key.by_lookup


def _not_made(found: Sequence[Measured]) -> Iterator[str]:
    """What stands beside no language model, and how to make it."""
    asked = [one for one in found if _is_asked(one.key) and not one.key.control and not one.key.sample]
    command = "cratelm interpret RUN --llm URL"
    controls = [name for name in CONTROLS if not all(_find(found, one, control=name) for one in asked)]
    if controls:
        yield f"A dash under {' or '.join(controls)}: not made. Run: {command} --controls {' '.join(controls)}"
    if not all(_find(found, one, explainer=EXPLAINER, simulator="") for one in asked):
        yield "A dash under lookup: not made. Run: cratelm interpret RUN --controls shuffled"


def _of_other_neurons(found: Sequence[Measured], results: Results) -> Iterator[str]:
    """Which controls stand beside no score because they are of other neurons, and how to make those that would."""
    for one in found:
        if one.key.control or one.key.sample:
            continue
        for name in CONTROLS:
            control = _find(found, one, control=name)
            if control is not None and not same_neurons(control.layers, one.layers):
                whose = f"{one.run.title} on {one.key.protocol}, explained by {one.key.explainer}"
                whose += f", simulated by {one.key.simulator}" * bool(one.key.simulator)
                mode = " --mode compat" * (results.mode == "compat")
                yield other_neurons(name, whose, f"{one.run.path} --llm URL{mode} --controls {name}")


def _open(key: SetKey) -> tuple:
    """The key without its layer, lookup before language models."""
    return (key.mode, key.tap, key.protocol, key.explainer, key.simulator, key.control, key.sample)


def _side_by_side(one: Measured, found: Sequence[Measured]) -> tuple[Cell, ...]:
    model = aggregate(one.layers, protocol=one.key.protocol, seed=SEED, resamples=RESAMPLES)
    failed = sum(layer.reason.count(reason) for layer in one.layers for reason in (NO_EXPLANATION, NO_SIMULATION))
    ends = None if model.low is None or model.high is None else (model.low, model.high)
    scored, total = (sum(getattr(line, name) for line in model.layers) for name in ("scored", "total"))
    lookup = _mean_of(_find(found, one, explainer=EXPLAINER, simulator=""), one)
    return (
        one.key.protocol, one.run.title, one.key.explainer, one.key.simulator or one.key.explainer, len(one.layers),
        model.mean, ends, (scored, total), failed,
        *(_beside(_find(found, one, control=name), one) for name in CONTROLS), lookup if one.key.simulator else None,
    )  # fmt: skip


def _find(found: Sequence[Measured], one: Measured, **changes: Any) -> Measured | None:
    key = replace(one.key, **changes)
    return next((other for other in found if other.run is one.run and other.key == key), None)


def _beside(control: Measured | None, one: Measured) -> Cell:
    """A control's mean, or that it has no score; None where there is no control, or it is of other neurons."""
    if control is None or not same_neurons(control.layers, one.layers):
        return None
    mean = _mean_of(control, control)
    return f"0/{sum(len(layer.neuron) for layer in control.layers)} scored" if mean is None else mean


def _mean_of(found: Measured | None, of: Measured) -> float | None:
    """Mean over layers by the rule of `aggregate`, of the neurons that are scored in the other too."""
    if found is None:
        return None
    wanted = {layer.layer: layer.neuron[~np.isnan(layer.correlation)] for layer in of.layers}
    return mean_and_variance([
        layer_points(layer.correlation[np.isin(layer.neuron, wanted[layer.layer])])
        for layer in found.layers[: shown_layers(len(found.layers))] if layer.layer in wanted
    ])[0]  # fmt: skip


def _chance(found: Sequence[Measured]) -> Iterator[tuple[Cell, ...]]:
    for one in found:
        samples = [other for other in found if other.run is one.run and replace(other.key, sample=0) == one.key]
        if one.key.sample or one.key.control or len(samples) < 2:
            continue
        if (split := _split(samples)) is not None:
            neurons, *numbers = split
            yield (
                one.key.protocol, one.run.title, one.key.explainer, one.key.simulator, len(samples), neurons, *numbers,
            )  # fmt: skip


def _simulators(found: Sequence[Measured]) -> Iterator[tuple[Cell, ...]]:
    """Rows of those that one explanation of each neuron was simulated by; calibrations of one are one."""
    for one in found:
        same = [
            other
            for other in found
            if other.run is one.run and replace(other.key, simulator=one.key.simulator) == one.key
            and not (isinstance(other.key.simulated_by, SimulatorName) and not other.key.simulated_by.is_plain)
        ]  # fmt: skip
        if one.key.control or len(same) < 2 or one is not same[0]:
            continue
        if (split := _split(same)) is not None:
            names = ", ".join(other.key.simulator or other.key.explainer for other in same)
            explainer = one.key.explainer + (f", explanation {one.key.sample + 1}" if one.key.sample else "")
            yield (one.key.protocol, one.run.title, explainer, names, *split)


def _split(several: Sequence[Measured]) -> tuple[int, float, float, float | None] | None:
    """Neurons that each of several scored; standard deviation over them, and over the several; the latter's share."""
    scores = np.concatenate([
        np.stack([other.layers[place].of_layer(1 + _last(several, place)).correlation for other in several], axis=1)
        for place in range(min(len(other.layers) for other in several))
    ])  # fmt: skip
    split = components(100 * scores[np.isfinite(scores).all(axis=1)])
    if split is None:
        return None
    between, within, neurons = split
    share = 100 * within / (between + within) if between + within else None
    return neurons, math.sqrt(between), math.sqrt(within), share


def _last(samples: Sequence[Measured], place: int) -> int:
    return max(int(other.layers[place].neuron.max(initial=0)) for other in samples)


def _paired(results: Results, found: Sequence[Measured]) -> Iterator[tuple[Cell, ...]]:
    for first, second in matched_pairs(results.models):
        if first.num_layers != second.num_layers:
            continue
        pairs = []
        for name in results.protocols:
            mine, other = (_shown(found, run, results, name) for run in (first, second))
            if mine is not None and other is not None:
                pairs.append((name, _pair(mine, other)))
        corrected = iter(holm([p_value(pair.difference) for _, pair in pairs if pair.layers]))
        for name, pair in pairs:
            numbers: tuple[Cell, ...] = (None,) * 5
            if pair.layers:
                neurons = math.ceil(2 * ((Z_95 + Z_POWER) * pair.deviation / 2) ** 2)
                numbers = (
                    interval(pair.difference),
                    p_value(pair.difference),
                    next(corrected),
                    pair.deviation,
                    neurons,
                )
            mean = float(pair.difference.mean()) if pair.layers else None
            yield (
                name, f"{first.title} less {second.title}", mean, *numbers, len(pair.layers), pair.left_out or "none",
            )  # fmt: skip


def _shown(found: Sequence[Measured], run: RunResult, results: Results, name: str) -> Measured | None:
    wanted = replace(results.asked, tap=run.tap, protocol=name)
    return next((one for one in found if one.run is run and one.key == wanted), None)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models compared by one protocol, layer by layer."""

    layers: tuple[int, ...]
    """Zero-based; those in which both have a score."""
    difference: Float64[np.ndarray, " resamples"] = field(repr=False)
    """Resampled means over these layers of the differences of layer means, in points; empty without such a layer."""
    deviation: float
    """Standard deviation over neurons within these layers, pooled, in points."""
    left_out: str
    """The other layers, with who has no score there; empty where there is none."""


def _pair(*both: Measured) -> Pair:
    """Compare two models in the layers in which both have a score: a mean over other layers is of something else.

    From 6 layers on the last one is left out, as in the paper's table, and not named among those left out.
    """
    asked = sorted({layer.layer for one in both for layer in one.layers})
    shown = asked[: shown_layers(len(asked))]
    scored = [{layer.layer: layer for layer in one.layers if np.isfinite(layer.correlation).any()} for one in both]
    layers = tuple(layer for layer in shown if all(layer in own for own in scored))
    without = [
        (layer, " and ".join(one.run.title for one, own in zip(both, scored, strict=True) if layer not in own))
        for layer in shown if layer not in layers
    ]  # fmt: skip
    compared = [[own[layer] for layer in layers] for own in scored]
    differences = [
        _resampled_mean(mine, both[0]) - _resampled_mean(other, both[1]) for mine, other in zip(*compared, strict=True)
    ]
    return Pair(
        layers=layers, difference=100 * np.mean(differences, axis=0) if layers else np.empty(0),
        deviation=_deviation([layer for own in compared for layer in own]),
        left_out="; ".join(f"{layer}: no score in {who}" for layer, who in without),
    )  # fmt: skip


def _resampled_mean(layer: LayerScores, of: Measured) -> Float64[np.ndarray, " resamples"]:
    """Of one layer of one model, drawn from numbers of its own: two models are resampled apart."""
    rng = generator(SEED, of.key.protocol, layer.layer, of.run.identity)
    return bootstrap_means(layer.sums[np.isfinite(layer.correlation)], rng, RESAMPLES)


def _deviation(layers: Sequence[LayerScores]) -> float:
    """Standard deviation over neurons within layers, pooled, in points."""
    parts = [layer.correlation[np.isfinite(layer.correlation)] for layer in layers]
    freedom = sum(max(len(part) - 1, 0) for part in parts)
    squares = sum(float(((part - part.mean()) ** 2).sum()) for part in parts if len(part))
    return 100 * math.sqrt(squares / freedom) if freedom else 0.0
