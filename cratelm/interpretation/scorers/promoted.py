"""The tokens that a neuron promotes, as items of the scorer `output`: does an explanation predict them?

A neuron promotes the tokens whose logits its direction raises most (`tokens_out` of `cratelm directions`). The others
are tokens that other neurons of the layer promote and this one does not, so that both kinds are tokens which some
neuron promotes, and how common a token is gives nothing away. After the output-centric evaluation of Gur-Arieh et al.
(2025), "Enhancing automated interpretability with output-centric feature descriptions", with the vocabulary projection
of the direction in place of steering.
"""

from pathlib import Path

import numpy as np

from cratelm.activations.direction_files import LayerDirections, described_directions, read_directions
from cratelm.activations.records import ABSENT, Excerpt, NeuronId
from cratelm.errors import CrateError
from cratelm.interpretation.scorers.windows import Contrast, Windows

LIST = "tokens_out"


def promoted_tokens(directions: LayerDirections, neuron: int, windows: Windows) -> Contrast:
    """Tokens that a neuron promotes, strongest first, and tokens that only other neurons of the layer promote.

    Each is an excerpt of one token whose activation is the effect on its logit, and whose position is the token id.
    """
    rows = directions.ranked(LIST, neuron)
    promoted = [(token, effect) for token, effect in rows if effect > 0][: windows.positives]
    index, value = (directions.arrays[f"{LIST}.largest.{part}"] for part in ("index", "value"))
    others = np.delete(index, neuron, axis=0)[np.delete(value, neuron, axis=0) > 0]
    candidates = np.setdiff1d(others, [ABSENT, *(token for token, _ in rows)])
    rng = np.random.default_rng([windows.seed, directions.layer, neuron])
    drawn = rng.permutation(candidates)[: windows.negatives].tolist()
    return Contrast(
        neuron=NeuronId(tap=directions.tap, layer=directions.layer, index=neuron), active=len(promoted),
        silent=len(candidates), positives=tuple(_item(token, effect) for token, effect in promoted),
        negatives=tuple(_item(token, 0.0) for token in drawn),
    )  # fmt: skip


def _item(token: int, effect: float) -> Excerpt:
    activations = np.array([effect], dtype=np.float32)
    return Excerpt(tokens=np.array([token]), activations=activations, position=token, document=ABSENT)


def promoting_directions(run: Path, tap: str, layer: int) -> LayerDirections:
    """Read the directions of a layer. Raises `CrateError` if they have no promoted tokens."""
    if tap != "neurons":
        raise CrateError(f"promoted tokens need --tap neurons, whose directions are known, got {tap}")
    directions = read_directions(run, layer, tap=tap)
    if not directions.has(LIST, "largest"):
        raise CrateError(f"the directions of layer {layer} in {run} have no tokens out: this model has no output head")
    return directions


def directions_identity(run: Path, tap: str) -> str:
    """What a run's directions were computed from, and the length of their lists."""
    described = described_directions(run, tap)
    return f"{described.get('model_hash')} {described.get('keep')}"
