"""Stop a training at the next checkpoint when the user or a scheduler asks for it."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Yield whether a stop was requested, by Ctrl-C or a scheduler's SIGTERM. A second Ctrl-C interrupts at once.

    Under torchrun a second one is ignored: torchrun forwards the Ctrl-C that every process has already received.
    """
    asked = threading.Event()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1

    def ask(number: int, _frame: object) -> None:
        if asked.is_set() and number == signal.SIGINT and alone:
            raise KeyboardInterrupt
        if not asked.is_set():
            os.write(2, b"\nstopping after this step\n")  # print could be interrupted inside another print
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
