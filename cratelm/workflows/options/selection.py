"""Which neurons of which runs the interpreting commands work on, and by which protocols."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratelm.activations.records import Mode, recorded_layers, recorded_taps
from cratelm.errors import CrateError
from cratelm.interpretation.protocols import PROTOCOLS, protocol


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which neurons of which runs, and by which protocols."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    """Run directories, each with the records that `cratelm collect` wrote."""
    protocol: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ("all",)
    """One or more of top-and-random, random-only, anthropic; or all."""
    mode: Mode = "fixed"
    """fixed: explained and scored on different documents. compat: the paper's released procedure."""
    tap: str = "neurons"
    """Which place of the model: its own neurons, sae-NAME, or what `cratelm collect --tap` was given."""
    layer: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...", help_behavior_hint="")] = ()
    """Zero-based layers; all that have records if left out."""


def check_runs(selection: Selection) -> tuple[Path, ...]:
    """The run directories, refused if one is not there."""
    if not selection.runs:
        raise CrateError("no run directory was named. Run: cratelm interpret RUN")
    for run in selection.runs:
        if not run.is_dir():
            raise CrateError(f"there is no run directory {run}. Run: cratelm train --data DIR --out {run}")
    return selection.runs


def chosen_layers(run: Path, selection: Selection) -> list[int]:
    """The layers asked for, refused if one has no records."""
    found = recorded_layers(run, mode=selection.mode, tap=selection.tap)
    option = " --mode compat" if selection.mode == "compat" else ""
    if not found:
        taps = ", ".join(recorded_taps(run, mode=selection.mode))
        if taps:
            asked = selection.tap
            option += f" --sae {asked.removeprefix('sae-')}" if asked.startswith("sae-") else f" --tap {asked}"
            raise CrateError(
                f"{run} holds no {selection.mode} records of the tap {asked}. Use --tap: {taps}; or run: "
                f"cratelm collect {run} --data DIR{option}"
            )
        raise CrateError(f"{run} holds no {selection.mode} records. Run: cratelm collect {run} --data DIR{option}")
    if unknown := sorted(set(selection.layer) - set(found)):
        raise CrateError(
            f"{run} has no {selection.mode} records of layer {unknown[0]}. Use: {', '.join(map(str, found))}"
        )
    return sorted(set(selection.layer)) or found


def chosen_protocols(selection: Selection) -> tuple[str, ...]:
    """The protocols asked for, in the paper's order."""
    names = PROTOCOLS if "all" in selection.protocol else selection.protocol
    return tuple(sorted({protocol(name, selection.mode).name for name in names}, key=PROTOCOLS.index))
