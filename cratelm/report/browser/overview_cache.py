"""A cache of the overview in the first run's folder, valid while nothing changes that the overview shows.

    RUN/overviews/KEY.json     a file for each choice of runs and records; any of them can be deleted

Computing an overview takes seconds, mostly for intervals. `report --site` and `serve` share the cached file.
"""

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cratelm.activations.records import Mode, records_folder
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store, identity
from cratelm.interpretation.store.listing import stamps_of
from cratelm.report.browser.catalogue import Model
from cratelm.report.browser.chunks import encoded
from cratelm.report.browser.overview import overview, public
from cratelm.rundir import atomic_path, check_regular, parse_json
from cratelm.runtime import console

FOLDER = "overviews"
MOST = 8
"""Files in the folder; the oldest is removed first."""
LOOK_SECONDS = 2.0
"""Time between two checks whether the sources of a value have changed."""
PAUSE = 4.0
"""Wait before an overview is computed again, in multiples of the time it took: scores that are being written change all
the time."""
READ = (
    "run.json", "metrics.jsonl", "evaluation.json", "evaluation_documents.safetensors", "whitebox.json", "directions/*",
    "saes/*/evaluation.json", "saes/*/sae.json", "model/tokenizer.json",
)  # fmt: skip
"""Files of a run that an overview reads, in addition to records and scores."""


class Stamp:
    """A hash of the sources of a value, computed again after `LOOK_SECONDS`."""

    def __init__(self, make: Callable[[], str]) -> None:
        self._make, self._value, self._checked = make, "", float("-inf")

    def __call__(self) -> str:
        """The hash."""
        if time.monotonic() - self._checked > LOOK_SECONDS:
            with contextlib.suppress(sqlite3.OperationalError):  # the store is being written: use the last hash
                self._value = self._make()
            self._checked = time.monotonic()
        return self._value


@dataclass(frozen=True, kw_only=True)
class CachedOverview:
    """The overview of some runs, and its file."""

    models: Sequence[Model]
    mode: Mode

    @property
    def path(self) -> Path:
        """The file, named after the paths of the runs as typed, since the overview has commands with these paths."""
        key = json.dumps([self.mode, *(str(model.run) for model in self.models)])
        return self.models[0].run / FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    def stamp(self) -> str:
        """A hash of everything that the overview depends on."""
        sources = [_code(), *(_sources(model, self.mode) for model in self.models)]
        return hashlib.sha256(json.dumps(sources).encode()).hexdigest()

    def read(self) -> tuple[str, bytes] | None:
        """Stamp and content of the file; None if it is missing or damaged."""
        try:
            stamp, content = check_regular(self.path).read_bytes().split(b"\n", 1)
            return parse_json(stamp)["stamp"], content if isinstance(parse_json(content), dict) else b""
        except (CrateError, OSError, ValueError, KeyError, TypeError):
            return None

    def make(self, stamp: str) -> bytes:
        """Compute the overview and write the file; if the folder is not writable, the overview is not cached."""
        content = encoded(overview(self.models, self.mode))
        try:
            with atomic_path(self.path) as temporary:
                temporary.write_bytes(json.dumps({"stamp": stamp}).encode() + b"\n" + content)
            files = sorted(self.path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
            for file in files[:-MOST]:
                file.unlink(missing_ok=True)
        except (OSError, CrateError) as error:
            console.print(f"the overview is not cached: {self.path} is not writable ({error})", markup=False)
        return content

    def value(self) -> dict[str, Any]:
        """The current overview, from the file if nothing has changed."""
        stamp, saved = self.stamp(), self.read()
        value: dict[str, Any] = json.loads(saved[1] if saved and saved[0] == stamp else self.make(stamp))
        return value


class LiveOverview:
    """The overview for a server: it answers at once and computes a new overview in the background."""

    def __init__(self, cached: CachedOverview) -> None:
        self._cached, self._stamp, self._lock = cached, Stamp(cached.stamp), threading.Lock()
        self._saved: tuple[str, bytes] | None = cached.read()
        self._thread: threading.Thread | None = None
        self._not_before = float("-inf")
        self._failed, self._problem = "", ""

    def chunk(self) -> bytes:
        """The last overview, or an empty one. While a new one is computed, it has an entry `making`."""
        with self._lock:
            current = self._stamp()
            stamp, content = self._saved or ("", _EMPTY)
            if stamp == current:
                return content
            if self._failed == current:
                return _with(content, "problem", self._problem)
            if self._thread is None and time.monotonic() >= self._not_before:
                self._thread = threading.Thread(target=self._make, args=[current], name="overview", daemon=True)
                self._thread.start()
        return _with(content, "making", "The report is being made." if content is _EMPTY else
                     "Scores or records have changed since this report was made; it is being updated.")  # fmt: skip

    def wait(self) -> None:
        """Wait until no overview is being computed."""
        if (thread := self._thread) is not None:
            thread.join()

    def _make(self, stamp: str) -> None:
        started = time.monotonic()
        try:
            self._saved = (stamp, self._cached.make(stamp))
        except Exception as error:  # the server continues with the last overview and shows the reason
            self._failed, self._problem = stamp, f"The report could not be made ({public(str(error))})."
            console.print(self._problem, markup=False)
        with self._lock:
            self._not_before = time.monotonic() + PAUSE * (time.monotonic() - started)
            self._thread = None


_EMPTY = encoded({"sentences": [], "tables": [], "figures": [], "missing": []})


def _with(content: bytes, name: str, text: str) -> bytes:
    """The content, a JSON object that is not empty, with one more entry."""
    return content[:-1] + f",{json.dumps(name)}:{json.dumps(text)}}}".encode()


def _sources(model: Model, mode: Mode) -> list[Any]:
    """Names, sizes and times of the files that an overview of a run depends on, and the stamps of its scores."""
    store = Store(model.run)
    read = {file for name in READ for file in model.run.glob(name)}
    files = sorted(read | {file for file in records_folder(model.run, mode).rglob("*") if file.is_file()})
    return [
        str(model.run), model.slug, model.title, (model.run / "model").exists(), identity(model.run, mode),
        [(file.relative_to(model.run).as_posix(), *_state(file)) for file in files],
        stamps_of(store, mode=mode) if store.path.exists() else [],
    ]  # fmt: skip


def _state(file: Path) -> tuple[int, int]:
    try:
        state = file.stat()
    except FileNotFoundError:  # removed after it was listed
        return (0, 0)
    return (state.st_size, state.st_mtime_ns)


@cache
def _code() -> list[Any]:
    """The state of the code that makes an overview, so that a change of the code makes a new one."""
    package = Path(__file__).parents[2]
    files = [file for name in ("report", "interpretation") for file in sorted((package / name).rglob("*.py"))]
    files.append(package / "report" / "prose.json")
    return [(file.relative_to(package).as_posix(), *_state(file)) for file in files]
