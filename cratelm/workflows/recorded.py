"""Which layers of a run have records."""

from collections.abc import Sequence
from pathlib import Path

from cratelm.activations.records import Mode, collect_command, recorded_layers, recorded_taps
from cratelm.errors import CrateError


def check_run_exists(run: Path) -> None:
    """Raise CrateError if the run directory does not exist."""
    if not run.is_dir():
        raise CrateError(f"there is no run directory {run}. Hint: cratelm train --data DIR --out {run}")


def find_layers(run: Path, mode: Mode, tap: str, wanted: Sequence[int] = ()) -> list[int]:
    """The wanted layers, by default all that have records. Raises CrateError for a layer without records."""
    check_run_exists(run)
    recorded = recorded_layers(run, mode=mode, tap=tap)
    collect = collect_command(run, mode)
    if not recorded and (taps := recorded_taps(run, mode=mode)):
        flag = f"--sae {tap.removeprefix('sae-')}" if tap.startswith("sae-") else f"--tap {tap}"
        raise CrateError(
            f"--tap must be one with {mode} records in {run} ({', '.join(taps)}), got {tap}. Hint: {collect} {flag}"
        )
    if not recorded:
        raise CrateError(f"{run} must have {mode} records, got none. Hint: {collect}")
    if missing := sorted(set(wanted) - set(recorded)):
        raise CrateError(
            f"--layer must be one with {mode} records in {run} ({layer_spans(recorded)}), got {missing[0]}"
        )
    return sorted(set(wanted)) or recorded


def layer_spans(layers: Sequence[int]) -> str:
    """`0 to 11`, or a list if some are missing."""
    whole = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
