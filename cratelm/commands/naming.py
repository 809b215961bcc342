"""Names of result files: readable, and others for other settings, so that no call overwrites what another asked for."""

import hashlib
import re


def result_name(words: str, settings: object, *, kind: str = "") -> str:
    """`kind`, then letters and digits of `words`, then six digits of a hash of the settings, joined by hyphens."""
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:6]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", words).strip("-")
    return "-".join(part for part in (kind, readable, digest) if part)
