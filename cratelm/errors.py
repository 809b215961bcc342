"""The one exception a user may see: a sentence that says what was wrong, what was found, what to run next."""

import math


class CrateError(Exception):
    """A user's mistake or an unusable input. The command line prints it as one line and exits with code 2.

    Programming errors are asserts and keep their traceback.
    """


def check_least(options: object, smallest: int, *names: str) -> None:
    """Raise CrateError for an option that is given and is below `smallest`, infinite or NaN."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not smallest <= value < math.inf:
            number = "a number of " if isinstance(value, float) else ""
            raise CrateError(f"--{name.replace('_', '-')} must be {number}at least {smallest}, got {value}")
