"""Directions of neurons on disk, read with numpy alone: tokens in and out, neighbours in the next layer, head shares.

`cratelm directions` writes them; `whitebox/directions.py` defines each number, `docs/formats.md` the layout:

    RUN/directions/tokenizer.json                how token ids become text
    RUN/directions/<tap>/directions.json         settings and the hash of the model
    RUN/directions/<tap>/layer_NN.safetensors    one row per neuron
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from cratelm.activations.records import ABSENT
from cratelm.checksums import read_tensors
from cratelm.errors import CrateError
from cratelm.rundir import read_json

End = Literal["largest", "smallest"]

TOKEN_LISTS = ("tokens_in", "tokens_alone", "tokens_out")
"""Lists of token ids."""
NEURON_LISTS = ("predecessors", "successors")
"""Lists of neurons of the layer before and of the layer after."""


@dataclass(frozen=True, kw_only=True)
class LayerDirections:
    """Tokens, neighbours and heads of the neurons of one layer, computed from the weights."""

    tap: str
    layer: int
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    """The file's tensors, by the names that `docs/formats.md` lists."""

    @property
    def num_neurons(self) -> int:
        return len(self.arrays["write_norm"])

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of the recorded lists, such as `tokens_out`."""
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
        """Whether the file has the largest or the smallest entries (`end`) of a list."""
        return f"{name}.{end}.index" in self.arrays

    def head_shares(self, neuron: int) -> dict[str, Float[np.ndarray, " heads"]]:
        """Share of each head, by name: `heads_in`, `heads_out.shared` and so on."""
        return {name: values[neuron] for name, values in self.arrays.items() if name.startswith("heads_")}


def directions_folder(run: Path, tap: str = "neurons") -> Path:
    """The folder of the directions of the neurons at a tap."""
    return run / "directions" / tap


def directions_file(run: Path, layer: int, tap: str = "neurons") -> Path:
    """The file of one layer."""
    return directions_folder(run, tap) / f"layer_{layer:02d}.safetensors"


def described_directions(run: Path, tap: str = "neurons") -> dict[str, Any]:
    """The contents of `directions.json`: the settings, the layers and the hash of the model."""
    return read_json(directions_folder(run, tap) / "directions.json", made_by=f"cratelm directions {run}")


def read_directions(run: str | Path, layer: int, *, tap: str = "neurons") -> LayerDirections:
    """Read the directions of one layer of a run, with numpy alone. Raises CrateError if they are missing."""
    path = directions_file(Path(run), layer, tap)
    if not path.exists():
        layers = sorted(file.stem.removeprefix("layer_").lstrip("0") or "0" for file in path.parent.glob("layer_*"))
        raise CrateError(
            f"no directions of layer {layer} in {run} (found layers: {', '.join(layers) or 'none'}). "
            f"Run: cratelm directions {run}"
        )
    arrays = read_tensors(path, hint=f"Remove it and run: cratelm directions {run}")
    return LayerDirections(tap=tap, layer=layer, arrays=arrays)
