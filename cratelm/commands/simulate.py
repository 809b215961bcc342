"""Simulate neurons: from its explanation alone, predict how strongly each neuron fires on text it was not made from.

    cratelm simulate runs/demo/crate-2l --controls shuffled

Reads what `cratelm explain` stored in RUN/interpretation.sqlite and stores the simulations there. The next stage is
`cratelm score`; `cratelm interpret` runs all three. Stopped and started again, it goes on.
"""

from cratelm.commands.interpret import Options, check_runs, simulate_run
from cratelm.rundir import claim


def run(options: Options) -> None:
    """Simulate the neurons of every run."""
    for one in check_runs(options):
        with claim(one):
            simulate_run(one, options, options.controls)
