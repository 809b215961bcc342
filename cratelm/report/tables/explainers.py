"""Every explainer and simulator of a report's runs side by side; variance of explanations; models in pairs.

A language model is asked about a sample of the neurons, so each row also has lookup's mean over the same neurons.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.scoring.correlation import NO_EXPLANATION, NO_SIMULATION, aggregate
from cratelm.interpretation.scoring.small_samples import few_neurons
from cratelm.interpretation.scoring.statistics import holm
from cratelm.interpretation.store.identities import SimulatorName
from cratelm.report.results.explainers import (
    Measured,
    ModelDifference,
    find,
    mean_on_same_neurons,
    model_difference,
    sampling_variance,
    score_groups,
)
from cratelm.report.results.gather import RESAMPLES, SEED, Results, matched_pairs, other_neurons, same_neurons
from cratelm.report.tables.form import Cell, Column, Table

_CONTROLS = ("shuffled", "constant")
"""By explanation, in the order of their columns."""
KIND = (Column("Protocol"), Column("Model"), Column("Explained by"), Column("Simulated by"))
Compared = tuple[str, list[tuple[str, ModelDifference]]]
"""A pair of models in words, and its differences by protocol."""
SIDE_BY_SIDE = (
    *KIND, Column("Layers", "count"), Column("Mean", "0.1", "points"), Column("95 % interval", "interval", "points"),
    Column("Scored", "share", "of those chosen"), Column("Failed", "count"), Column("Shuffled", "0.1", "points"),
    Column("Constant", "0.1", "points"), Column("Lookup, same neurons", "0.1", "points"),
)  # fmt: skip
SAMPLES = (
    *KIND, Column("Explanations", "count", "of each neuron"), Column("Neurons", "count"),
    Column("SD over neurons", "0.1", "points"), Column("SD over explanations", "0.1", "points"),
    Column("Share of explanations", "0.1", "% of the variance"),
)  # fmt: skip
SIMULATORS = (
    *KIND, Column("Neurons", "count"), Column("SD over neurons", "0.1", "points"),
    Column("SD over simulators", "0.1", "points"), Column("Share of simulators", "0.1", "% of the variance"),
)  # fmt: skip
PAIRED = (
    Column("Protocol"), Column("Models"), Column("Difference", "0.1", "points"),
    Column("95 % interval", "interval", "points"), Column("p", "0.001"), Column("p after Holm", "0.001"),
    Column("SD over neurons", "0.1", "points"), Column("Neurons for 2 points", "count", "of each model"),
    Column("Layers", "count", "compared"), Column("Layers left out"),
)  # fmt: skip


def explainer_tables(results: Results) -> tuple[Table, ...]:
    """All explainers side by side if one is a language model; variance of repeated explanations and simulations;
    pairs of models. Empty tables are left out.
    """
    groups = score_groups(results)
    compared = _compared(results, groups)
    tables = (
        Table(
            name="explainers", caption=f"Explainers and simulators side by side ({results.mode} mode)",
            columns=SIDE_BY_SIDE, rows=tuple(_side_by_side(results, groups)), notes=(
                "A simulator is named by its method and model: all-at-once, next-token and token-by-token read the "
                "expected activations from probabilities, on a scale of 0 to 10 or, where the name says so, "
                "0 to 9; in structured the model writes them; +linear and +percentile are calibrated; any other + is "
                "a deviation from the released procedure. Numbers of different methods are not comparable.",
                "Failed: neurons for which a language model gave no usable answer; no score counts them. Lookup, same "
                "neurons: lookup's mean over the neurons scored in the row.",
                *_missing(groups), *_of_other_neurons(groups, results),
                *few_neurons(scored for group in groups if group.is_main for scored in group.scored),
            ),
        ),
        Table(
            name="samples", caption="Variance of a score due to the choice of the explanation", columns=SAMPLES,
            rows=tuple(_samples(groups)), notes=(
                "Components of variance of neurons explained several times, for neurons scored each time.",
            ),
        ),
        Table(
            name="simulators", caption="Variance of a score due to the simulator", columns=SIMULATORS,
            rows=tuple(_simulators(groups)), notes=(
                "Components of variance of neurons whose explanation was simulated by several simulators, for neurons "
                "scored by each; an offset of one simulator on all neurons is part of the simulators' share.",
            ),
        ),
        Table(
            name="paired", caption=f"Models layer by layer ({results.described})", columns=PAIRED,
            rows=tuple(_paired(compared)), notes=(
                "The mean over layers of the differences of layer means, over the layers in which both models have a "
                "score; from 6 layers on without the last. Interval and p by two-level bootstrap, each model resampled "
                "separately; p corrected for the protocols of a pair by Holm. Neurons for 2 points: the number with "
                "which a layer's mean shows a difference of 2 points (two-sided 5 %, power 80 %).",
                *few_neurons(difference.fewest for _, pairs in compared for _, difference in pairs),
            ),
        ),
    )  # fmt: skip
    return tuple(table for table in tables if table.rows)


def _missing(groups: Sequence[Measured]) -> Iterator[str]:
    """Controls that were not run for a language model, and the commands for them."""
    asked = [group for group in groups if not group.key.by_lookup and group.is_main]
    controls = [name for name in _CONTROLS if not all(find(groups, group, control=name) for group in asked)]
    if controls:
        command = f"cratelm interpret RUN --llm URL --controls {' '.join(controls)}"
        yield f"A dash under {' or '.join(controls)}: not made. Run: {command}"
    if not all(find(groups, group, explainer=EXPLAINER, simulator="") for group in asked):
        yield "A dash under lookup: not made. Run: cratelm interpret RUN --controls shuffled"


def _of_other_neurons(groups: Sequence[Measured], results: Results) -> Iterator[str]:
    """Controls that are not shown because they are of other neurons, and the commands for the right neurons."""
    mode = " --mode compat" * (results.mode == "compat")
    for group in groups:
        for name in _CONTROLS:
            control = find(groups, group, control=name) if group.is_main else None
            if control is not None and not same_neurons(control.layers, group.layers):
                scores = f"{group.run.title} on {group.key.protocol}, explained by {group.key.explainer}"
                scores += f", simulated by {group.key.simulator}" * bool(group.key.simulator)
                yield other_neurons(name, scores, f"{group.run.path} --llm URL{mode} --controls {name}")


def _side_by_side(results: Results, groups: Sequence[Measured]) -> Iterator[tuple[Cell, ...]]:
    """A row for each explainer and simulator, by protocol; none if lookup is the only one."""
    if all(group.key.by_lookup for group in groups):
        return
    order = {name: place for place, name in enumerate(results.protocols)}
    for group in sorted(groups, key=lambda group: order.get(group.key.protocol, len(order))):
        key = group.key
        if group.is_main:
            model = aggregate(group.layers, protocol=key.protocol, seed=SEED, resamples=RESAMPLES)
            failed = sum(
                layer.reason.count(reason) for layer in group.layers for reason in (NO_EXPLANATION, NO_SIMULATION)
            )
            lookup = mean_on_same_neurons(find(groups, group, explainer=EXPLAINER, simulator=""), group)
            yield (
                key.protocol, group.run.title, key.explainer, key.simulator or key.explainer, len(group.layers),
                model.mean, model.interval, model.scored, failed,
                *(_control(find(groups, group, control=name), group) for name in _CONTROLS),
                lookup if key.simulator else None,
            )  # fmt: skip


def _control(control: Measured | None, group: Measured) -> Cell:
    """A control's mean, or that it has no score; None without a control, or if it is of other neurons."""
    if control is None or not same_neurons(control.layers, group.layers):
        return None
    mean = mean_on_same_neurons(control, control)
    return f"0/{sum(len(layer.neuron) for layer in control.layers)} scored" if mean is None else mean


