"""Device selection, and the progress bar of long stages."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from cratelm.errors import CrateError

if TYPE_CHECKING:
    import torch

DeviceName = Literal["auto", "cpu", "cuda", "mps"]


def printable(text: str) -> str:
    """Text for a terminal: control characters, and characters that hide or reorder others, as their escapes."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\N{NO-BREAK SPACE}" else letter.encode("unicode_escape").decode()
        for letter in text
    )


class _SafeConsole(Console):
    """A console that prints text as it is: no markup, and no escape sequences."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; text that is a string is made `printable`."""
        super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)


console = _SafeConsole(stderr=True, highlight=False, markup=False, emoji=False)
"""Where progress and notes go; results go to standard output."""


def select_device(name: DeviceName) -> "torch.device":
    """`auto` takes CUDA, then MPS, then the CPU. A device that is not there is refused."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "mps" if available["mps"] else "cpu"
    if not available[name]:
        usable = ", ".join(device for device, is_usable in available.items() if is_usable)
        raise CrateError(f"device {name} is not available (found: {usable}). Run with --device auto")
    return torch.device(name)


class _Rate(ProgressColumn):
    """Units per second, from the work done in this process (a resumed part does not count)."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{human(speed)} {self.unit}/s", style="dim")


def human(number: float | int) -> str:
    """`1234567` -> `1.23M`: three significant digits."""
    number = float(f"{number:.3g}")  # rounded first: 999999 is 1M
    for threshold, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= threshold:
            return f"{number / threshold:.3g}{suffix}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """`45 seconds`, `12 minutes`, `3.4 hours`, `20 days`, `13 years`."""
    units = ((90, 1, "seconds"), (5400, 60, "minutes"), (48 * 3600, 3600, "hours"), (2 * 365 * 86400, 86400, "days"))
    unit, name = next(((unit, name) for limit, unit, name in units if seconds < limit), (365.25 * 86400, "years"))
    number = seconds / unit
    return f"{number:.2g} {name}" if number < 10 else f"{number:,.0f} {name}"


class _Fitted(ProgressColumn):
    """Text cut with an ellipsis, so that the bar, the share, the rate and the time left keep their room."""

    def __init__(self, text: Callable[[Task], str], room: Callable[[Task], int]) -> None:
        super().__init__()
        self._text, self._room = text, room

    def render(self, task: Task) -> Text:
        text = Text(self._text(task), no_wrap=True)
        text.truncate(max(self._room(task), 0), overflow="ellipsis")
        return text


def _description_room(_: Task) -> int:
    return max(console.width // 3, 8)


def _note_room(task: Task) -> int:
    """What is left of a line after the other columns: percentage 5, rate at most 15, time left 9, and the bar."""
    return console.width - min(len(task.description), _description_room(task)) - _bar_width() - 31


def _bar_width() -> int:
    return min(max(console.width - 72, 8), 40)


class ProgressBar:
    """One line: what, bar, share, rate, time left, and a note such as the loss. Plain lines without a terminal."""

    def __init__(self, progress: Progress, what: str, total: float | int) -> None:
        self._progress, self._what, self._total = progress, what, total
        self._task = progress.add_task(what, total=total, note="")
        self._last_line, self._done = time.monotonic(), 0.0

    def advance(self, amount: float | int, note: str = "") -> None:
        """Report `amount` more units done; `note` replaces the text at the end of the line."""
        self._done += amount
        self._progress.update(self._task, advance=amount, note=note)
        if not console.is_terminal and time.monotonic() - self._last_line > 15:
            self._last_line = time.monotonic()
            console.print(f"{self._what}: {100 * self._done / max(self._total, 1):.0f} % {note}")


@contextlib.contextmanager
def progress_bars(unit: str = "tok") -> Iterator[Callable[[str, float | int], ProgressBar]]:
    """Show several bars on standard error; the block gets a function (what, total) -> bar."""
    columns = (
        _Fitted(lambda task: task.description, _description_room), BarColumn(bar_width=_bar_width()),
        TextColumn("{task.percentage:>3.0f}%"), _Rate(unit), TimeRemainingColumn(compact=True),
        _Fitted(lambda task: task.fields["note"], _note_room),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield lambda what, total: ProgressBar(progress, what, total)


@contextlib.contextmanager
def progress_bar(what: str, *, total: float | int, done: float | int = 0, unit: str = "tok") -> Iterator[ProgressBar]:
    """Show one progress bar on standard error for the duration of the block; `done` was done by an earlier process."""
    with progress_bars(unit) as add:
        bar = add(what, total)
        bar.advance(done)
        yield bar


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and the key reports of `transformers`, whose errors become a `CrateError`."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
