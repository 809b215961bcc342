"""Names of result files and folders. Different settings give different names, so no result is overwritten."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cratelm.workflows.opening import OpenModel

LEAVE_OUT = ("run", "prompt", "prompts", "show", "out", "device")
"""Options of `cratelm steer` that do not affect the numbers, or are in the name already."""


def result_name(words: str, settings: object, *, kind: str = "") -> str:
    """`kind`, then letters and digits of `words`, then six digits of a hash of the settings, joined by hyphens."""
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:6]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")
    return "-".join(part for part in (kind, readable, digest) if part)


def steering_name(kind: str, opened: OpenModel, prompts: Sequence[Sequence[int]], options: Any) -> str:
    """Name of the files of `cratelm steer`: the end of the first prompt and a digest of what affects the numbers."""
    settings = sorted((name, value) for name, value in vars(options).items() if name not in LEAVE_OUT)
    words = str(opened.tokenizer.decode(list(prompts[0])))[-30:]
    return result_name(words, (opened.name, [list(prompt) for prompt in prompts], settings), kind=kind)


def shown_path(path: Path) -> Path:
    """A path to print: relative below the working directory, otherwise absolute."""
    return path.resolve() if path.is_relative_to("..") else path


def report_folder(runs: Sequence[Path], name: str = "report") -> Path:
    """A folder of this name: in a single run, or in the folder that holds all of several runs."""
    if len(runs) == 1:
        return runs[0] / name
    common = Path(os.path.commonpath([path.resolve() for path in runs]))
    return Path(os.path.relpath(common)) / name
