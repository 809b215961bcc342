"""Explain neurons: describe in words what each neuron fires on, from the excerpts with its activations.

    cratelm explain runs/demo/crate-2l --protocol top-and-random --layer 1
    cratelm explain runs/demo/crate-2l --llm http://localhost:8000/v1 --neurons 100
    cratelm explain runs/demo/crate-2l --llm http://localhost:8000/v1 --show-prompt 7

Reads the records that `cratelm collect` wrote and stores the explanations in RUN/interpretation.sqlite. Without --llm
an explanation is a table of tokens; with --llm, a sentence by that language model, for a sample of the neurons. The
next stage is `cratelm simulate`; `cratelm interpret` runs all three. An interrupted command can be resumed.
"""

import asyncio
from dataclasses import dataclass, replace
from typing import ClassVar

from cratelm.workflows.llm.request import InterpretRequest
from cratelm.workflows.llm.run import interpret
from cratelm.workflows.llm.show_prompt import show_prompt
from cratelm.workflows.options.language_model import Explaining, ExplainingGroup, Number, Spending, SpendingGroup, group
from cratelm.workflows.options.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons, and the explainer."""

    BASIC: ClassVar = ("layer", "protocol", "mode", "llm", "model", "neurons", "dry_run", "budget_tokens")
    """The options that `--help` shows; `--help-all` shows all."""
    explaining: ExplainingGroup = group(Explaining)
    """The explainer. By default lookup, which needs no language model and takes seconds."""
    spending: SpendingGroup = group(Spending)
    """Limits of the cost, and how the work is divided."""
    show_prompt: Number = None
    """Print the prompt for this neuron of the first layer and protocol, as the language model reads it, and stop."""


def run(options: Options) -> bool:
    """Explain the neurons of every run. Returns whether nothing waits in a batch."""
    request = InterpretRequest.of(options, stages=("explain",))
    if options.show_prompt is not None:
        spending = replace(options.spending, dry_run=True)
        asyncio.run(show_prompt(replace(request, spending=spending), options.show_prompt))
        return True
    return asyncio.run(interpret(request))
