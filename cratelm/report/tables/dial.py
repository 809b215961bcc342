"""The table of the sparsity dial: active neurons, loss and lookup score at every setting."""

from collections.abc import Sequence

import numpy as np

from cratelm.report.results.dial import DIALS, Dial, percent_active
from cratelm.report.tables.form import Cell, Column, Table

DIAL_COLUMNS = (
    Column("Model"), Column("Dial"), Column("Setting", "0.01"), Column("L0", "0.1", "neurons per token"),
    Column("Active", "0.1", "%"), Column("Loss", "0.001", "nats/token"), Column("Lookup", "0.1", "points"),
    Column("Scored", "0.1", "% of neurons"), Column("Tokens", "human", "of the loss"),
)  # fmt: skip


def dial_table(dials: Sequence[Dial]) -> Table:
    """A row per model and setting."""
    rows: list[tuple[Cell, ...]] = []
    for dial in dials:
        for name in DIALS:
            for point in dial.settings(name):
                active, lookup = point["active"], point["lookup"]
                scored = lookup.get("scored")
                rows.append((
                    dial.title, name.replace("_", " "), point[name], None if active is None else float(np.mean(active)),
                    percent_active(dial, point), point["loss"] if point["loss"] is not None else "not finite",
                    lookup.get("points"), None if scored is None else 100 * scored, point["tokens"],
                ))  # fmt: skip
    return Table(
        name="dial", caption="Sparsity dial", columns=DIAL_COLUMNS, rows=tuple(rows),
        notes=(
            "The unchanged model has penalty 1 and step size 1 (multiples of its trained values), its trained number "
            "of steps, and threshold 0. Penalty and step size change ISTA itself; a threshold sets activations to 0 "
            "that are below this multiple of their layer's root mean square. Lookup is the mean score "
            "(top-and-random) of a sample of neurons of each layer on a sample of held-out text.",
        ),
    )  # fmt: skip
