"""The cached overview: computed once for the site, the server and its next start, in the background."""

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report.tables.test_tables import scored_runs

from cratelm.report.browser import overview_cache as kept_overview
from cratelm.report.browser.catalogue import catalogue
from cratelm.report.browser.chunks import read_script
from cratelm.report.browser.overview_cache import CachedOverview
from cratelm.report.browser.site import write_site
from cratelm.report.server import chunk_cache as served
from cratelm.report.server.chunk_cache import Chunks

pytestmark = pytest.mark.usefixtures("quick_report")


class Made:
    """Counts how often an overview is made; each waits for `gate`."""

    def __init__(self, make: Callable[..., dict[str, Any]]) -> None:
        self.make, self.times, self.gate = make, 0, threading.Event()
        self.gate.set()

    def __call__(self, *arguments: Any) -> dict[str, Any]:
        """What is made."""
        self.times += 1
        assert self.gate.wait(60)
        return self.make(*arguments)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.setattr(kept_overview, "LOOK_SECONDS", 0)
    monkeypatch.setattr(kept_overview, "PAUSE", 0)
    found = Made(kept_overview.overview)
    monkeypatch.setattr(kept_overview, "overview", found)
    return found


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    [run] = scored_runs(tmp_path, rng, "crate-2l", neurons=16)
    return run


def shown(chunks: Chunks) -> dict[str, Any]:
    content = chunks.chunk("overview")
    assert content is not None
    found: dict[str, Any] = json.loads(content)
    return found


def test_the_first_answer_does_not_wait_and_a_second_start_uses_the_cached_file(run: Path, made: Made) -> None:
    made.gate.clear()
    chunks = Chunks([run], capabilities={})
    chunks.begin()
    first = shown(chunks)
    assert first["tables"] == []
    assert "being made" in first["making"]
    assert not made.gate.is_set()
    made.gate.set()
    chunks.overview.wait()
    whole = shown(chunks)
    assert "making" not in whole
    assert whole["tables"]
    assert made.times == 1
    again = Chunks([run], capabilities={})
    again.begin()
    assert shown(again) == whole
    again.overview.wait()
    assert made.times == 1


def test_the_site_and_the_server_share_the_cached_overview(run: Path, made: Made) -> None:
    path = write_site([run], run.parent / "out").parent / "data" / "overview.js"
    first = path.read_bytes()
    write_site([run], run.parent / "out")
    assert path.read_bytes() == first
    assert read_script(path) == shown(Chunks([run], capabilities={}))
    assert made.times == 1


def test_after_a_change_the_old_overview_is_shown_until_the_new_one_is_complete(run: Path, made: Made) -> None:
    CachedOverview(models=catalogue([run], "fixed"), mode="fixed").value()
    chunks = Chunks([run], capabilities={})
    before = shown(chunks)
    for number, name in enumerate(("evaluation.json", "run.json", "interpretation.sqlite"), start=1):
        made.gate.clear()
        if name == "interpretation.sqlite":
            with contextlib.closing(sqlite3.connect(run / name)) as connection, connection:
                connection.execute("UPDATE stages SET origin = 'another'")
        else:
            (run / name).write_text((run / name).read_text() + " ")
        old = shown(chunks)
        assert "have changed" in old.pop("making")
        assert old == before
        made.gate.set()
        chunks.overview.wait()
        before = shown(chunks)
        assert "making" not in before
        assert made.times == 1 + number


def test_many_readers_share_one_computation(run: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made.gate.clear()
    chunks, calls, gate = Chunks([run], capabilities={}), list[str](), threading.Event()
    make = served.layer_chunk

    def slow(view: Any, name: str) -> Any:
        calls.append(f"{view.layer.folder}/{name}")
        assert gate.wait(60)
        return make(view, name)

    monkeypatch.setattr(served, "layer_chunk", slow)
    with ThreadPoolExecutor(8) as pool:
        assert all("making" in one for one in pool.map(lambda _: shown(chunks), range(8)))
        asked = [pool.submit(chunks.chunk, "m0/t0/l0/layer") for _ in range(7)]
        other = pool.submit(chunks.chunk, "m0/t0/l1/layer")
        until = time.monotonic() + 60
        while len(calls) < 2 and time.monotonic() < until:  # both are under way: no name waits for another
            time.sleep(0.01)
        gate.set()
        assert len({one.result() for one in asked}) == 1
        assert other.result() not in (None, asked[0].result())
    made.gate.set()
    chunks.overview.wait()
    assert made.times == 1
    assert sorted(calls) == ["m0/t0/l0/layer", "m0/t0/l1/layer"]


def test_the_cached_file_may_be_deleted_damaged_or_not_writable(run: Path, made: Made) -> None:
    kept = CachedOverview(models=catalogue([run], "fixed"), mode="fixed")
    first = kept.value()
    for times, harm in enumerate((b"", b"no json\n{}", b'{"stamp": "x"}\n{"cut', None), start=2):
        kept.path.unlink() if harm is None else kept.path.write_bytes(harm)
        assert kept.value() == first
        assert made.times == times
    kept.path.unlink()
    kept.path.parent.rmdir()
    kept.path.parent.write_text("a file where the folder would be")
    assert kept.value() == first


def test_the_cache_has_a_largest_number_of_files(run: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_overview, "MOST", 2)
    monkeypatch.setattr(kept_overview, "overview", lambda *_: {})
    for link in "abc":
        (run.parent / link).symlink_to(run)
        CachedOverview(models=catalogue([run.parent / link], "fixed"), mode="fixed").value()
    assert len(list((run / "overviews").iterdir())) == 2
    assert made.times == 0


def test_an_overview_that_fails_shows_its_error_and_is_not_tried_again(run: Path, made: Made) -> None:
    made.make = lambda *_: 1 / 0  # type: ignore[assignment]
    chunks = Chunks([run], capabilities={})
    assert "making" in shown(chunks)
    chunks.overview.wait()
    for _ in range(3):
        assert "could not be made" in shown(chunks)["problem"]
    assert made.times == 1
