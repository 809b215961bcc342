"""The one exception a user may see: a sentence that says what was wrong, what was found, what to run next."""


class CrateError(Exception):
    """A user's mistake or an unusable input. The command line prints it as one line and exits with code 2.

    Programming errors are asserts and keep their traceback.
    """
