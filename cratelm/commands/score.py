"""Score neurons: compare what was simulated with what the neurons did, and print the mean scores by layer.

    cratelm score runs/demo/crate-2l
    cratelm score runs/demo/crate-2l --model Mistral-7B-Instruct-v0.2
    cratelm score runs/demo/crate-2l --llm http://localhost:8000/v1 --scorer detection fuzzing

Reads what `cratelm simulate` stored in RUN/interpretation.sqlite and stores the scores there. --model scores what was
simulated from that language model's explanations, by whichever simulators; nobody is asked. A score is the correlation
over the tokens of all excerpts together (points: times 100). The table counts the neurons that have none: dead (never
fires), rare (in too few documents), const a / const s (the activations or the simulation are all equal), failed (no
usable answer). Other scorers ask --llm again, about pieces of text; docs/interpret.md says what they test.
"""

from dataclasses import dataclass
from typing import ClassVar

from cratelm.interpretation.simulators.controls import LOOKUP_CONTROLS, check_controls
from cratelm.rundir import claim
from cratelm.workflows.lookup import ask_others, lookup_sets, score_run
from cratelm.workflows.options.language_model import (
    Controls,
    Explained,
    Explaining,
    Name,
    Scorers,
    Spending,
    Spent,
    asks,
    group,
)
from cratelm.workflows.options.selection import Selection, check_runs
from cratelm.workflows.score_table import print_scores


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons and controls, by whom."""

    BASIC: ClassVar = ("layer", "protocol", "mode", "controls", "scorer", "llm", "model", "dry_run")
    """The options that `--help` shows; `--help-all` shows all."""
    controls: Controls = ()
    """Also score what was simulated from another neuron's explanation: shuffled."""
    scorer: Scorers = ("simulation",)
    encoder: Name = ""
    """Sentence encoder for the embedding scorers: a name on the Hugging Face hub or a directory."""
    explaining: Explained = group(Explaining)
    """Whose explanations. Left out: those by lookup."""
    spending: Spent = group(Spending)
    """What it may cost, and how the work is divided."""


def run(options: Options) -> None:
    """Score the neurons of every run and print the table."""
    if asks(options.explaining):
        from cratelm.workflows.llm.run import Order, ask

        ask(Order.of(options, stages=("score",)))
        return
    check_controls(options.controls, LOOKUP_CONTROLS)
    for one in check_runs(options):
        with claim(one):
            score_run(one, options, options.controls)
        print_scores(one, options, lookup_sets(options, options.controls))
    ask_others(options)
