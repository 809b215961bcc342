"""Options of the interpreting commands: the neurons of which runs to work on, and the protocols."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratelm.activations.records import Mode
from cratelm.interpretation.protocols import PROTOCOLS, protocol
from cratelm.workflows.options.arguments import RunPaths
from cratelm.workflows.recorded import check_run_exists, find_layers


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which neurons of which runs, and by which protocols."""

    runs: RunPaths
    """Run directories, each with the records that `cratelm collect` wrote."""
    protocol: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ("all",)
    """One or more of top-and-random, random-only, anthropic; or all."""
    mode: Mode = "fixed"
    """fixed: explained and scored on different documents. compat: the paper's released procedure."""
    tap: str = "neurons"
    """Activations to interpret: neurons, sae-NAME (latents), or another tap given to `cratelm collect --tap`."""
    layer: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...", help_behavior_hint="")] = ()
    """Zero-based layers; by default all that have records."""


def check_runs(selection: Selection) -> tuple[Path, ...]:
    """The run directories. Raises CrateError if one does not exist."""
    for run in selection.runs:
        check_run_exists(run)
    return selection.runs


def chosen_layers(run: Path, selection: Selection) -> list[int]:
    """The selected layers of a run. Raises CrateError for a layer without records."""
    return find_layers(run, selection.mode, selection.tap, selection.layer)


def chosen_protocols(selection: Selection) -> tuple[str, ...]:
    """The selected protocols, in the paper's order."""
    names = PROTOCOLS if "all" in selection.protocol else selection.protocol
    return tuple(sorted({protocol(name, selection.mode).name for name in names}, key=PROTOCOLS.index))
