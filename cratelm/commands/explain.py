"""Explain neurons: from the excerpts each fires on, say in words and as a table what it stands for.

    cratelm explain runs/demo/crate-2l --protocol top-and-random --layer 1
    cratelm explain runs/demo/crate-2l --llm http://localhost:8000/v1 --neurons 100

Reads the records that `cratelm collect` wrote and stores the explanations in RUN/interpretation.sqlite. Without --llm
an explanation is a table of tokens; with it, a sentence by that language model, for a sample of the neurons. The next
stage is `cratelm simulate`; `cratelm interpret` runs all three. Stopped and started again, it goes on.
"""

from dataclasses import dataclass
from typing import ClassVar

from cratelm.rundir import claim
from cratelm.workflows.lookup import explain_run
from cratelm.workflows.options.language_model import Explained, Explaining, Spending, Spent, asks, group
from cratelm.workflows.options.selection import Selection, check_runs


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons, and who is asked."""

    BASIC: ClassVar = ("layer", "protocol", "mode", "llm", "model", "neurons", "dry_run", "budget_tokens")
    """The options that `--help` shows; `--help-all` shows all."""
    explaining: Explained = group(Explaining)
    """Who explains. Left out: lookup, which asks nobody, takes seconds and costs nothing."""
    spending: Spent = group(Spending)
    """What it may cost, and how the work is divided."""


def run(options: Options) -> None:
    """Explain the neurons of every run."""
    if asks(options.explaining):
        from cratelm.workflows.llm.run import Order, ask

        ask(Order.of(options, stages=("explain",)))
        return
    for one in check_runs(options):
        with claim(one):
            explain_run(one, options)
