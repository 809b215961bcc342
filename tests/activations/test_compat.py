"""`compat` collection against the released procedure done the plain way: hold all activations, sort, pick."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.planted import NEURONS, TOKENS, collect_planted, planted

from cratelm.activations import compat
from cratelm.activations.compat import collect_compat
from cratelm.activations.records import ABSENT, read_collection, read_records
from cratelm.activations.released import NARROW, PER_INTERVAL, QUANTILES, TOP, WIDE, ReleasedLayer, rank_bounds
from cratelm.activations.subject import Corpus, Subject
from cratelm.errors import CrateError
from cratelm.runtime import progress_bar


@pytest.fixture(scope="module", params=[1, 8])
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    codes = planted(TOKENS)
    run = tmp_path_factory.mktemp("compat") / "run"
    collect_planted(run, codes, request.param)
    return run, codes


def centres(run: Path, width: int, kind: str) -> np.ndarray:
    """The token at the centre of each window; a window cut at the start of the corpus begins at 0."""
    excerpts = read_records(run, 0, mode="compat").excerpts(width, "all", kind)
    length = excerpts.valid.sum(axis=2)
    at_start = (excerpts.position == 0) & (length < width)
    return np.where(excerpts.present, excerpts.position + np.where(at_start, length - width // 2, width // 2), ABSENT)


def ranks(codes: np.ndarray, neuron: int) -> np.ndarray:
    """Rank of each token, strongest first, equal ones by position."""
    order = np.argsort(-codes[:, neuron], kind="stable")
    rank = np.empty(len(order), dtype=int)
    rank[order] = np.arange(len(order))
    return rank


def rank_ranges(tokens: int, width: int) -> list[tuple[int, int]]:
    """The intervals as [first, last) ranks."""
    bounds = rank_bounds(np.array(tokens), width).tolist()
    return list(zip(bounds[1:], bounds[:-1], strict=True))


def test_rank_ranges_are_the_released_ones() -> None:
    """For the corpora of the paper."""
    wide = [(4096000, 8192000), (819199, 4096000), (81920, 819199), (8192, 81920), (0, 8192)]
    assert rank_ranges(8_192_000, WIDE) == wide
    edges = [819200, 750933, 682666, 614400, 546133, 477866, 409600, 341333, 273066, 204800, 136533, 68266]
    assert rank_ranges(819_200, NARROW) == list(zip(edges[1:], edges[:-1], strict=True))


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_top_tokens_are_the_first_of_a_stable_sort(collected: tuple[Path, np.ndarray], width: int) -> None:
    run, codes = collected
    top = centres(run, width, "top")
    for neuron in range(NEURONS):
        assert top[neuron].tolist() == np.argsort(-codes[:, neuron], kind="stable")[:TOP].tolist()


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_each_interval_gives_distinct_tokens_of_its_ranks(collected: tuple[Path, np.ndarray], width: int) -> None:
    run, codes = collected
    sampled = centres(run, width, "quantile").reshape(NEURONS, -1, PER_INTERVAL)
    for neuron in range(NEURONS):
        rank = ranks(codes, neuron)
        for (low, high), drawn in zip(rank_ranges(TOKENS, width), sampled[neuron], strict=True):
            tokens = drawn[drawn != ABSENT]
            assert len(set(tokens.tolist())) == len(tokens) == min(PER_INTERVAL, high - low)
            assert ((rank[tokens] >= low) & (rank[tokens] < high)).all()


@pytest.mark.parametrize("kind", ["top", "random", "quantile"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_windows_run_from_half_a_width_before_the_token_cut_only_by_the_corpus(
    collected: tuple[Path, np.ndarray], width: int, kind: str
) -> None:
    run, codes = collected
    excerpts = read_records(run, 0, mode="compat").excerpts(width, "all", kind)
    middle_of = centres(run, width, kind)
    for neuron in range(NEURONS):
        middles = middle_of[neuron][middle_of[neuron] != ABSENT]
        for excerpt, middle in zip(excerpts.of(neuron), middles, strict=True):
            first, last = max(0, middle - width // 2), min(TOKENS, middle + width // 2)
            assert excerpt.tokens.tolist() == list(range(first, last))
            assert np.array_equal(excerpt.activations, codes[first:last, neuron])


def test_draws_from_an_interval_are_uniform() -> None:
    """Over many seeds each token of an interval comes equally often: ties, zeros, rare and common intervals alike."""
    repeats, counts, codes = 150, np.zeros((2, NEURONS, 600)), planted(600)
    for seed in range(repeats):
        for number, width in enumerate((WIDE, NARROW)):
            layer = ReleasedLayer(NEURONS, width, 600, seed=(seed, width), device=torch.device("cpu"))
            for first in range(0, 600, 100):
                layer.count(torch.from_numpy(codes[first : first + 100]), first)
            layer.choose()
            for first in range(0, 600, 100):
                layer.gather(torch.from_numpy(codes[first : first + 100]), first)
            for neuron, positions in enumerate(layer._quantile_positions().numpy()):
                counts[number, neuron] += np.bincount(positions[positions >= 0], minlength=600)
    for number, width in enumerate((WIDE, NARROW)):
        for neuron in range(NEURONS):
            rank = ranks(codes, neuron)
            for low, high in rank_ranges(600, width):
                inside = counts[number, neuron][(rank >= low) & (rank < high)]
                chance = min(1, PER_INTERVAL / max(1, high - low))
                assert inside.sum() == repeats * min(PER_INTERVAL, high - low)
                error = np.sqrt(repeats * chance * (1 - chance)) + 1e-9
                assert (np.abs(inside - repeats * chance) < 5.5 * error).all()


def test_narrow_records_read_the_first_tokens_of_the_wide_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "TOKENS", {WIDE: 2050, NARROW: 1050})
    codes = planted(TOKENS)
    collect_planted(tmp_path / "run", codes, 3)
    for width, tokens in ((WIDE, 2000), (NARROW, 1000)):
        top = centres(tmp_path / "run", width, "top")
        for neuron in range(NEURONS):
            assert top[neuron].tolist() == np.argsort(-codes[:tokens, neuron], kind="stable")[:TOP].tolist()
    collection = read_collection(tmp_path / "run", mode="compat")
    assert (collection["tokens"], collection["tokens_narrow"], collection["documents"]) == (2000, 1000, 2)


def test_another_seed_draws_other_tokens_and_the_same_seed_the_same(
    collected: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    run, codes = collected
    collect_planted(tmp_path / "same", codes, 4)
    collect_planted(tmp_path / "other", codes, 4, seed=1)
    for kind in ("random", "quantile"):
        assert np.array_equal(centres(run, NARROW, kind), centres(tmp_path / "same", NARROW, kind))
        assert not np.array_equal(centres(run, NARROW, kind), centres(tmp_path / "other", NARROW, kind))


def test_a_negative_zero_ranks_as_zero(collected: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """ReLU gives it for an input of -0.0, and its bits are those of no activation."""
    run, codes = collected
    collect_planted(tmp_path / "signed", np.where(codes == 0, np.float32(-0.0), codes), 8)
    for name, array in read_records(run, 0, mode="compat").arrays.items():
        assert np.array_equal(array, read_records(tmp_path / "signed", 0, mode="compat").arrays[name])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    codes = planted(TOKENS)
    codes[1234, 2] = bad
    with pytest.raises(CrateError, match="layer 0 has an activation that is not finite"):
        collect_planted(tmp_path / "run", codes, 8)


def test_negative_activations_and_too_little_text_are_refused(tmp_path: Path) -> None:
    codes = planted(TOKENS) - 1
    with pytest.raises(CrateError, match="layer 0 has negative activations"):
        collect_planted(tmp_path / "run", codes, 8)
    subject = Subject(forward=lambda _: {}, layers={0: 1}, context=100, tap="neurons", identity={})
    corpus = Corpus(tokens=np.zeros(150, np.uint16), documents=np.array([0, 150]), end_of_text=0, identity={})
    with (
        pytest.raises(CrateError, match="100 tokens in whole blocks of 100 are too few"),
        progress_bar("", total=1) as b,
    ):
        collect_compat(subject, corpus, tmp_path / "run", device=torch.device("cpu"), bar=b)
    assert len(QUANTILES[NARROW]) == 12
