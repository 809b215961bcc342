"""Explain, simulate and score by lookup: each stage of a run, as the commands share them."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from cratelm.activations.records import LayerRecords, read_records, records_tokenizer
from cratelm.data.tokenizer import load_tokenizer, token_strings
from cratelm.interpretation.firing.measures import firing_layer, write_firing
from cratelm.interpretation.lookup.explain import explain_layer
from cratelm.interpretation.lookup.simulate import simulate_layer
from cratelm.interpretation.protocols import Protocol, protocol
from cratelm.interpretation.scoring.correlation import score_layer
from cratelm.interpretation.simulators.controls import LOOKUP_CONTROLS, check_controls
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import MADE, SetKey, Stage
from cratelm.runtime import console, progress_bar
from cratelm.workflows.options.selection import Selection, chosen_layers, chosen_protocols

Work = Callable[[LayerRecords, Protocol, Store, SetKey], None]
"""One stage of one set: reads the results of the stage before, writes its own."""


def ask_others(options: Any) -> None:
    """Apply the requested scorers other than simulation to explanations by lookup."""
    if any(scorer != "simulation" for scorer in options.scorer):
        from cratelm.workflows.llm.run import Order, ask

        ask(Order.of(options, stages=()))


def lookup_sets(selection: Selection, controls: tuple[str, ...]) -> list[SetKey]:
    """The kinds of sets that lookup makes; layer and protocol are open."""
    return [
        SetKey(mode=selection.mode, tap=selection.tap, layer=0, protocol="", control=control)
        for control in ("", *controls)
    ]


def explain_run(run: Path, selection: Selection) -> None:
    """Explain the neurons of the requested sets that have no explanations yet."""

    @cache
    def strings() -> list[str]:
        return token_strings(load_tokenizer(records_tokenizer(run, selection.mode)))

    def explain(records: LayerRecords, by: Protocol, store: Store, key: SetKey) -> None:
        store.write_explanations(key, explain_layer(records, by, strings()))

    _run_stage(run, "explain", selection, (), explain)


def simulate_run(run: Path, selection: Selection, controls: tuple[str, ...]) -> None:
    """Simulate the requested sets that have no simulations yet."""

    def simulate(records: LayerRecords, by: Protocol, store: Store, key: SetKey) -> None:
        explanations = store.explanations(key.explained)
        store.write_simulations(key, simulate_layer(records, by, explanations, control=key.control))

    _run_stage(run, "simulate", selection, controls, simulate)


def score_run(run: Path, selection: Selection, controls: tuple[str, ...]) -> None:
    """Score the requested sets that have no scores yet."""

    def score(records: LayerRecords, by: Protocol, store: Store, key: SetKey) -> None:
        simulations = store.simulations(key)
        write_firing(store, key, firing_layer(records, by, simulations))
        store.write_scores(key, score_layer(records, by, simulations))

    _run_stage(run, "score", selection, controls, score)


def _run_stage(run: Path, stage: Stage, selection: Selection, controls: tuple[str, ...], work: Work) -> None:
    """Run one stage on the requested sets that are missing, with a progress bar."""
    layers, keys = chosen_layers(run, selection), list(_all_sets(run, selection, controls))
    store, missing = Store.create(run), missing_sets(run, stage, selection, controls)
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


def missing_sets(run: Path, stage: Stage, selection: Selection, controls: tuple[str, ...]) -> list[SetKey]:
    """The requested sets that are missing."""
    store = Store.create(run)
    return [key for key in _all_sets(run, selection, controls) if not store.is_done(key, stage)]


def _all_sets(run: Path, selection: Selection, controls: tuple[str, ...]) -> Iterator[SetKey]:
    for layer in chosen_layers(run, selection):
        for name in chosen_protocols(selection):
            for control in ("", *check_controls(controls, LOOKUP_CONTROLS)):
                yield SetKey(mode=selection.mode, tap=selection.tap, layer=layer, protocol=name, control=control)
