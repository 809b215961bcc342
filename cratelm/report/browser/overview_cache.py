"""The overview as it was last made, kept in the first run's folder and good while nothing that it shows changes.

    RUN/overviews/KEY.json     one file for each choice of runs and records; any of them can be deleted

To make one takes seconds, most of them for intervals. `report --site` and `serve` share what one of them has made.
"""

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cratelm.activations.records import Mode, records_folder
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store, identity
from cratelm.interpretation.store.listing import stamps_of_all
from cratelm.report.browser.catalogue import Model
from cratelm.report.browser.chunks import as_json
from cratelm.report.browser.overview import overview, public
from cratelm.rundir import atomic_path
from cratelm.runtime import console

FOLDER = "overviews"
MOST = 8
"""Files that are kept beside each other; the oldest goes first."""
LOOK_SECONDS = 2.0
"""How long what an overview was made from is taken to be as it was."""
PAUSE = 4.0
"""Before it is made anew, so many times as long as it took is waited: while scores are being written, it would else be
made without end."""
READ = (
    "run.json", "metrics.jsonl", "evaluation.json", "evaluation_documents.safetensors", "whitebox.json", "directions/*",
    "saes/*/evaluation.json", "saes/*/sae.json", "model/tokenizer.json",
)  # fmt: skip
"""What an overview reads of a run, besides its records and scores."""


@dataclass(frozen=True, kw_only=True)
class KeptOverview:
    """The overview of some runs, and the file that keeps it."""

    models: Sequence[Model]
    mode: Mode

    @property
    def path(self) -> Path:
        """The file. It is named after the runs as they were typed, since the overview names commands for them."""
        told = json.dumps([self.mode, *(str(model.run) for model in self.models)])
        return self.models[0].run / FOLDER / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"

    def stamp(self) -> str:
        """A hash of all that the overview depends upon."""
        told = [_code(), *(_told(model, self.mode) for model in self.models)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def read(self) -> tuple[str, bytes] | None:
        """The stamp and the chunk of what was kept; None where there is nothing."""
        try:
            stamp, content = self.path.read_bytes().split(b"\n", 1)
            return json.loads(stamp)["stamp"], content if isinstance(json.loads(content), dict) else b""
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def make(self, stamp: str) -> bytes:
        """Make the overview and keep it; where the folder cannot be written, it is made again the next time."""
        # Half a surrogate pair, which UTF-8 cannot hold, becomes JSON's escape for it.
        content = as_json(overview(self.models, self.mode)).encode("utf-8", "backslashreplace")
        try:
            with atomic_path(self.path) as temporary:
                temporary.write_bytes(json.dumps({"stamp": stamp}).encode() + b"\n" + content)
            files = sorted(self.path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
            for old in files[:-MOST]:
                old.unlink(missing_ok=True)
        except (OSError, CrateError) as error:
            console.print(f"the overview is not kept: {self.path} cannot be written ({error})", markup=False)
        return content

    def value(self) -> dict[str, Any]:
        """The overview as it is now, from the file where nothing has changed."""
        stamp, kept = self.stamp(), self.read()
        content = kept[1] if kept is not None and kept[0] == stamp else self.make(stamp)
        found: dict[str, Any] = json.loads(content)
        return found


class LiveOverview:
    """The overview for a server: what there is at once, and made anew in the background when it is out of date."""

    def __init__(self, kept: KeptOverview) -> None:
        self._kept, self._lock = kept, threading.Lock()
        self._found: tuple[str, bytes] | None = kept.read()
        self._looked: tuple[float, str] = (-LOOK_SECONDS, "")
        self._thread: threading.Thread | None = None
        self._again = -float("inf")
        self._problem: tuple[str, str] = ("", "")

    def chunk(self) -> bytes:
        """The chunk. While another one is being made, it says so under `making`; one that was never made is empty."""
        with self._lock:
            now = self._now()
            found_stamp, found = self._found or ("", _EMPTY)
            if found_stamp == now:
                return found
            failed_at, problem = self._problem
            if self._thread is None and failed_at != now and time.monotonic() >= self._again:
                self._thread = threading.Thread(target=self._make, args=[now], name="overview", daemon=True)
                self._thread.start()
        if failed_at == now:
            return _with(found, "problem", problem)
        return _with(found, "making", "The report is being made." if self._found is None else
                     "Scores or records have changed since this report was made; it is being made anew.")  # fmt: skip

    def wait(self) -> None:
        """Until what is being made is made."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _now(self) -> str:
        looked, stamp = self._looked
        if time.monotonic() - looked > LOOK_SECONDS or not stamp:
            with contextlib.suppress(sqlite3.OperationalError):  # a store that is being written: as it was, then
                stamp = self._kept.stamp()
            self._looked = (time.monotonic(), stamp)
        return stamp

    def _make(self, stamp: str) -> None:
        started, problem = time.monotonic(), ""
        try:
            made = self._kept.make(stamp)
        except Exception as error:  # the server goes on with what there was, and says why
            problem = f"The report could not be made ({public(str(error))})."
            console.print(problem, markup=False)
        with self._lock:
            if problem:
                self._problem = (stamp, problem)
            else:
                self._found = (stamp, made)
            self._again = time.monotonic() + PAUSE * (time.monotonic() - started)
            self._thread = None


_EMPTY = as_json({"sentences": [], "tables": [], "figures": [], "missing": []}).encode()


def _with(content: bytes, name: str, words: str) -> bytes:
    """The chunk, a JSON object that is not empty, with one more entry."""
    return content[:-1] + f",{json.dumps(name)}:{json.dumps(words)}}}".encode()


def _told(model: Model, mode: Mode) -> list[Any]:
    """What tells whether a run, its records, its scores or what was measured of it have changed."""
    store = Store(model.run)
    read = {file for name in READ for file in model.run.glob(name)}
    files = sorted(read | {file for file in records_folder(model.run, mode).rglob("*") if file.is_file()})
    return [
        str(model.run), model.slug, model.title, (model.run / "model").exists(), identity(model.run, mode),
        [(file.relative_to(model.run).as_posix(), *_state(file)) for file in files],
        stamps_of_all(store, mode) if store.path.exists() else [],
    ]  # fmt: skip


def _state(file: Path) -> tuple[int, int]:
    try:
        state = file.stat()
    except FileNotFoundError:  # gone since it was listed
        return (0, 0)
    return (state.st_size, state.st_mtime_ns)


@cache
def _code() -> list[Any]:
    """What tells one version of what makes an overview from another, also in a checkout that is worked on."""
    package = Path(__file__).parents[2]
    files = [file for name in ("report", "interpretation") for file in sorted((package / name).rglob("*.py"))]
    files.append(package / "report" / "prose.json")
    return [(file.relative_to(package).as_posix(), *_state(file)) for file in files]
