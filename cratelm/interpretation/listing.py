"""Which sets and measures a store holds of one layer, for whoever shows them all."""

from dataclasses import dataclass

from cratelm.activations.records import Mode
from cratelm.interpretation.schema import KEY_COLUMNS, SetKey, Stage
from cratelm.interpretation.store import Store, identity

_FIELDS = tuple(SetKey.__slots__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One number beside the score of a neuron, such as `detection`."""

    key: SetKey
    neuron: int
    name: str
    value: float | None
    """In the measure's own units; None where it is undefined."""
    reason: str
    """Why it is undefined."""


def sets_of(store: Store, stage: Stage, *, mode: Mode, tap: str, layer: int) -> list[SetKey]:
    """The whole sets that a stage made of one layer from the records that are there now, controls included."""
    query = (
        f"SELECT {KEY_COLUMNS}, records FROM sets JOIN stages ON set_id = id "
        "WHERE (stage, mode, tap, layer) = (?, ?, ?, ?) ORDER BY id"
    )
    with store.transaction() as connection:
        rows = connection.execute(query, [stage, mode, tap, layer]).fetchall()
    now = identity(store.run, mode)
    return [SetKey(**dict(zip(_FIELDS, own, strict=True))) for *own, records in rows if records == now]


def measures_of(store: Store, *, mode: Mode, tap: str, layer: int) -> list[Measure]:
    """All measures of one layer's neurons, controls left out."""
    query = (
        f"SELECT {KEY_COLUMNS}, neuron, measure, value, reason FROM measures JOIN sets ON set_id = id "
        "WHERE (mode, tap, layer, control) = (?, ?, ?, '') ORDER BY id, measure, neuron"
    )
    with store.transaction() as connection:
        rows = connection.execute(query, [mode, tap, layer]).fetchall()
    return [
        Measure(
            key=SetKey(**dict(zip(_FIELDS, own, strict=True))), neuron=neuron, name=name, value=value, reason=reason
        )
        for *own, neuron, name, value, reason in rows
    ]


def stamps_of(store: Store, *, mode: Mode, tap: str, layer: int) -> list[list]:
    """Of every set of one layer what tells whether it was made anew: its key, its stages and their origins."""
    query = (
        f"SELECT {KEY_COLUMNS}, stage, records, origin FROM sets JOIN stages ON set_id = id "
        "WHERE (mode, tap, layer) = (?, ?, ?) ORDER BY id, stage"
    )
    with store.transaction() as connection:
        return [list(row) for row in connection.execute(query, [mode, tap, layer])]
