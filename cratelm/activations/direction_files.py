"""Directions of neurons on disk, read with numpy alone: tokens in and out, neighbours in the next layer, head shares.

`cratelm directions` writes them; `whitebox/directions.py` says what each number is, `docs/formats.md` how it lies:

    RUN/directions/tokenizer.json                how token ids become text
    RUN/directions/<tap>/directions.json         what was computed, of which model
    RUN/directions/<tap>/layer_NN.safetensors    one row per neuron
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from cratelm.activations.records import ABSENT
from cratelm.errors import CrateError
from cratelm.rundir import check_format_version, read_json

End = Literal["largest", "smallest"]

TOKEN_LISTS = ("tokens_in", "tokens_alone", "tokens_out")
"""Lists of token ids."""
NEURON_LISTS = ("predecessors", "successors")
"""Lists of neurons of the layer before and of the layer after."""


@dataclass(frozen=True, kw_only=True)
class LayerDirections:
    """What the weights say about the neurons of one layer."""

    tap: str
    layer: int
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    """The file's tensors, by the names that `docs/formats.md` lists."""

    @property
    def num_neurons(self) -> int:
        """Neurons of this layer."""
        return len(self.arrays["write_norm"])

    @property
    def lists(self) -> tuple[str, ...]:
        """The lists there are, such as `tokens_out`."""
        return tuple(name for name in TOKEN_LISTS + NEURON_LISTS if self.has(name, "largest"))

    def ranked(self, name: str, neuron: int, end: End = "largest") -> list[tuple[int, float]]:
        """(token id or neuron, score) pairs of a list of a neuron, most extreme first; empty if it is missing."""
        if not self.has(name, end):
            return []
        if not 0 <= neuron < self.num_neurons:
            raise CrateError(f"layer {self.layer} has neurons 0 to {self.num_neurons - 1}, not {neuron}")
        index, value = (self.arrays[f"{name}.{end}.{part}"][neuron].tolist() for part in ("index", "value"))
        return [pair for pair in zip(index, value, strict=True) if pair[0] != ABSENT]

    def has(self, name: str, end: End) -> bool:
        """Whether the file has this end of a list."""
        return f"{name}.{end}.index" in self.arrays

    def head_shares(self, neuron: int) -> dict[str, Float[np.ndarray, " heads"]]:
        """By `heads_in`, `heads_out.shared` and so on: the share of each head."""
        return {name: values[neuron] for name, values in self.arrays.items() if name.startswith("heads_")}


def directions_folder(run: Path, tap: str = "neurons") -> Path:
    """Where a run keeps the directions of the neurons at a tap."""
    return run / "directions" / tap


def directions_file(run: Path, layer: int, tap: str = "neurons") -> Path:
    """The file of one layer."""
    return directions_folder(run, tap) / f"layer_{layer:02d}.safetensors"


def described_directions(run: Path, tap: str = "neurons") -> dict[str, Any]:
    """What was computed and of which model: the contents of `directions.json`."""
    return read_json(directions_folder(run, tap) / "directions.json", made_by=f"cratelm directions {run}")


def read_directions(run: str | Path, layer: int, *, tap: str = "neurons") -> LayerDirections:
    """Read the directions of one layer of a run, with numpy alone. Raises CrateError where there are none."""
    path = directions_file(Path(run), layer, tap)
    if not path.exists():
        there = sorted(file.stem.removeprefix("layer_").lstrip("0") or "0" for file in path.parent.glob("layer_*"))
        found = f"there are layers {', '.join(there)}" if there else "there are none"
        raise CrateError(f"no directions of layer {layer} in {run} ({found}). Run: cratelm directions {run}")
    try:
        with safe_open(path, framework="np") as file:
            check_format_version(path, (file.metadata() or {}).get("format_version", 1))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CrateError(f"{path} is not readable ({error}). Remove it and run: cratelm directions {run}") from None
    return LayerDirections(tap=tap, layer=layer, arrays=arrays)
