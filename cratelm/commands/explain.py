"""Explain neurons: describe in words what each neuron fires on, from the excerpts with its activations.

    cratelm explain runs/demo/crate-2l --protocol top-and-random --layer 1
    cratelm explain runs/demo/crate-2l --llm http://localhost:8000/v1 --neurons 100

Reads the records that `cratelm collect` wrote and stores the explanations in RUN/interpretation.sqlite. Without --llm
an explanation is a table of tokens; with --llm, a sentence by that language model, for a sample of the neurons. The
next stage is `cratelm simulate`; `cratelm interpret` runs all three. An interrupted command can be resumed.
"""

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from cratelm.workflows.llm.request import InterpretRequest
from cratelm.workflows.llm.run import interpret
from cratelm.workflows.options.language_model import Explaining, ExplainingGroup, Spending, SpendingGroup, group
from cratelm.workflows.options.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons, and who explains."""

    BASIC: ClassVar = ("layer", "protocol", "mode", "llm", "model", "neurons", "dry_run", "budget_tokens")
    """The options that `--help` shows; `--help-all` shows all."""
    explaining: ExplainingGroup = group(Explaining)
    """Who explains. By default lookup, which needs no language model and takes seconds."""
    spending: SpendingGroup = group(Spending)
    """Limits of the cost, and how the work is divided."""


def run(options: Options) -> None:
    """Explain the neurons of every run."""
    asyncio.run(interpret(InterpretRequest.of(options, stages=("explain",))))
