"""What every test may use: real text where it is at hand, fresh random numbers, and the rule about skips."""

import io
import os
import secrets
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

# One thread per process, before torch is first imported: the test runner has a process per core, and the commands
# that tests start as separate processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import numpy as np
import pytest

if TYPE_CHECKING:
    from fixtures.browsing import Visit
    from playwright.sync_api import Browser

REPOSITORY = Path(__file__).parent.parent
EVERYTHING_IS_INSTALLED = os.environ.get("CRATELM_TEST_ALL") == "1"
"""Set by `make test-all`: a skip for a missing package or browser is a failure."""
ALLOWED_SKIPS = ("no real data", "only on")
"""How the reason of a skip begins that is right even where everything is installed."""

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

hypothesis.settings.register_profile("cratelm", deadline=None, max_examples=50)
hypothesis.settings.load_profile("cratelm")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text and tokenizers: `$CRATELM_TEST_DATA`, or `../shared/data` next to the repository."""
    folder = Path(os.environ.get("CRATELM_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not a folder. Name one with CRATELM_TEST_DATA")
    return folder


@pytest.fixture(autouse=True)
def nothing_turns_gradients_off() -> Generator[None]:
    """What a command turned off for its process would be off in a program that calls it, and in the tests after it."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        assert torch.is_grad_enabled(), "gradients were turned off for the whole process"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random numbers; a failing test says with which `CRATELM_TEST_SEED` they come again."""
    seed = int(os.environ.get("CRATELM_TEST_SEED") or secrets.randbits(32))
    request.node.add_report_section("setup", "seed", f"CRATELM_TEST_SEED={seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty drawings and intervals of few resamples, which otherwise take most of the time of a report.

    For tests that check neither.
    """
    from cratelm.report.figures import form

    def save(_figure: object, out: "Path | io.BytesIO", _suffix: str, **_options: object) -> None:
        drawing = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>'
        _ = out.write_bytes(drawing) if isinstance(out, Path) else out.write(drawing)

    monkeypatch.setattr(form, "_save", save)
    monkeypatch.setattr("cratelm.report.results.gather.RESAMPLES", 20)


@pytest.fixture(scope="module")
def browser() -> "Generator[Browser, None, None]":
    """A real Chromium; without one the tests are skipped. It ends with its file, so that others can use asyncio."""
    from fixtures.browsing import chromium

    with chromium() as found:
        yield found


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The runs behind the site."""
    from fixtures.browsing import find_chromium, make_runs

    find_chromium()  # without a browser nothing needs to be made
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def site(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a site, for tests that only read it."""
    from fixtures.browsing import make_site

    return make_site(runs, tmp_path_factory.mktemp("site") / "out")


@pytest.fixture
def visit(browser: "Browser", site: Path) -> "Generator[Visit, None, None]":
    """A tab on the site from disk, in which nothing may go wrong and nothing else may be asked for."""
    from fixtures.browsing import Visit

    tab = Visit(browser, f"file://{site}")
    yield tab
    tab.close()
    assert tab.errors == []
    assert all(url.startswith((f"file://{site}/", "about:", "blob:")) for url in tab.asked)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _refuse_skip((yield))


def _refuse_skip(report: Report) -> Report:
    if EVERYTHING_IS_INSTALLED and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(ALLOWED_SKIPS):
            report.outcome, report.longrepr = "failed", f"skipped where everything is installed: {reason}"
    return report
