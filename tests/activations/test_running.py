"""Running statistics against the same statistics of everything held at once."""

import numpy as np
import pytest
import torch

from cratelm.activations.neighbours import KEEP, nearest_cofiring, nearest_directions
from cratelm.activations.running import Moments, SampledExcerpts, TopExcerpts, histogram_edges

CPU = torch.device("cpu")


def test_moments_equal_those_of_all_activations_in_float64(rng: np.random.Generator) -> None:
    values = np.maximum(rng.normal(0.2, 1, (5000, 7)), 0) * rng.uniform(0.1, 30, 7)
    values[:, 3] += 1000  # a large mean would cancel in raw power sums
    moments, other = Moments(7, CPU), Moments(7, CPU)
    parts = [torch.from_numpy(part.astype(np.float32)) for part in np.array_split(values, 13)]
    moments.start(parts[0])
    other.start(parts[5])
    for part in parts[:5]:
        moments.update(part)
    for part in parts[5:]:
        other.update(part)
    moments.merge(other)
    held = values.astype(np.float32).astype(np.float64)
    centred = held - held.mean(axis=0)
    spread = (centred**2).mean(axis=0)
    result = {name: value.numpy() for name, value in moments.result().items()}
    assert np.allclose(result["density"], (held > 0).mean(axis=0), rtol=1e-12)
    assert np.allclose(result["mean"], held.mean(axis=0), rtol=1e-6)
    assert np.allclose(result["variance"], held.var(axis=0, ddof=1), rtol=1e-4)
    assert np.allclose(result["skewness"], (centred**3).mean(axis=0) / spread**1.5, rtol=1e-3, atol=1e-4)
    assert np.allclose(result["kurtosis"], (centred**4).mean(axis=0) / spread**2, rtol=1e-3)
    assert np.array_equal(result["maximum"], held.max(axis=0))
    assert np.array_equal(result["minimum"], held.min(axis=0))


def test_the_histogram_counts_every_fourth_token_in_bins_of_half_octaves(rng: np.random.Generator) -> None:
    values = (rng.normal(0, 1, (999, 5)) * 10.0 ** rng.uniform(-6, 6, (999, 5))).astype(np.float32)
    values[::3] = 0
    moments = Moments(5, CPU)
    moments.update(torch.from_numpy(values))
    edges = np.concatenate([[-np.inf], histogram_edges(), [np.inf]])
    for neuron in range(5):
        expected = np.histogram(values[::4, neuron], edges)[0]
        assert np.array_equal(moments.result()["histogram"][neuron].numpy(), expected)
    assert histogram_edges()[[0, 31, 32, 33]].tolist() == [1.5 * 2.0**-16, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("batches", [1, 4, 23])
def test_top_excerpts_are_the_best_of_each_document_however_the_stream_is_cut(
    rng: np.random.Generator, batches: int
) -> None:
    neurons, keep, width, count = 5, 6, 3, 400
    position = rng.permutation(count)
    document = rng.integers(0, 40, count)
    maximum = rng.integers(0, 30, (count, neurons)).astype(np.float32)  # many ties
    activation = rng.random((count, neurons, width)).astype(np.float32)
    top = TopExcerpts(neurons, keep, width, CPU)
    for part in np.array_split(np.arange(count), batches):
        mask = (torch.from_numpy(maximum[part]) >= top.threshold) & (torch.from_numpy(maximum[part]) > 0)
        index, neuron = mask.nonzero(as_tuple=True)
        row = torch.from_numpy(part)[index]
        top.offer(
            neuron, torch.from_numpy(maximum)[row, neuron], torch.from_numpy(position)[row],
            torch.from_numpy(document)[row], torch.full_like(row, width), torch.from_numpy(activation)[row, neuron],
        )  # fmt: skip
    top.merge()
    for j in range(neurons):
        best: dict[int, tuple[float, int, int]] = {}
        for i in range(count):
            entry = (-float(maximum[i, j]), int(position[i]), i)
            if maximum[i, j] > 0 and entry < best.get(int(document[i]), (1.0, 0, 0)):
                best[int(document[i])] = entry
        expected = sorted(best.values())[:keep]
        assert top.tables["position"][j].tolist() == [entry[1] for entry in expected]
        assert top.tables["maximum"][j].tolist() == [-entry[0] for entry in expected]
        kept = top.tables["activation"][j].numpy()
        assert np.array_equal(kept, activation[[entry[2] for entry in expected], j])


def test_a_neuron_that_never_fires_has_no_top_excerpt() -> None:
    top = TopExcerpts(2, 3, 1, CPU)
    one = torch.ones(1, dtype=torch.int64)
    top.offer(one, torch.ones(1), one, one, one, torch.ones(1, 1))
    top.merge()
    assert (top.tables["position"] >= 0).sum(dim=1).tolist() == [0, 1]


def test_sampled_windows_are_distinct_equally_likely_and_found_again_batch_by_batch() -> None:
    neurons, total, keep = 4000, 37, 5
    sample = SampledExcerpts(neurons, total, keep, 2, (1, 2), CPU)
    drawn = np.zeros((neurons, keep), dtype=int)
    for first in range(0, total, 10):
        count = min(10, total - first)
        slot, number = sample.wanted(first, count)
        assert ((number >= 0) & (number < count)).all()
        drawn.ravel()[slot.numpy()] = number.numpy() + first
    assert all(len(set(row)) == keep for row in drawn.tolist())
    chance = np.bincount(drawn.ravel(), minlength=total) / neurons
    assert np.allclose(chance, keep / total, atol=5 * np.sqrt(keep / total / neurons))


def test_a_sample_larger_than_the_corpus_takes_everything() -> None:
    sample = SampledExcerpts(3, 4, 10, 2, (0,), CPU)
    slot, number = sample.wanted(0, 4)
    assert sorted(number.tolist()) == sorted([0, 1, 2, 3] * 3)
    assert sample.tables["position"].shape == (3, 4)
    assert len(slot) == 12


def test_nearest_neurons_equal_brute_force(rng: np.random.Generator) -> None:
    directions = rng.normal(size=(90, 6)).astype(np.float32)
    fires = rng.random((400, 90)) < rng.uniform(0, 0.3, 90)
    fires[:, 4] = False
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    both = fires.astype(int).T @ fires.astype(int)
    count = fires.sum(axis=0)
    jaccard = both / np.maximum(count[:, None] + count - both, 1)
    for actual, similarity in (
        (nearest_directions(torch.from_numpy(directions)), unit @ unit.T),
        (nearest_cofiring(torch.from_numpy(fires)), jaccard),
    ):
        np.fill_diagonal(similarity, -np.inf)
        index, value = actual
        assert np.allclose(value, -np.sort(-similarity, axis=1)[:, :KEEP], atol=1e-5)
        assert np.allclose(np.take_along_axis(similarity, index.astype(int), axis=1), value, atol=1e-5)
