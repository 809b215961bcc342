"""Controls: simulate a neuron from a wrong explanation, as the chance level of scores.

shuffled    the explanation of another neuron of the layer
constant    the same sentence for every neuron (only for simulators that read text)
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from cratelm.errors import CrateError

CONTROLS = ("shuffled", "constant")
LOOKUP_CONTROLS = ("shuffled",)
"""Controls for simulation by lookup, which needs a table of tokens."""
CONSTANT_EXPLANATION = "tokens of any kind, with nothing in common"
"""The explanation of every neuron in the control `constant`."""
NO_NEURON = -1
"""Source of a simulation whose explanation is not a neuron's."""


def sources_of(
    control: str, neurons: Int64[np.ndarray, " neurons"], candidates: Int64[np.ndarray, " candidates"], *, layer: int,
    protocol: str,
) -> dict[int, int]:  # fmt: skip
    """Map each neuron to the neuron whose explanation it is simulated from.

    For `shuffled`, the candidates (all neurons of the layer that can be explained) form one random ring, and each of
    `neurons` gets the explanation of the one before it, skipping candidates that are not in `neurons`. So a sample that
    grows changes few pairs. The map is empty if there are fewer than two neurons.
    """
    if control == "constant":
        return dict.fromkeys(neurons.tolist(), NO_NEURON)
    if control != "shuffled":
        return {neuron: neuron for neuron in neurons.tolist()}
    ring = candidates[np.random.default_rng([layer, *protocol.encode()]).permutation(len(candidates))]
    ring = ring[np.isin(ring, neurons)]
    if len(ring) < 2:
        return {}
    return dict(sorted(zip(ring.tolist(), np.roll(ring, 1).tolist(), strict=True)))


def check_controls(controls: Sequence[str], known: Sequence[str] = CONTROLS) -> tuple[str, ...]:
    """The requested controls. Raises `CrateError` for an unknown one."""
    for control in controls:
        if control not in known:
            raise CrateError(f"there is no control {control!r}. Use: {', '.join(known)}")
    return tuple(controls)
