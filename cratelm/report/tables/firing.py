"""The tables of consistency and distinctiveness, by model and by layer.

`docs/firing.md` defines the numbers.
"""

from collections.abc import Sequence

from cratelm.interpretation.firing.means import Mean
from cratelm.interpretation.firing.measures import (
    KINDS,
    STATED,
    THRESHOLDS,
)
from cratelm.report.results.firing import RunFiring
from cratelm.report.tables.form import Cell, Column, Table

SHARE, ENDS = "0.1", Column("95 % interval", "interval", "%")


def _columns(*more: Column) -> tuple[Column, ...]:
    return (
        Column("Excerpts"), Column("Model"), *more, Column("Consistency", "0.1", "%"), ENDS,
        Column("Fires on any token", "0.1", "%"), Column("Strength", "0.1", "% of maximum"),
        Column("Distinctiveness", "0.1", "%"), ENDS, Column("Of mass", "0.1", "%"), ENDS,
        Column("Any token is relevant", "0.1", "%"), Column("Neurons", "count"),
        Column("Nothing predicted", "count"), Column("Silent", "count"),
    )  # fmt: skip


def firing_tables(found: Sequence[RunFiring]) -> tuple[Table, ...]:
    """By model, and by layer; empty where no run has simulations."""
    if not found:
        return ()
    rows, layers = list[tuple[Cell, ...]](), list[tuple[Cell, ...]]()
    kinds = [kind for kind in KINDS if any(kind in one.own.overall for one in found)]
    for kind in kinds:
        for one in found:
            own, shuffled = (one.run.title, one.own), (f"{one.run.title}, shuffled", one.shuffled)
            for title, firing in (own, shuffled, *((f"{one.run.title}, {who}", made) for who, made in one.others)):
                if firing is not None and kind in firing.overall:
                    rows.append((kind, title, *_cells(firing.overall[kind])))
                    layers += [
                        (kind, title, layer, *_cells(mean))
                        for layer, mean in zip(firing.layers, firing.by_layer[kind], strict=True)
                    ]
    protocol = found[0].protocol
    return (
        Table(
            name="firing", caption=f"Firing on relevant tokens ({protocol})", columns=_columns(), rows=tuple(rows),
            notes=_notes(protocol, kinds),
        ),
        Table(
            name="firing_layers", caption=f"Firing on relevant tokens by layer ({protocol})", rows=tuple(layers),
            columns=_columns(Column("Layer", "count")),
        ),
    )  # fmt: skip


def _notes(protocol: str, kinds: Sequence[str]) -> tuple[str, ...]:
    apart = f", {' and '.join(kinds)} apart" if len(kinds) > 1 else f", all of them {kinds[0]}" if kinds else ""
    return (
        f"A token is relevant to a neuron where the simulation predicts at least {THRESHOLDS[STATED]} of its largest "
        "prediction for it. Consistency: share of the relevant tokens on which the neuron fires; by chance it is the "
        "share of any tokens on which it fires. Strength: its mean activation there. Distinctiveness: share of the "
        "tokens on which it fires, and of its activation (mass), that is on relevant tokens; by chance it is the share "
        "of any tokens that are relevant. Means over neurons, then over layers; intervals by two-level bootstrap, over "
        "neurons and over the excerpts of each.",
        f"Excerpts of {protocol}{apart}. Nothing predicted: neurons without a relevant token. Silent: neurons that "
        "fire nowhere in these excerpts. Shuffled: explanations of other neurons of the layer.",
    )


def _cells(mean: Mean) -> tuple[Cell, ...]:
    return (
        mean.of("consistency"), mean.interval("consistency"), mean.of("firing"), mean.of("strength"),
        mean.of("distinctiveness"), mean.interval("distinctiveness"), mean.of("distinctiveness_mass"),
        mean.interval("distinctiveness_mass"), mean.of("relevant"), mean.neurons, mean.unpredicted, mean.silent,
    )  # fmt: skip
