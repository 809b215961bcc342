"""The controls: whose explanation each neuron is simulated from."""

import numpy as np
import pytest

from cratelm.errors import CrateError
from cratelm.interpretation.simulators.controls import LOOKUP_CONTROLS, NO_NEURON, check_controls, sources_of


def shuffled(neurons: np.ndarray, candidates: np.ndarray, *, layer: int = 1) -> dict[int, int]:
    return sources_of("shuffled", neurons, candidates, layer=layer, protocol="top-and-random")


def test_a_shuffled_neuron_never_keeps_its_own_explanation(rng: np.random.Generator) -> None:
    for size in (2, 3, 50):
        neurons = np.sort(rng.choice(200, size=size, replace=False))
        sources = shuffled(neurons, neurons)
        assert list(sources) == sorted(sources.values()) == neurons.tolist()
        assert all(neuron != source for neuron, source in sources.items())
    assert shuffled(np.array([5]), np.arange(100)) == {}
    assert len({tuple(shuffled(np.arange(6), np.arange(6), layer=layer).values()) for layer in range(50)}) > 10


def test_a_shuffled_layer_is_paired_as_the_first_version_paired_it(rng: np.random.Generator) -> None:
    """The reference is the pairing of stored sets: element i of the ring gets the explanation of element i - 1."""
    explained = np.sort(rng.choice(300, size=40, replace=False))
    ring = np.random.default_rng([1, *b"top-and-random"]).permutation(40)
    rows = np.empty(40, dtype=np.int64)
    rows[ring] = np.roll(ring, 1)
    assert shuffled(explained, explained) == dict(zip(explained.tolist(), explained[rows].tolist(), strict=True))


def test_a_shuffled_pair_stays_when_the_sample_grows() -> None:
    half, everyone = np.arange(0, 100, 2), np.arange(100)
    before, after = shuffled(half, everyone), shuffled(np.array([*half, 1]), everyone)
    assert sum(after[neuron] != source for neuron, source in before.items()) == 1


def test_the_constant_control_has_no_source_and_is_not_for_lookup() -> None:
    assert sources_of("constant", np.array([5]), np.arange(9), layer=0, protocol="anthropic") == {5: NO_NEURON}
    assert check_controls(("constant", "shuffled")) == ("constant", "shuffled")
    with pytest.raises(CrateError, match="no control 'constant'. Use: shuffled"):
        check_controls(("constant",), LOOKUP_CONTROLS)
