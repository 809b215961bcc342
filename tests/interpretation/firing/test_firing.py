"""Consistency and distinctiveness: by hand, against loops, on neurons whose rule is known; means and intervals."""

from pathlib import Path

import numpy as np
import pytest
from fixtures.synthetic import CONSTANT, FIRST_TOKEN_NEURON, NOISE, make_run
from interpretation.scoring.test_correlation import excerpts_of

from cratelm import read_records
from cratelm.interpretation.firing.means import ALL, mean_firing
from cratelm.interpretation.firing.measures import (
    MEASURES,
    STATED,
    THRESHOLDS,
    Counts,
    Firing,
    LayerFiring,
    count,
    count_sets,
    firing_layer,
    read_firing,
    relevant_tokens,
    write_firing,
)
from cratelm.interpretation.lookup.explain import explain_layer
from cratelm.interpretation.lookup.simulate import simulate_layer
from cratelm.interpretation.protocols import PROTOCOLS, protocol
from cratelm.interpretation.scoring import small_samples
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import write_explanations, write_simulations
from cratelm.interpretation.store.schema import SetKey

KEY = SetKey(layer=0, protocol="top-and-random")


def counted(a: np.ndarray, s: np.ndarray, lengths: np.ndarray, maximum: float = 10.0) -> Counts:
    base, relevant = count(excerpts_of(a, lengths), s.astype(np.float32))
    return Counts(base=base, relevant=relevant, maximum=np.full(len(a), maximum))


def test_a_neuron_by_hand() -> None:
    """Predicted 10, 4, 3, 0; it fires with 5, 0, 1, 2: relevant from 0.3 on are the first three."""
    a, s = np.array([[[5.0, 0, 1, 2]]]), np.array([[[10.0, 4, 3, 0]]])
    found = counted(a, s, np.array([[4]]))
    consistency, strength, distinctiveness, mass = found.measures[0, STATED]
    assert (consistency, distinctiveness) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert strength == pytest.approx((5 + 0 + 1) / 3 / 10)
    assert mass == pytest.approx(6 / 8)
    assert (found.firing[0], found.relevance[0, STATED]) == (3 / 4, 3 / 4)
    at_half = found.measures[0, THRESHOLDS.index(0.5)]
    assert at_half == pytest.approx([1, 0.5, 1 / 3, 5 / 8])


def test_the_permuted_level_is_the_mean_over_permutations_within_excerpts(rng: np.random.Generator) -> None:
    """A neuron of a topic fires on half of the tokens of its excerpts, on few of the others, and not as predicted."""
    topic = np.array([0.5, 0.5, 0.05, 0.05])[:, None]
    a = (rng.random((6, 4, 20)) < topic).astype(float)
    s = rng.random((6, 4, 20)) * (rng.random((6, 4, 20)) < topic)
    lengths = np.array([[20, 17, 20, 3]] * 6)
    s *= np.arange(20) < lengths[..., None]
    level = counted(a, s, lengths).permuted[:, STATED]
    drawn = []
    for _ in range(400):
        permuted = s.copy()
        for neuron, excerpt in np.ndindex(6, 4):
            permuted[neuron, excerpt, : lengths[neuron, excerpt]] = rng.permutation(
                s[neuron, excerpt, : lengths[neuron, excerpt]]
            )
        drawn.append(counted(a, permuted, lengths).measures[:, STATED][:, [0, 2]])
    np.testing.assert_allclose(level, np.mean(drawn, axis=0), atol=0.03)
    assert level[:, 0].mean() > counted(a, s, lengths).firing.mean() + 0.05


def test_what_nothing_is_predicted_for_or_never_fires_is_undefined() -> None:
    a, s, whole = np.array([[[1.0, 0, 2]]]), np.zeros((1, 1, 3)), np.array([[3]])
    nothing = counted(a, s, whole).measures[0, STATED]
    assert np.isnan(nothing[:2]).all()
    assert nothing[2:].tolist() == [0, 0]
    silent = counted(0 * a, s + [1, 0, 0], whole).measures[0, STATED]
    assert silent[:2].tolist() == [0, 0]
    assert np.isnan(silent[2:]).all()
    negative = counted(-a, -s - 1, whole)
    assert np.isnan(negative.measures).all(), (
        "negative activations do not count as firing, nor negative predictions as relevant"
    )


