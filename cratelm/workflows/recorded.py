"""Which layers of a run have records."""

from collections.abc import Sequence
from pathlib import Path

from cratelm.activations.records import Mode, recorded_layers
from cratelm.errors import CrateError


def find_layers(run: Path, mode: Mode, tap: str) -> list[int]:
    """Layers with records. Raises CrateError that names the records the run has, or the command to run."""
    if not run.is_dir():
        raise CrateError(f"there is no run directory {run}. Run: cratelm train --data DIR --out {run}")
    if layers := recorded_layers(run, mode=mode, tap=tap):
        return layers
    folders = {file.parent for file in (run / "records").rglob("layer_*.safetensors")}
    others = sorted(folder.relative_to(run / "records").parts for folder in folders)
    if others:
        has = "; ".join(f"--mode {mode} --tap {'/'.join(tap)}" for mode, *tap in others)
        raise CrateError(f"{run} has no {mode} records of the tap {tap}. It has: {has}")
    raise CrateError(f"{run} has no records. Run: cratelm collect {run} --data DIR")


def check_layers(run: Path, asked: Sequence[int], recorded: Sequence[int]) -> None:
    """Raise CrateError for a layer that has no records."""
    for layer in asked:
        if layer not in recorded:
            raise CrateError(f"{run} has no records of layer {layer}. Use --layer with one of: {layer_spans(recorded)}")


def layer_spans(layers: Sequence[int]) -> str:
    """`0 to 11`, or a list if some are missing."""
    whole = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
