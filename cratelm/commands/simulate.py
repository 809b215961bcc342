"""Simulate neurons: from its explanation alone, predict how strongly each neuron fires on text it was not made from.

    cratelm simulate runs/demo/crate-2l --controls shuffled
    cratelm simulate runs/demo/crate-2l --llm http://localhost:8000/v1 --controls shuffled

Reads what `cratelm explain` stored in RUN/interpretation.sqlite and stores the simulations there. With --llm a
language model simulates, by default from the explanations that it gave itself; --explainer lookup takes those by
lookup. The next stage is `cratelm score`; `cratelm interpret` runs all three. Stopped and started again, it goes on.
"""

from dataclasses import dataclass
from typing import ClassVar

from cratelm.interpretation.simulators.controls import LOOKUP_CONTROLS, check_controls
from cratelm.rundir import claim
from cratelm.workflows.lookup import simulate_run
from cratelm.workflows.options.language_model import (
    Controls,
    Explained,
    Explaining,
    Simulated,
    Simulating,
    Spending,
    Spent,
    asks,
    group,
)
from cratelm.workflows.options.selection import Selection, check_runs


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons and controls, and who is asked."""

    BASIC: ClassVar = ("layer", "protocol", "mode", "controls", "llm", "model", "neurons", "simulator", "dry_run")
    """The options that `--help` shows; `--help-all` shows all."""
    controls: Controls = ()
    """Also simulate each neuron from another neuron's explanation: shuffled; or nobody's (with --llm): constant."""
    explaining: Explained = group(Explaining)
    """Whose explanations. Left out: those by lookup."""
    simulating: Simulated = group(Simulating)
    """Who predicts activations from them, where a language model does."""
    spending: Spent = group(Spending)
    """What it may cost, and how the work is divided."""


def run(options: Options) -> None:
    """Simulate the neurons of every run."""
    if asks(options.explaining, options.simulating):
        from cratelm.workflows.llm.run import Order, ask

        ask(Order.of(options, stages=("simulate",)))
        return
    check_controls(options.controls, LOOKUP_CONTROLS)
    for one in check_runs(options):
        with claim(one):
            simulate_run(one, options, options.controls)