def test_counting_equals_loops_over_tokens(rng: np.random.Generator) -> None:
    shape = (40, 5, 7)
    a = np.maximum(rng.normal(-0.3, 1, shape), 0) * rng.integers(0, 2, (40, 1, 1))
    s = np.round(np.maximum(rng.normal(-0.3, 1, shape), 0), 1)
    lengths = rng.integers(0, 8, shape[:2])
    valid = np.arange(7) < lengths[..., None]
    found = counted(a, s * valid, lengths, maximum=4.0)
    for row in range(len(a)):
        true, guess = a[row][valid[row]].astype(np.float32), s[row][valid[row]].astype(np.float32)
        largest = max([*guess, 0])
        for place, threshold in enumerate(THRESHOLDS):
            relevant = [bool(g > 0 and g >= np.float32(threshold) * largest) for g in guess]
            both = sum(r and t > 0 for r, t in zip(relevant, true, strict=True))
            mass = sum(float(t) for r, t in zip(relevant, true, strict=True) if r)
            expected = [
                both / sum(relevant) if any(relevant) else np.nan,
                mass / sum(relevant) / 4 if any(relevant) else np.nan,
                both / (true > 0).sum() if (true > 0).any() else np.nan,
                mass / true.sum(dtype=np.float64) if (true > 0).any() else np.nan,
            ]
            np.testing.assert_allclose(found.measures[row, place], expected, rtol=1e-6)
            share = np.mean(relevant) if relevant else np.nan
            np.testing.assert_allclose(found.relevance[row, place], share, rtol=1e-12)
            np.testing.assert_array_equal(relevant_tokens(guess, float(largest), threshold), relevant)


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    """40 neurons with simulations by their own explanations and by strangers'."""
    path = make_run(tmp_path / "run", rng, layers=1, neurons=40)
    records, store, by = read_records(path, 0), Store.create(path), protocol(KEY.protocol)
    explanations = explain_layer(records, by, ["?"] * 400)
    write_explanations(store, KEY, explanations)
    for control in ("", "shuffled"):
        key = SetKey(layer=0, protocol=KEY.protocol, control=control)
        write_simulations(store, key, simulate_layer(records, by, explanations, control=control))
    return path


def test_a_token_neuron_fires_where_its_own_explanation_says_and_strangers_give_chance(run: Path) -> None:
    own, strangers = count_sets(run, [KEY, SetKey(layer=0, protocol=KEY.protocol, control="shuffled")])
    planted = own.neuron >= FIRST_TOKEN_NEURON
    for kind in ("top", "random"):
        consistency, _, distinctiveness, mass = own.kinds[kind].measures[planted, STATED].T
        assert np.nanmedian(consistency) == 1
        assert np.nanmean(consistency) > 0.9
        assert np.nanmean(mass) > 0.8  # the rest is planted noise
        assert np.nanmean(distinctiveness) < np.nanmean(mass)
    for kind in ("top", "random"):
        counts = strangers.kinds[kind]
        consistency, _, distinctiveness, _ = counts.measures[planted, STATED].T
        assert np.nanmean(consistency) == pytest.approx(counts.firing[planted].mean(), abs=0.12)
        assert np.nanmean(distinctiveness) == pytest.approx(counts.relevance[planted, STATED].mean(), abs=0.12)
        assert np.nanmean(consistency) < 0.5 * np.nanmean(own.kinds[kind].measures[planted, STATED, 0])
    constant = own.kinds["random"].measures[own.neuron == CONSTANT, STATED, 0]
    assert constant == 1, "a neuron that always fires is consistent and nothing else"
    noise = own.neuron == NOISE
    assert own.kinds["random"].measures[noise, STATED, 2] < 0.6


def test_excerpts_are_told_apart_by_kind(run: Path) -> None:
    records, store = read_records(run, 0), Store.open(run)
    (found,) = count_sets(run, [KEY])
    for kind in ("top", "random"):
        recorded = records.excerpts(64, "score", kind).take(range(5)).rows(found.neuron)
        fires = (recorded.activations > 0).sum(axis=(1, 2))
        np.testing.assert_array_equal(found.kinds[kind].base[:, :, 1].sum(axis=1), fires)
    for name in PROTOCOLS[1:]:
        key, by = SetKey(layer=0, protocol=name), protocol(name)
        explanations = explain_layer(records, by, ["?"] * 400)
        simulations = simulate_layer(records, by, explanations)
        kinds = firing_layer(records, by, simulations).kinds
        assert {kind: one.base.shape[1] for kind, one in kinds.items()} == (
            {"random": 5} if name == "random-only" else {"top": 10, "random": 5}
        )
        write_simulations(store, key, simulations)


def test_what_is_kept_comes_back(run: Path) -> None:
    records, store = read_records(run, 0), Store.open(run)
    made = firing_layer(records, protocol(KEY.protocol), store.simulations(KEY))
    write_firing(store, KEY, made)
    assert store.is_done(KEY, "firing")
    found = read_firing(Store.open(run), KEY)
    assert sorted(found) == made.neuron.tolist()
    for row, neuron in enumerate(made.neuron.tolist()):
        assert read_firing(store, KEY, neuron) == {neuron: found[neuron]}
        for kind, counts in made.kinds.items():
            one = found[neuron][kind]
            values = [getattr(one, name) for name in MEASURES]
            expected = counts.measures[row, STATED]
            assert [np.nan if value is None else value for value in values] == pytest.approx(expected, nan_ok=True)
            assert one.tokens == counts.base[row, :, 0].sum()
            assert one.firing == pytest.approx(counts.firing[row])
            assert isinstance(one, Firing)
    write_firing(store, KEY, firing_layer(records, protocol(KEY.protocol), store.simulations(KEY)))
    assert read_firing(store, KEY) == found, "written again, it takes the place of what was there"


