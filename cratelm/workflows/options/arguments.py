"""Positional arguments that several commands take, as the help shows them."""

from pathlib import Path
from typing import Annotated

import tyro

RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
RunPaths = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
"""At least one path; the command line refuses none."""
