"""Votes on which explanation fits better, kept in SQLite by a live browser."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratelm import rundir
from cratelm.errors import CrateError

CHOICES = ("a", "b", "same")
MOST_BYTES = 16 << 20
"""Size of the file, about 40,000 votes; a full one is moved away."""
PAGE = 500
"""Votes in one answer."""
LONGEST = 4000
"""Characters of a vote as JSON."""
FIELDS = {"date": str, "a": str, "b": str, "explanations": list, "explainers": list, "choice": str}


@dataclass(frozen=True, slots=True)
class Votes:
    """The votes in one file. A connection lives as long as one call."""

    path: Path

    def open(self) -> None:
        """Make the file where there is none; `CrateError` where it cannot be written."""
        with self._connection() as connection:
            connection.execute("UPDATE meta SET value = value")

    def add(self, value: Mapping[str, Any]) -> int:
        """Keep one vote as the page sends it, and return how many there are; `CrateError` where it is none."""
        vote = {name: value.get(name) for name in FIELDS}
        wrong = [name for name, kind in FIELDS.items() if not isinstance(vote[name], kind)]
        lists = [one for name in ("explanations", "explainers") for one in vote[name] or ()] if not wrong else []
        if wrong or vote["choice"] not in CHOICES or not all(isinstance(one, str) for one in lists):
            raise CrateError(f"this is no vote: it needs {', '.join(FIELDS)}, with a choice of {', '.join(CHOICES)}")
        text = json.dumps(vote)
        if len(text) > LONGEST:
            raise CrateError(f"the vote has {len(text)} characters, at most {LONGEST} are kept")
        with self._connection() as connection:
            [size] = connection.execute(
                "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
            ).fetchone()
            if size >= MOST_BYTES:
                raise CrateError(
                    f"{self.path.name} holds {size >> 20} MiB of votes, all it may. Move it away to begin anew"
                )
            connection.execute("INSERT INTO votes (vote) VALUES (?)", [text])
            [count] = connection.execute("SELECT count(*) FROM votes").fetchone()
            return int(count)

    def page(self, after: int = 0) -> tuple[list[dict[str, Any]], int | None]:
        """At most `PAGE` votes behind the one of this number, oldest first; the last one's number if more follow."""
        if not self.path.exists():
            return [], None
        with self._connection() as connection:
            query = "SELECT id, vote FROM votes WHERE id > ? ORDER BY id LIMIT ?"
            rows = connection.execute(query, [after, PAGE + 1]).fetchall()
        return [json.loads(text) for _, text in rows[:PAGE]], rows[PAGE - 1][0] if len(rows) > PAGE else None

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
                connection.execute("CREATE TABLE IF NOT EXISTS votes (id INTEGER PRIMARY KEY, vote TEXT NOT NULL)")
                connection.execute(
                    "INSERT OR IGNORE INTO meta VALUES ('format_version', ?)", [str(rundir.FORMAT_VERSION)]
                )
                [found] = connection.execute("SELECT value FROM meta WHERE key = 'format_version'").fetchone()
                rundir.check_format_version(self.path, found)
                yield connection
        except (sqlite3.DatabaseError, OSError) as error:
            raise CrateError(f"{self.path} cannot hold votes ({error}). Move it away, or give --votes FILE") from None
