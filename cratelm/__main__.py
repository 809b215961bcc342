"""`python -m cratelm` is the command `cratelm`."""

import sys

from cratelm.cli import main

if __name__ == "__main__":
    sys.exit(main())
