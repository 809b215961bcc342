"""Simulate neurons: predict from an explanation how strongly its neuron fires on held-out text.

    cratelm simulate runs/demo/crate-2l --controls shuffled
    cratelm simulate runs/demo/crate-2l --llm http://localhost:8000/v1 --controls shuffled

Reads what `cratelm explain` stored in RUN/interpretation.sqlite and stores the simulations there. With --llm a
language model simulates, by default from its own explanations; --explainer lookup uses those by lookup. The next stage
is `cratelm score`; `cratelm interpret` runs all three. An interrupted command can be resumed.
"""

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from cratelm.workflows.llm.request import InterpretRequest
from cratelm.workflows.llm.run import interpret
from cratelm.workflows.options.language_model import (
    Controls,
    Explaining,
    ExplainingGroup,
    Simulating,
    SimulatingGroup,
    Spending,
    SpendingGroup,
    group,
)
from cratelm.workflows.options.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons and controls, and the simulator."""

    BASIC: ClassVar = ("layer", "protocol", "mode", "controls", "llm", "model", "neurons", "simulator", "dry_run")
    """The options that `--help` shows; `--help-all` shows all."""
    controls: Controls = ()
    """Also simulate from another neuron's explanation (shuffled) or from one fixed sentence (constant, with --llm)."""
    explaining: ExplainingGroup = group(Explaining)
    """The explainer whose explanations are simulated; by default lookup."""
    simulating: SimulatingGroup = group(Simulating)
    """The simulator."""
    spending: SpendingGroup = group(Spending)
    """Limits of the cost, and how the work is divided."""


def run(options: Options) -> bool:
    """Simulate the neurons of every run. Returns whether nothing waits in a batch."""
    return asyncio.run(interpret(InterpretRequest.of(options, stages=("simulate",))))
