"""Run a command, and once more while processes that run it are killed; `tests/test_kill.py` compares what they leave.

    python kill_at_random.py KILLS WHOLE KILLED VERB FLAG...     ({run} in a flag is the one folder, then the other)

Every process is a fork of this one, which has imported what takes long: a kill costs milliseconds, not seconds.
"""

import os
import random
import signal
import sys
import time

from cratelm import cli
from cratelm.activations import collect, compat  # noqa: F401  imported here so that no fork has to
from cratelm.commands import interpret  # noqa: F401
from cratelm.training import train  # noqa: F401


def start(arguments: list[str]) -> int:
    """Run the command in a process of its own; returns its number."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = cli.main(arguments)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return process


def finish(process: int) -> bool:
    """Wait for the end; false if the process was killed."""
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0, "the command failed"
    return True


def main(kills: int, whole: str, killed: str, arguments: list[str]) -> None:
    collect.SAVE_SECONDS = -1  # after every batch
    started = time.monotonic()
    assert finish(start([argument.format(run=whole) for argument in arguments]))
    seconds = time.monotonic() - started
    arguments, count = [argument.format(run=killed) for argument in arguments], 0
    for _ in range(kills):
        process = start(arguments)
        time.sleep(random.uniform(0, 0.9 * seconds))
        os.kill(process, signal.SIGKILL)
        count += not finish(process)
    assert finish(start(arguments))
    sys.stdout.write(f"killed {count}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
