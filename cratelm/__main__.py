"""The command `cratelm`, also as `python -m cratelm`: Ctrl-C prints no traceback, even during the imports."""

import sys


def command() -> int:
    """Run the command line and return its exit code."""
    try:
        from cratelm import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(command())
