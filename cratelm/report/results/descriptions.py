"""What `run.json` says of the runs of a report, and their titles."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cratelm.errors import CrateError
from cratelm.report.shown_text import visible
from cratelm.rundir import read_json


def distinct(runs: Sequence[Path]) -> list[Path]:
    """The run directories without repetitions."""
    return list({path.resolve(): path for path in runs}.values())


def display_name(name: str) -> str:
    """The name of a model of the paper as the paper writes it (`gpt2-2l` -> `GPT-2-2L`); other names unchanged."""
    match = re.fullmatch(r"(crate|gpt2)-(1l|2l|3l|s|b)", name)
    return name if match is None else f"{ {'crate': 'CRATE', 'gpt2': 'GPT-2'}[match[1]] }-{match[2].upper()}"


def described_runs(paths: Sequence[Path], *needed: str) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """Path, title and `run.json` of each run directory.

    A title has no invisible letters; runs of the same name are distinguished by their folders. Raises CrateError for a
    `run.json` without `name`, `arch` or a field of `needed` (`outer.inner`).
    """
    runs = [(path, _read_description(path, ("name", "arch", *needed))) for path in paths]
    names = [str(description["name"]) for _, description in runs]
    for (path, description), name in zip(runs, names, strict=True):
        control = description.get("control")
        title = display_name(str(description.get("of") or name)) if control else display_name(name)
        if names.count(name) > 1:
            title += f" ({os.path.relpath(path.resolve(), os.path.commonpath([one.resolve() for one in paths]))})"
        yield path, visible(f"{title}, {control}" if control else title), description


def _read_description(run: Path, needed: Sequence[str]) -> dict[str, Any]:
    made_by = f"cratelm train --out {run} --data DIR"
    description = read_json(run / "run.json", made_by=made_by)
    for name in needed:
        outer, _, inner = name.partition(".")
        value = description.get(outer)
        if (value.get(inner) if inner and value else value) is None:
            raise CrateError(f"{run / 'run.json'} must have a value of {name}, got none. Run: {made_by}")
    return description