def _samples(groups: Sequence[Measured]) -> Iterator[tuple[Cell, ...]]:
    for group in groups:
        key = group.key
        samples = [other for other in groups if other.run is group.run and replace(other.key, sample=0) == key]
        if group.is_main and len(samples) > 1 and (variance := sampling_variance(samples)) is not None:
            yield (key.protocol, group.run.title, key.explainer, key.simulator, len(samples), *variance)


def _simulators(groups: Sequence[Measured]) -> Iterator[tuple[Cell, ...]]:
    """Rows of explanations that several simulators simulated; calibrations count as the same simulator."""
    for group in groups:
        key = group.key
        same = [
            other for other in groups
            if other.run is group.run and replace(other.key, simulator=key.simulator) == key
            and not (isinstance(other.key.simulated_by, SimulatorName) and not other.key.simulated_by.is_plain)
        ]  # fmt: skip
        if key.control or len(same) < 2 or group is not same[0]:
            continue
        if (variance := sampling_variance(same)) is not None:
            names = ", ".join(other.key.simulator or other.key.explainer for other in same)
            explainer = key.explainer + (f", explanation {key.sample + 1}" if key.sample else "")
            yield (key.protocol, group.run.title, explainer, names, *variance)


def _compared(results: Results, groups: Sequence[Measured]) -> list[Compared]:
    """Each pair of models of equal depth with its difference by every protocol in which both have scores."""
    shown = {(id(group.run), group.key): group for group in groups}
    compared: list[Compared] = []
    for pair in matched_pairs(results.models):
        if pair[0].num_layers == pair[1].num_layers:
            differences = []
            for name in results.protocols:
                both = [shown.get((id(run), replace(results.asked, tap=run.tap, protocol=name))) for run in pair]
                if both[0] is not None and both[1] is not None:
                    differences.append((name, model_difference(both[0], both[1])))
            compared.append((f"{pair[0].title} less {pair[1].title}", differences))
    return compared


def _paired(compared: Sequence[Compared]) -> Iterator[tuple[Cell, ...]]:
    for title, differences in compared:
        corrected = iter(holm([difference.p for _, difference in differences if difference.p is not None]))
        for name, difference in differences:
            known = bool(difference.layers)
            yield (
                name, title, difference.mean, difference.interval, difference.p,
                next(corrected) if known else None, difference.deviation if known else None,
                difference.neurons_needed, len(difference.layers), difference.left_out or "none",
            )  # fmt: skip
