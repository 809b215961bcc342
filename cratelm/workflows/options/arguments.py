"""Arguments and options that several commands have, each with its help."""

from pathlib import Path
from typing import Annotated

import tyro

from cratelm.runtime import DeviceName

RunPath = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
RunPaths = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
"""At least one path; the command line refuses none."""
Device = Annotated[DeviceName, tyro.conf.arg(help="Device to compute on.")]
SplitName = Annotated[str, tyro.conf.arg(help="Split to read; val is held-out text.")]
TokensTokenizer = Annotated[
    str | None,
    tyro.conf.arg(help="Tokenizer of tokens without a tokens.json (nanoGPT's), or of a model without a tokenizer."),
]
