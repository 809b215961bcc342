"""Batches that were submitted to a provider and not collected yet, as notes in the store.

The note is written before the batch is created, and removed in the transaction that adds its answers. So no crash loses
a batch, submits one twice, or counts an answer twice.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from cratelm.errors import CrateError
from cratelm.interpretation.store.answer_cache import CallRow
from cratelm.interpretation.store.database import Store

NOTE = "batch "
"""Beginning of the names of the notes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRecord:
    """One batch."""

    file: str
    """The provider's identifier of the uploaded requests."""
    id: str = ""
    """The provider's identifier of the batch; empty if the process ended before it was known."""
    url: str
    """The server that it was submitted to."""
    model: str
    path: str
    """Where the requests are answered, such as `/v1/chat/completions`."""
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    bound: tuple[int, int] = (0, 0)
    """Most tokens that the requests read and generate."""
    requests: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Key of each answer in the cache -> bytes of its prompt."""


def open_batches(store: Store) -> list[BatchRecord]:
    """The batches that are not collected, oldest first. Raises `CrateError` for a damaged note."""
    if not store.path.exists():
        return []
    with store.transaction() as connection:
        rows = connection.execute("SELECT value FROM meta WHERE key LIKE ?", [f"{NOTE}%"]).fetchall()
    try:
        records = [
            BatchRecord(**{**value, "bound": tuple(value["bound"])}) for value in (json.loads(v) for (v,) in rows)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise CrateError(f"a batch noted in {store.path} cannot be read ({error}). Hint: --forget-batches") from None
    return sorted(records, key=lambda record: record.date)


def write_batch(store: Store, record: BatchRecord) -> None:
    """Record a batch, or its new state."""
    store.note(NOTE + record.file, json.dumps(asdict(record)))


def close_batch(store: Store, record: BatchRecord, rows: Sequence[CallRow]) -> None:
    """Add the answers of a batch to the cache, and remove its note."""
    with store.transaction() as connection:
        connection.executemany("INSERT OR IGNORE INTO calls VALUES (?, ?, ?, ?, ?, ?)", rows)
        connection.execute("DELETE FROM meta WHERE key = ?", [NOTE + record.file])


def forget_batches(store: Store) -> int:
    """Remove the notes of all batches. Returns their number."""
    if not store.path.exists():
        return 0
    with store.transaction() as connection:
        return connection.execute("DELETE FROM meta WHERE key LIKE ?", [f"{NOTE}%"]).rowcount
