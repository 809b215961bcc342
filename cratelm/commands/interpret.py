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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from cratelm.interpretation.simulators.controls import LOOKUP_CONTROLS, check_controls
from cratelm.rundir import claim
from cratelm.workflows.lookup import ask_others, explain_run, lookup_sets, missing_sets, score_run, simulate_run
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
from cratelm.workflows.options.selection import Selection, check_runs
from cratelm.workflows.score_table import print_scores


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons, protocols and controls, and who is asked."""

    BASIC: ClassVar = (
        "layer",
        "protocol",
        "mode",
        "controls",
        "llm",
        "model",
        "neurons",
        "simulator",
        "dry_run",
        "budget_tokens",
    )
    """The options that `--help` shows; `--help-all` shows all."""
    controls: Controls = ()
    """Also score each neuron with another neuron's explanation: shuffled; or nobody's (with --llm): constant."""
    scorer: Scorers = ("simulation",)
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
                if missing_sets(one, "explain", own, ()):
                    explain_run(one, own)
                if missing_sets(one, "simulate", own, ("shuffled",)):
                    simulate_run(one, own, ("shuffled",))
                if missing_sets(one, "score", own, ("shuffled",)):
                    score_run(one, own, ("shuffled",))
            print(f"\n{one.name}: scored by lookup too; cratelm report sets both side by side")
