"""Explain, simulate and score the neurons of one or more runs, and print how well they are explained.

    cratelm interpret runs/demo/crate-2l runs/demo/gpt2-2l --controls shuffled
    cratelm interpret runs/demo/crate-2l --llm http://localhost:8000/v1 --dry-run
    cratelm interpret runs/demo/crate-2l --llm http://localhost:8000/v1 --controls shuffled
    cratelm interpret runs/demo/crate-2l --llm Qwen/Qwen2.5-1.5B-Instruct --neurons 50

Needs the records that `cratelm collect` wrote. Without --llm no language model is asked: an explanation is the table of
the tokens a neuron fires on, a simulation looks tokens up in it, and the score is how well that predicts the neuron on
text it was not explained from (points: 100 is perfect, 0 is chance). `--controls shuffled` does the same with the
explanation of another neuron, which shows what a score is worth.

With --llm a language model says in a sentence what each of a sample of neurons fires on, and predicts activations from
the sentence: one behind a URL, or one of Hugging Face in this process. What that would cost is printed first, and with
--dry-run nothing else is done. Lookup scores the same neurons beside it, unless --skip-lookup. docs/interpret.md says
which models to take and which numbers to trust.

Stopped and started again, it goes on; nothing is done, and no answer is paid for, twice.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from cratelm.rundir import claim
from cratelm.runtime import console, progress_bar
from cratelm.workflows.options.language_model import (
    Controls,
    Explained,
    Explaining,
    Name,
    Scorers,
    Simulated,
    Simulating,
    Spending,
    Spent,
    asks,
    group,
)
from cratelm.workflows.options.selection import Selection, check_runs, chosen_layers, chosen_protocols
from cratelm.workflows.score_table import print_scores

Work = Callable[[LayerRecords, Protocol, Store, SetKey], None]
"""One stage of one set: reads what the stage before wrote, writes its own."""


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons, protocols and controls, and who is asked."""

    controls: Controls = ()
    """Also score each neuron with another neuron's explanation: shuffled; or nobody's (with --llm): constant."""
    scorer: Scorers = ("simulation",)
    """simulation is the paper's; detection fuzzing fuzzing-active intruder surprisal embedding example-embedding."""
    encoder: Name = ""
    """Sentence encoder for the embedding scorers: a name on the Hugging Face hub or a directory."""
    explaining: Explained = group(Explaining)
    """Who explains. Left out: lookup, which asks nobody, takes seconds and costs nothing."""
    simulating: Simulated = group(Simulating)
    """Who predicts activations from an explanation, where a language model does."""
    spending: Spent = group(Spending)
    """What it may cost, and how the work is divided."""
    skip_lookup: bool = False
    """With --llm: leave out the scores by lookup, which take seconds and stand beside the model's in the report."""


def run(options: Options) -> None:
    """Run the three stages on every run."""
    if asks(options.explaining, options.simulating):
        from cratelm.workflows.llm.run import Order, ask

        order = Order.of(options, stages=("explain", "simulate", "score"))
        if order.explains_by_lookup and not options.spending.dry_run:
            for one in check_runs(options):
                with claim(one):
                    explain_run(one, options)
        ask(order)
        if "score" in order.stages and not (options.spending.dry_run or options.spending.part):
            look_up_beside(options, {one: options.protocol for one in options.runs})
        return
    if options.spending.merge:
        from cratelm.workflows.llm.run import merge_alone

        look_up_beside(options, merge_alone(options))
        return
    check_controls(options.controls, LOOKUP_CONTROLS)
    for one in check_runs(options):
        with claim(one):
            explain_run(one, options)
            simulate_run(one, options, options.controls)
            score_run(one, options, options.controls)
    for one in check_runs(options):
        print_scores(one, options, lookup_sets(options, options.controls))
    ask_others(options)


def look_up_beside(options: Options, protocols: Mapping[Path, tuple[str, ...]]) -> None:
    """Score by lookup what a language model scored by these protocols of each run, and the control that costs nothing.

    Lookup takes all neurons of a layer; the report takes from it the neurons that the model was asked about.
    """
    for one, names in protocols.items():
        if names and not options.skip_lookup:
            own = replace(options, runs=(one,), protocol=names)
            with claim(one):
                if _missing(one, "explain", own, ()):
                    explain_run(one, own)
                if _missing(one, "simulate", own, ("shuffled",)):
                    simulate_run(one, own, ("shuffled",))
                if _missing(one, "score", own, ("shuffled",)):
                    score_run(one, own, ("shuffled",))
            print(f"\n{one.name}: scored by lookup too; cratelm report sets both side by side")


def ask_others(options: Any) -> None:
    """Apply the scorers beside simulation to explanations by lookup, where any was asked for."""
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
    store, missing = Store.create(run), _missing(run, stage, selection, controls)
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


def _missing(run: Path, stage: Stage, selection: Selection, controls: tuple[str, ...]) -> list[SetKey]:
    """The sets that are asked for and not there."""
    store = Store.create(run)
    return [key for key in _keys(run, selection, controls) if not store.is_done(key, stage)]


def _keys(run: Path, selection: Selection, controls: tuple[str, ...]) -> Iterator[SetKey]:
    for layer in chosen_layers(run, selection):
        for name in chosen_protocols(selection):
            for control in ("", *check_controls(controls, LOOKUP_CONTROLS)):
                yield SetKey(mode=selection.mode, tap=selection.tap, layer=layer, protocol=name, control=control)
