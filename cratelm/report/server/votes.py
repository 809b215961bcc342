"""Votes on which explanation fits better, saved in SQLite by a live browser."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratelm import rundir
from cratelm.errors import CrateError
from cratelm.json_fields import mismatch

CHOICES = ("a", "b", "same")
MOST_BYTES = 16 << 20
"""Largest size of the file, about 40,000 votes."""
PAGE = 500
"""Votes per answer."""
LONGEST = 4000
"""Largest number of characters of a vote as JSON."""
FIELDS = {"date": str, "a": str, "b": str, "explanations": [str], "explainers": [str], "choice": str}


@dataclass(frozen=True, slots=True)
class Votes:
    """The votes in one file. Every call opens a connection."""

    path: Path

    def open(self) -> None:
        """Create the file if it is missing. Raises `CrateError` if it is not writable."""
        with self._connection() as connection:
            connection.execute("UPDATE meta SET value = value")

    def add(self, value: Mapping[str, Any]) -> int:
        """Add a vote in the format of the page and return the number of votes. Raises `CrateError` otherwise."""
        vote = {name: value.get(name) for name in FIELDS}
        if mismatch(vote, FIELDS) or vote["choice"] not in CHOICES:
            raise CrateError(f"a vote must have {', '.join(FIELDS)}, with a choice of {', '.join(CHOICES)}")
        text = json.dumps(vote)
        if len(text) > LONGEST:
            raise CrateError(f"a vote must have at most {LONGEST} characters, got {len(text)}")
        with self._connection() as connection:
            [size] = connection.execute(
                "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
            ).fetchone()
            if size >= MOST_BYTES:
                raise CrateError(f"{self.path.name} is full ({size >> 20} MiB). Move it away to start a new file")
            connection.execute("INSERT INTO votes (vote) VALUES (?)", [text])
            [count] = connection.execute("SELECT count(*) FROM votes").fetchone()
            return int(count)

    def page(self, after: int = 0) -> tuple[list[dict[str, Any]], int | None]:
        """At most `PAGE` votes after number `after`, oldest first, and the last number if more follow."""
        if not self.path.exists():
            return [], None
        with self._connection() as connection:
            query = "SELECT id, vote FROM votes WHERE id > ? ORDER BY id LIMIT ?"
            rows = connection.execute(query, [after, PAGE + 1]).fetchall()
            votes = [rundir.parse_json(text) for _, text in rows[:PAGE]]
            if not all(isinstance(vote, dict) for vote in votes):
                raise TypeError("a vote must be a JSON object")
        return votes, rows[PAGE - 1][0] if len(rows) > PAGE else None

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            for file in (self.path, self.path.with_name(f"{self.path.name}-journal")):
                rundir.check_writable(file).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
                connection.execute("CREATE TABLE IF NOT EXISTS votes (id INTEGER PRIMARY KEY, vote TEXT NOT NULL)")
                connection.execute(
                    "INSERT OR IGNORE INTO meta VALUES ('format_version', ?)", [str(rundir.FORMAT_VERSION)]
                )
                [version] = connection.execute("SELECT value FROM meta WHERE key = 'format_version'").fetchone()
                rundir.check_format_version(self.path, version)
                yield connection
        except (sqlite3.DatabaseError, OSError, ValueError, TypeError) as error:  # also a vote that is not JSON
            raise CrateError(f"{self.path} is not a votes file ({error}). Move it away, or give --votes FILE") from None
