"""The sets that a store has of a layer, for pages that show all of them."""

from cratelm.activations.records import Mode
from cratelm.interpretation.store.database import Store, identity
from cratelm.interpretation.store.schema import KEY_COLUMNS, SetKey, Stage


def sets_of(store: Store, stage: Stage, *, mode: Mode, tap: str, layer: int) -> list[SetKey]:
    """The whole sets that a stage made of one layer from the current records, controls included."""
    stamps, now = stamps_of(store, mode=mode, tap=tap, layer=layer), identity(store.run, mode)
    return [SetKey.of_row(key) for *key, name, records, _ in stamps if (name, records) == (stage, now)]


def stamps_of(store: Store, *, mode: Mode, tap: str | None = None, layer: int | None = None) -> list[list]:
    """Key, stage, records and origin of each whole set of a layer, or of all layers: they change if it is remade."""
    query = (
        f"SELECT {KEY_COLUMNS}, stage, records, origin FROM sets JOIN stages ON set_id = id WHERE mode = ? "
        "AND tap = ifnull(?, tap) AND layer = ifnull(?, layer) ORDER BY id, stage"
    )
    with store.transaction() as connection:
        return [list(row) for row in connection.execute(query, [mode, tap, layer])]


def explainers_of(store: Store, *, mode: Mode) -> set[str]:
    """The explainers of all sets, unfinished ones included; empty without a store."""
    if not store.path.exists():
        return set()
    with store.transaction() as connection:
        return {name for (name,) in connection.execute("SELECT DISTINCT explainer FROM sets WHERE mode = ?", [mode])}