def made_up(rng: np.random.Generator, layer: int, neurons: int, excerpts: int = 5) -> LayerFiring:
    skill = rng.uniform(0.1, 0.9, (neurons, 1, 1))
    s = (rng.random((neurons, excerpts, 12)) < 0.3) * rng.uniform(0.5, 1, (neurons, excerpts, 12))
    a = np.where(s > 0, rng.random(s.shape) < skill, rng.random(s.shape) < 0.1).astype(float)
    lengths = np.full((neurons, excerpts), 12)
    lengths[::3, -1] = 0
    s *= lengths[..., None] > 0
    return LayerFiring(layer=layer, neuron=np.arange(neurons), kinds={"random": counted(a, s, lengths, maximum=1.0)})


def brute(layer: LayerFiring, rng: np.random.Generator, times: int) -> np.ndarray:
    """Means of consistency and distinctiveness at the stated threshold, neurons and excerpts drawn one by one."""
    counts, means = layer.kinds["random"], []
    for _ in range(times):
        values = []
        for i in rng.integers(len(layer.neuron), size=len(layer.neuron)):
            there = np.flatnonzero(counts.base[i, :, 0])
            drawn = rng.choice(there, size=len(there))
            tokens, both, _ = counts.relevant[i, drawn, STATED].sum(axis=0)
            with np.errstate(invalid="ignore"):
                values.append([both / tokens, both / counts.base[i, drawn, 1].sum()])
        means.append(np.nanmean(values, axis=0))
    return 100 * np.array(means)


def test_means_and_intervals_are_those_of_brute_force(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_samples, "FEW_NEURONS", 0)  # the plain bootstrap, which is at work from 250 neurons on
    layers = [made_up(rng, layer, 15) for layer in (0, 1)]
    found = mean_firing(layers, resamples=1500)
    for layer, mean in zip(layers, found.by_layer["random"], strict=True):
        expected = 100 * np.nanmean(layer.kinds["random"].measures, axis=0)
        np.testing.assert_allclose(mean.values[:, :4], expected)
        slow = brute(layer, rng, 400)
        for place, name in enumerate(("consistency", "distinctiveness")):
            assert mean.samples.shape == (1500, len(ALL))
            samples = mean.samples[:, ALL.index(name)]
            assert samples.std() == pytest.approx(slow[:, place].std(), rel=0.2)
            ends = mean.interval(name)
            value = mean.of(name)
            assert ends is not None and value is not None  # noqa: PT018
            assert ends[0] < value < ends[1]
    overall = found.overall["random"]
    values = [mean.of("consistency") for mean in found.by_layer["random"]]
    assert overall.of("consistency") == pytest.approx(np.mean([value for value in values if value is not None]))
    assert overall.neurons == 30
    assert "top" not in found.overall


def test_the_undefined_are_counted_and_left_out(rng: np.random.Generator) -> None:
    layer = made_up(rng, 0, 6)
    layer.kinds["random"].relevant[0] = 0
    layer.kinds["random"].base[1, :, 1:] = 0
    layer.kinds["random"].relevant[1, :, :, 1:] = 0
    mean = mean_firing([layer], resamples=20).overall["random"]
    assert (mean.neurons, mean.unpredicted, mean.silent) == (6, 1, 1)
    expected = np.nanmean(layer.kinds["random"].measures[:, STATED, 0])
    assert mean.of("consistency") == pytest.approx(100 * expected)


def test_the_same_seed_gives_the_same_interval(rng: np.random.Generator) -> None:
    layers = [made_up(rng, 0, 9), made_up(rng, 1, 9)]
    first, again, other = (mean_firing(layers, seed=seed, resamples=50) for seed in (1, 1, 2))
    alone = mean_firing(layers[1:], seed=1, resamples=50)
    ends = [one.overall["random"].interval("consistency") for one in (first, again, other)]
    assert ends[0] == ends[1] != ends[2]
    assert alone.by_layer["random"][0].interval("consistency") == first.by_layer["random"][1].interval("consistency")


def test_from_six_layers_on_the_last_is_left_out(rng: np.random.Generator) -> None:
    layers = [made_up(rng, layer, 4) for layer in range(6)]
    found = mean_firing(layers, resamples=20)
    values = [mean.of("strength") for mean in found.by_layer["random"]]
    assert found.overall["random"].of("strength") == pytest.approx(np.mean([v for v in values[:5] if v is not None]))
