"""The table of the sparsity dial: active neurons, loss and lookup score at every setting."""

from collections.abc import Sequence

import numpy as np

from cratelm.report.results.dial import DIALS, Dial, share_active
from cratelm.report.tables.form import Cell, Column, Table


def dial_table(dials: Sequence[Dial]) -> Table:
    """A row per model and setting."""
    columns = (
        Column("Model"), Column("Dial"), Column("Setting", "0.01"), Column("L0", "0.1", "neurons per token"),
        Column("Active", "0.1", "%"), Column("Loss", "0.001", "nats/token"), Column("Lookup", "0.1", "points"),
        Column("Scored", "0.1", "% of neurons"), Column("Tokens", "human", "of the loss"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for dial in dials:
        for name in DIALS:
            for point in dial.turned(name):
                active, lookup = point["active"], point["lookup"]
                scored = lookup.get("scored")
                rows.append((
                    dial.title, name.replace("_", " "), point[name], None if active is None else float(np.mean(active)),
                    share_active(dial, point), point["loss"] if point["loss"] is not None else "not finite",
                    lookup.get("points"), None if scored is None else 100 * scored,
                    point["tokens"],
                ))  # fmt: skip
    return Table(
        name="dial", caption="Sparsity dial", columns=columns, rows=tuple(rows),
        notes=(
            "The model as it is has penalty 1 and step size 1 (multiples of its own), its own number of steps, and "
            "threshold 0. A penalty or step size turns ISTA itself; a threshold sets activations to 0 that are below "
            "so many times their layer's root mean square. Lookup is the mean score, top-and-random, of some neurons "
            "of each layer on a sample of held-out text.",
        ),
    )  # fmt: skip
