"""Explain, simulate and score the neurons of one or more runs, and print how well they are explained.

    cratelm interpret runs/demo/crate-2l runs/demo/gpt2-2l --controls shuffled

Needs the records that `cratelm collect` wrote. No language model is asked: an explanation is the table of the tokens
a neuron fires on, a simulation looks tokens up in it, and the score is how well that predicts the neuron on text it
was not explained from (points: 100 is perfect, 0 is chance). `--controls shuffled` does the same with the explanation
of another neuron, which shows what a score is worth. Stopped and started again, it goes on; nothing is done twice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import tyro

from cratelm.activations.records import (
    LayerRecords,
    Mode,
    read_records,
    recorded_layers,
    recorded_taps,
    records_tokenizer,
)
from cratelm.data.tokenizer import load_tokenizer, token_strings
from cratelm.errors import CrateError
from cratelm.interpretation.explain import explain_layer
from cratelm.interpretation.firing import firing_layer, write_firing
from cratelm.interpretation.protocols import PROTOCOLS, Protocol, protocol
from cratelm.interpretation.schema import MADE, SetKey, Stage
from cratelm.interpretation.score import LayerAggregate, ModelAggregate, aggregate, score_layer
from cratelm.interpretation.simulate import check_controls, simulate_layer
from cratelm.interpretation.store import Store
from cratelm.rundir import claim
from cratelm.runtime import console, progress_bar

Work = Callable[[LayerRecords, Protocol, Store, SetKey], None]
"""One stage of one set: reads what the stage before wrote, writes its own."""

COLUMNS = {"dead": "dead", "too rare": "rare", "constant activations": "const a", "constant simulation": "const s"}
"""Why a neuron has no score -> head of its column in the printed table."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which neurons of which runs, and by which protocols."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    """Run directories, each with the records that `cratelm collect` wrote."""
    protocol: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ("all",)
    """One or more of top-and-random, random-only, anthropic; or all."""
    mode: Mode = "fixed"
    """fixed: explained and scored on different documents. compat: the paper's released procedure."""
    tap: str = "neurons"
    """Which place of the model: its own neurons, sae-NAME, or what `cratelm collect --tap` was given."""
    layer: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...", help_behavior_hint="")] = ()
    """Zero-based layers; all that have records if left out."""


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons, protocols and controls."""

    controls: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")] = ()
    """shuffled: also score each neuron with the explanation of another neuron of its layer."""


def run(options: Options) -> None:
    """Run the three stages on every run."""
    check_controls(options.controls)
    for one in check_runs(options):
        with claim(one):
            explain_run(one, options)
            simulate_run(one, options, options.controls)
            score_run(one, options, options.controls)
    for one in check_runs(options):
        print_scores(one, options, options.controls)


def explain_run(run: Path, selection: Selection) -> None:
    """Explain what is not explained yet."""

    @cache
    def strings() -> list[str]:
        return token_strings(load_tokenizer(records_tokenizer(run, selection.mode)))

    def explain(records: LayerRecords, by: Protocol, store: Store, key: SetKey) -> None:
        store.write_explanations(key, explain_layer(records, by, strings()))

    _do(run, "explain", selection, (), explain)


def simulate_run(run: Path, selection: Selection, controls: tuple[str, ...]) -> None:
    """Simulate what is not simulated yet."""

    def simulate(records: LayerRecords, by: Protocol, store: Store, key: SetKey) -> None:
        explanations = store.explanations(key.explained)
        store.write_simulations(key, simulate_layer(records, by, explanations, control=key.control))

    _do(run, "simulate", selection, controls, simulate)


def score_run(run: Path, selection: Selection, controls: tuple[str, ...]) -> None:
    """Score what is not scored yet."""

    def score(records: LayerRecords, by: Protocol, store: Store, key: SetKey) -> None:
        simulations = store.simulations(key)
        write_firing(store, key, firing_layer(records, by, simulations))
        store.write_scores(key, score_layer(records, by, simulations))

    _do(run, "score", selection, controls, score)


def _do(run: Path, stage: Stage, selection: Selection, controls: tuple[str, ...], work: Work) -> None:
    """Run one stage on all sets that are asked for and not there, with a progress bar."""
    layers, keys = chosen_layers(run, selection), list(_keys(run, selection, controls))
    store = Store.create(run)
    missing = [key for key in keys if not store.is_done(key, stage)]
    if not missing:
        console.print(f"{run}: the {MADE[stage]} asked for are there already")
        return
    with progress_bar(f"{stage} {run.name}", total=len(keys), done=len(keys) - len(missing), unit="sets") as bar:
        for layer in layers:
            todo = [key for key in missing if key.layer == layer]
            records = read_records(run, layer, mode=selection.mode, tap=selection.tap) if todo else None
            for key in todo:
                assert records is not None
                work(records, protocol(key.protocol, key.mode), store, key)
                bar.advance(1, note=f"layer {layer}, {key.what}, {records.num_neurons} neurons")


def check_runs(selection: Selection) -> tuple[Path, ...]:
    """The run directories, refused if one is not there."""
    if not selection.runs:
        raise CrateError("no run directory was named. Run: cratelm interpret RUN")
    for run in selection.runs:
        if not run.is_dir():
            raise CrateError(f"there is no run directory {run}. Run: cratelm train --data DIR --out {run}")
    return selection.runs


def chosen_layers(run: Path, selection: Selection) -> list[int]:
    """The layers asked for, refused if one has no records."""
    found = recorded_layers(run, mode=selection.mode, tap=selection.tap)
    option = " --mode compat" if selection.mode == "compat" else ""
    if not found:
        taps = ", ".join(recorded_taps(run, mode=selection.mode))
        if taps:
            raise CrateError(f"{run} holds no {selection.mode} records of the tap {selection.tap}. Use --tap: {taps}")
        raise CrateError(f"{run} holds no {selection.mode} records. Run: cratelm collect {run} --data DIR{option}")
    if unknown := sorted(set(selection.layer) - set(found)):
        raise CrateError(
            f"{run} has no {selection.mode} records of layer {unknown[0]}. Use: {', '.join(map(str, found))}"
        )
    return sorted(set(selection.layer)) or found


def chosen_protocols(selection: Selection) -> tuple[str, ...]:
    """The protocols asked for, in the paper's order."""
    names = PROTOCOLS if "all" in selection.protocol else selection.protocol
    return tuple(sorted({protocol(name, selection.mode).name for name in names}, key=PROTOCOLS.index))


