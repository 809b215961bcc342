"""Devices, numbers for people, and the progress bar."""

import contextlib
import io
import re
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from cratelm import runtime
from cratelm.errors import CrateError
from cratelm.runtime import DeviceName, duration, human, progress_bar, progress_bars, select_device


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(False, False, "cpu"), (False, True, "mps"), (True, False, "cuda"), (True, True, "cuda")],
)
def test_auto_takes_the_fastest_device_there_is(
    cuda: bool, mps: bool, chosen: DeviceName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert select_device("auto").type == chosen
    assert select_device("cpu").type == "cpu"


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(name: DeviceName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(CrateError, match=rf"device {name} is not available \(found: cpu\)"):
        select_device(name)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (0.1234, "0.123"), (7, "7"), (999, "999"), (999.7, "1k"), (1000, "1k"), (1234, "1.23k"),
        (999_499, "999k"), (999_999, "1M"), (1_234_567, "1.23M"), (157_286_400_000, "157G"), (3.2e12, "3.2T"),
        (9.999e14, "1P"), (4.56e15, "4.56P"), (1.23e18, "1.23E"),
        (-1500, "-1.5k"),
    ],
)  # fmt: skip
def test_a_number_is_shown_with_three_digits(number: float, text: str) -> None:
    assert human(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.5, "0.5 seconds"), (45.0, "45 seconds"), (600.0, "10 minutes"), (12_240.0, "3.4 hours"),
        (1_728_000.0, "20 days"), (4890 * 86400.0, "13 years"), (5e12, "158,440 years"),
    ],
)  # fmt: skip
def test_a_duration_is_said_in_words_with_two_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@contextlib.contextmanager
def screen(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, width: int = 100) -> Iterator[io.StringIO]:
    """What the bars write."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, force_interactive=terminal, highlight=False)
    monkeypatch.setattr(runtime, "console", console)
    yield text


def test_a_bar_shows_what_rate_time_left_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    with screen(monkeypatch, terminal=True) as text, progress_bar("train crate", total=1000, unit="tok") as bar:
        bar._progress.get_time = lambda: next(clock) / 10
        for step in range(5):
            bar.advance(100, f"loss {step}.5")
        bar._progress.refresh()
    shown = text.getvalue()
    assert "train crate" in shown
    assert "50%" in shown
    assert "tok/s" in shown
    assert "loss 4.5" in shown


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_long_name_and_note_leave_room_for_share_rate_and_time_left(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))
    with (
        screen(monkeypatch, terminal=True, width=width) as text,
        progress_bar("interpret a-very-long-name" * 3, total=100) as bar,
    ):
        bar._progress.get_time = lambda: next(clock) / 10
        for _ in range(5):
            bar.advance(10, "layer 11, top-and-random, 3072 neurons, loss 3.5, held-out loss 3.6" * 3)
        bar._progress.refresh()
    frames = re.split(r"[\r\n]|\x1b\[2K", text.getvalue())
    line = [plain for frame in frames if (plain := re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", frame)).strip()][-1]
    assert "interpret a-very" in line
    assert "━" in line
    assert " 50%" in line
    assert "tok/s" in line
    assert re.search(r"\d+:\d\d", line)
    assert "…" in line
    assert len(line.rstrip()) <= width


def test_work_done_before_counts_for_the_share_and_not_for_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    with screen(monkeypatch, terminal=True), progress_bar("collect", total=10_000) as bar:
        bar._progress.get_time = lambda: seconds[0]
        bar.advance(9000)
        for _ in range(5):
            seconds[0] += 1.0
            bar.advance(10)
        task = bar._progress.tasks[0]
        assert task.completed == 9050
        assert task.speed == pytest.approx(10)


def test_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr(runtime.time, "monotonic", lambda: seconds[0])
    with screen(monkeypatch, terminal=False) as text, progress_bar("collect", total=200, done=20) as bar:
        for _ in range(8):
            seconds[0] += 10
            bar.advance(20, "note")
    assert text.getvalue().splitlines() == [f"collect: {share} % note" for share in (30, 50, 70, 90)]


def test_several_bars_keep_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    with screen(monkeypatch, terminal=True), progress_bars("sets") as add:
        one, two = add("one", 10), add("two", 20)
        one.advance(10)
        two.advance(5)
        assert [task.percentage for task in one._progress.tasks] == [100, 25]


def test_a_bar_writes_nothing_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("tokenize", total=3) as bar:
        bar.advance(3)
    assert capsys.readouterr().out == ""
