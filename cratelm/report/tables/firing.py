"""The tables of consistency and distinctiveness, by model and by layer. `docs/firing.md` defines the numbers."""

from collections.abc import Sequence

from cratelm.interpretation.firing.means import Mean
from cratelm.interpretation.firing.measures import KINDS, STATED, THRESHOLDS
from cratelm.interpretation.scoring.small_samples import few_neurons
from cratelm.report.results.firing import RunFiring
from cratelm.report.tables.form import Cell, Column, Table

ENDS = Column("95 % interval", "interval", "%")


def _columns(*more: Column) -> tuple[Column, ...]:
    return (
        Column("Excerpts"), Column("Model"), *more, Column("Consistency", "0.1", "%"), ENDS,
        Column("Fires on any token", "0.1", "%"), Column("Consistency, permuted", "0.1", "%"),
        Column("Strength", "0.1", "% of maximum"),
        Column("Distinctiveness", "0.1", "%"), ENDS, Column("Of mass", "0.1", "%"), ENDS,
        Column("Any token is relevant", "0.1", "%"), Column("Distinctiveness, permuted", "0.1", "%"),
        Column("Neurons", "count"),
        Column("Nothing predicted", "count"), Column("Silent", "count"),
    )  # fmt: skip


def firing_tables(entries: Sequence[RunFiring]) -> tuple[Table, ...]:
    """By model, and by layer; empty where no run has simulations."""
    if not entries:
        return ()
    rows, layers, fewest = list[tuple[Cell, ...]](), list[tuple[Cell, ...]](), list[int]()
    kinds = [kind for kind in KINDS if any(kind in entry.own.overall for entry in entries)]
    for kind in kinds:
        for entry in entries:
            variants = (("", entry.own), (", shuffled", entry.shuffled), *((f", {who}", f) for who, f in entry.others))
            for suffix, firing in variants:
                if firing is not None and kind in firing.overall:
                    head = (kind, f"{entry.run.title}{suffix}")
                    rows.append((*head, *_cells(firing.overall[kind])))
                    by_layer = zip(firing.layers, firing.by_layer[kind], strict=True)
                    layers += [(*head, layer, *_cells(mean)) for layer, mean in by_layer]
                    fewest += [mean.fewest for mean in firing.by_layer[kind]]
    protocol = entries[0].protocol
    return (
        Table(
            name="firing", caption=f"Firing on relevant tokens ({protocol})", columns=_columns(), rows=tuple(rows),
            notes=(*_notes(protocol, kinds), *few_neurons(fewest)),
        ),
        Table(
            name="firing_layers", caption=f"Firing on relevant tokens by layer ({protocol})", rows=tuple(layers),
            columns=_columns(Column("Layer", "count")),
        ),
    )  # fmt: skip


def _notes(protocol: str, kinds: Sequence[str]) -> tuple[str, ...]:
    separate = f", {' and '.join(kinds)} separately" if len(kinds) > 1 else f", {kinds[0]} only" if kinds else ""
    return (
        f"A token is relevant to a neuron where the simulation predicts at least {THRESHOLDS[STATED]} of its largest "
        "prediction for this neuron. Consistency: share of the relevant tokens on which the neuron fires; by chance, "
        "the share of all tokens on which it fires. Strength: mean activation on relevant tokens. Distinctiveness: "
        "share of the tokens on which the neuron fires, and of its activation (mass), that is relevant; by chance, the "
        "share of all tokens that is relevant. Permuted: both with the simulation permuted within each excerpt, the "
        "chance level of an explanation of the right topic that marks the wrong tokens. Means over neurons, then over "
        "layers; intervals by two-level bootstrap, over neurons and over the excerpts of each neuron.",
        f"Excerpts of {protocol}{separate}. Nothing predicted: neurons without a relevant token. Silent: neurons that "
        "do not fire in these excerpts. Shuffled: explanations of other neurons of the layer.",
    )


def _cells(mean: Mean) -> tuple[Cell, ...]:
    consistency, distinctiveness = mean.permuted.tolist()
    return (
        mean.of("consistency"), mean.interval("consistency"), mean.of("firing"), consistency, mean.of("strength"),
        mean.of("distinctiveness"), mean.interval("distinctiveness"), mean.of("distinctiveness_mass"),
        mean.interval("distinctiveness_mass"), mean.of("relevant"), distinctiveness, mean.neurons,
        mean.unpredicted, mean.silent,
    )  # fmt: skip
