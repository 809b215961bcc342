"""Score neurons: compare what was simulated with what the neurons did, and print the mean scores by layer.

    cratelm score runs/demo/crate-2l

Reads what `cratelm simulate` stored in RUN/interpretation.sqlite and stores the scores there. A score is the
correlation over the tokens of all excerpts together (points: times 100). The table counts the neurons that have none:
dead (never fires), rare (in too few documents), const a / const s (the activations or the simulation are all equal).
"""

from cratelm.commands.interpret import Options, check_runs, print_scores, score_run
from cratelm.rundir import claim


def run(options: Options) -> None:
    """Score the neurons of every run and print the table."""
    for one in check_runs(options):
        with claim(one):
            score_run(one, options, options.controls)
        print_scores(one, options, options.controls)
