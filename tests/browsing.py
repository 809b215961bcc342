"""A real Chromium for the tests of the browser, and a small server for the same folder over http."""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from test_tables import scored_runs

from cratelm.activations.records import layer_file
from cratelm.report.site import write_site

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page

NEURONS = 260
"""In each layer of the larger of the runs."""
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> tuple[Any, str]:
    """The driver and the browser of this machine; the test is skipped where one is missing."""
    api: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra browser-test)")
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    return api, path


@contextlib.contextmanager
def chromium() -> "Iterator[Browser]":
    """A running browser. While it runs, an event loop runs in this thread, and `asyncio.run` refuses."""
    api, path = find_chromium()
    with api.sync_playwright() as playwright:
        # Without --no-sandbox Chromium refuses to run as root, as it does in containers.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder and writes nothing down."""

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback for the duration of the block; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def make_runs(folder: Path) -> list[Path]:
    """A CRATE with many neurons and another tap, a GPT-2, and a control."""
    rng = np.random.default_rng(7)
    made = scored_runs(folder, rng, "crate-2l", layers=2, neurons=NEURONS)
    made += scored_runs(folder, rng, "gpt2-2l", "crate-2l-random", neurons=12)
    other = layer_file(made[0], "fixed", "sae-demo", 0)
    other.parent.mkdir()
    shutil.copyfile(layer_file(made[0], "fixed", "neurons", 0), other)
    return made


def make_site(runs: list[Path], out: Path) -> Path:
    """The folder of a site of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        # The intervals of the overview are tested elsewhere, and take most of the time.
        patch.setattr("cratelm.report.results.RESAMPLES", 20)
        return write_site(runs, out).parent


def saved(page: "Page", act: Callable[[], Any]) -> tuple[str, str]:
    """Name and content of the file that an action saves."""
    with page.expect_download() as waiting:
        act()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_text(encoding="utf-8")


class Visit:
    """One tab on a site, and everything that went wrong in it."""

    def __init__(self, browser: "Browser", home: str, **context: Any) -> None:
        self._context = browser.new_context(accept_downloads=True, **context)
        self.page: Page = self._context.new_page()
        self.page.set_default_timeout(10_000)
        self.home = home
        self.errors: list[str] = []
        self.dialogs: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("dialog", self._refuse)
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _refuse(self, dialog: "Dialog") -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def open(self, address: str = "#/") -> "Page":
        """Load the site anew at an address, and wait until its page is there."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.home}/index.html{address}")
        self.page.wait_for_selector("main[data-shown]:not([aria-busy])")
        return self.page

    def go(self, address: str) -> "Page":
        """Follow a link inside the site."""
        before = self.page.get_attribute("main", "data-shown")
        self.page.evaluate("address => { location.hash = address; }", address)
        self.page.wait_for_function("before => document.querySelector('main').dataset.shown !== before", arg=before)
        return self.page

    def close(self) -> None:
        self._context.close()