def _keys(run: Path, selection: Selection, controls: tuple[str, ...]) -> Iterator[SetKey]:
    for layer in chosen_layers(run, selection):
        for name in chosen_protocols(selection):
            for control in ("", *check_controls(controls)):
                yield SetKey(mode=selection.mode, tap=selection.tap, layer=layer, protocol=name, control=control)


def print_scores(run: Path, selection: Selection, controls: tuple[str, ...]) -> None:
    """Print the scores by protocol and layer, 80 columns wide."""
    store, layers, names = Store.open(run), chosen_layers(run, selection), chosen_protocols(selection)
    for control in ("", *controls):
        found = []
        with progress_bar(f"intervals {run.name}", total=len(names), unit="protocols") as bar:
            for name in names:
                key = SetKey(mode=selection.mode, tap=selection.tap, layer=0, protocol=name, control=control)
                scores = [store.scores(replace(key, layer=layer)) for layer in layers]
                found.append(aggregate(scores, protocol=name))
                bar.advance(1)
        control_note = f", control: {control} explanations" if control else ""
        of_tap = "" if selection.tap == "neurons" else f", {selection.tap}"
        print(f"\n{run.name}{of_tap} ({selection.mode} mode, explained by lookup{control_note})")
        all_layers = recorded_layers(run, mode=selection.mode, tap=selection.tap)
        print("\n".join(table(found, whole_model=layers == all_layers)))


def table(found: Sequence[ModelAggregate], *, whole_model: bool) -> list[str]:
    """Lines of the printed table; means over layers where all layers are there."""
    lines = [_row("protocol", "layer", "points", "95 % interval", "scored", *COLUMNS.values())]
    for model in found:
        lines += [_layer_row(model.protocol if i == 0 else "", layer) for i, layer in enumerate(model.layers)]
        if whole_model and model.mean is not None:
            note = f"  variance {model.variance:.2f}" + ("; no last layer" if len(model.layers) >= 6 else "")
            lines.append(_row("", "mean", f"{model.mean:z.2f}", _interval(model.low, model.high)) + note)
    return lines


def _layer_row(name: str, line: LayerAggregate) -> str:
    points = "-" if line.points is None else f"{line.points:z.1f}"
    counts = [str(line.undefined.get(reason, 0)) for reason in COLUMNS]
    scored = f"{line.scored}/{line.total}"
    return _row(name, str(line.layer), points, _interval(line.low, line.high), scored, *counts)


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None else f"[{low:z.1f}, {high:z.1f}]"


def _row(name: str, *cells: str) -> str:
    widths = (6, 7, 15, 12, 5, 5, 8, 8)
    return f"{name:<14}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
