"""Names of result files: readable, and others for other settings, so that no call overwrites what another asked for."""

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cratelm.workflows.subject import Chosen

LEAVE_OUT = ("run", "prompt", "prompts", "show", "out", "device")
"""Options of `cratelm steer` that do not decide what is measured, or are named otherwise."""


def result_name(words: str, settings: object, *, kind: str = "") -> str:
    """`kind`, then letters and digits of `words`, then six digits of a hash of the settings, joined by hyphens."""
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:6]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")
    return "-".join(part for part in (kind, readable, digest) if part)


def steering_name(kind: str, chosen: "Chosen", prompts: Sequence[Sequence[int]], options: Any) -> str:
    """Of the files of `cratelm steer`: the end of the first prompt, and a digest of all that decides the numbers."""
    settings = sorted((name, value) for name, value in vars(options).items() if name not in LEAVE_OUT)
    words = str(chosen.tokenizer.decode(list(prompts[0])))[-30:]
    return result_name(words, (chosen.name, [list(one) for one in prompts], settings), kind=kind)
