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
MOST = 100_000
"""Votes that are kept; a full file is exported and moved away."""
LONGEST = 4000
"""Characters of a vote as JSON."""
FIELDS = {"date": str, "a": str, "b": str, "explanations": list, "explainers": list, "choice": str}


@dataclass(frozen=True, slots=True)
class Votes:
    """The votes in one file. A connection lives as long as one call."""

    path: Path

    def add(self, value: Mapping[str, Any]) -> None:
        """Keep one vote as the page sends it; `CrateError` where it is none."""
        vote = {name: value.get(name) for name in FIELDS}
        wrong = [name for name, kind in FIELDS.items() if not isinstance(vote[name], kind)]
        lists = [one for name in ("explanations", "explainers") for one in vote[name] or ()] if not wrong else []
        if wrong or vote["choice"] not in CHOICES or not all(isinstance(one, str) for one in lists):
            raise CrateError(f"this is no vote: it needs {', '.join(FIELDS)}, with a choice of {', '.join(CHOICES)}")
        text = json.dumps(vote)
        if len(text) > LONGEST:
            raise CrateError(f"the vote has {len(text)} characters, at most {LONGEST} are kept")
        with self._connection() as connection:
            if connection.execute("SELECT count(*) FROM votes").fetchone()[0] >= MOST:
                raise CrateError(f"{self.path} holds {MOST} votes. Move it away to begin anew")
            connection.execute("INSERT INTO votes (vote) VALUES (?)", [text])

    def all(self) -> list[dict[str, Any]]:
        """Every vote, oldest first."""
        if not self.path.exists():
            return []
        with self._connection() as connection:
            return [json.loads(text) for (text,) in connection.execute("SELECT vote FROM votes ORDER BY id")]

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as connection, connection:
                connection.execute("CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
                connection.execute("CREATE TABLE IF NOT EXISTS votes (id INTEGER PRIMARY KEY, vote TEXT NOT NULL)")
                connection.execute(
                    "INSERT OR IGNORE INTO meta VALUES ('format_version', ?)", [str(rundir.FORMAT_VERSION)]
                )
                [found] = connection.execute("SELECT value FROM meta WHERE key = 'format_version'").fetchone()
                rundir.check_format_version(self.path, found)
                yield connection
        except sqlite3.DatabaseError as error:
            raise CrateError(f"{self.path} cannot hold votes ({error}). Move it away, or give --votes FILE") from None
