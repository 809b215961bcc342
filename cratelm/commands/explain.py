"""Explain neurons: from the excerpts each fires on, say in words and as a table what it stands for.

    cratelm explain runs/demo/crate-2l --protocol top-and-random --layer 1

Reads the records that `cratelm collect` wrote and stores the explanations in RUN/interpretation.sqlite. The next stage
is `cratelm simulate`; `cratelm interpret` runs all three. Stopped and started again, it goes on.
"""

from cratelm.commands.interpret import Selection, check_runs, explain_run
from cratelm.rundir import claim

Options = Selection


def run(options: Options) -> None:
    """Explain the neurons of every run."""
    for one in check_runs(options):
        with claim(one):
            explain_run(one, options)
