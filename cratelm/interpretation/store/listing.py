"""Which sets a store holds of one layer, for whoever shows them all."""

from cratelm.activations.records import Mode
from cratelm.interpretation.store.database import Store, identity
from cratelm.interpretation.store.schema import KEY_COLUMNS, SetKey, Stage

_FIELDS = tuple(SetKey.__slots__)


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


def stamps_of(store: Store, *, mode: Mode, tap: str, layer: int) -> list[list]:
    """Of every set of one layer what tells whether it was made anew: its key, its stages and their origins."""
    query = (
        f"SELECT {KEY_COLUMNS}, stage, records, origin FROM sets JOIN stages ON set_id = id "
        "WHERE (mode, tap, layer) = (?, ?, ?) ORDER BY id, stage"
    )
    with store.transaction() as connection:
        return [list(row) for row in connection.execute(query, [mode, tap, layer])]


def stamps_of_all(store: Store, mode: Mode) -> list[list]:
    """The same of all layers and taps."""
    query = (
        f"SELECT {KEY_COLUMNS}, stage, records, origin FROM sets JOIN stages ON set_id = id "
        "WHERE mode = ? ORDER BY id, stage"
    )
    with store.transaction() as connection:
        return [list(row) for row in connection.execute(query, [mode])]
