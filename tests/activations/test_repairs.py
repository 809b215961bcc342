"""The repairs of `compat` mode against the procedure done the plain way, without the flaw in question."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.collecting import held_out_documents, make_run, message, options
from fixtures.planted import CONTEXT, NEURONS, TOKENS, TWO_DOCUMENTS, collect_planted, planted

from cratelm.activations import reading
from cratelm.activations.reading import NARROW, SKIPPED, WIDE, Reading, readings
from cratelm.activations.records import ABSENT, LayerRecords, read_collection, read_records
from cratelm.activations.released import PER_INTERVAL, RANDOM, TOP, ReleasedLayer, rank_bounds
from cratelm.activations.repairs import REPAIRS, Repair
from cratelm.commands import collect as command
from cratelm.errors import CrateError

READ = {WIDE: 2000, NARROW: 1000}
"""Tokens read of the 3730 there are, so that blocks can lie apart."""
KINDS = ("top", "random", "quantile")


def documents() -> tuple[int, ...]:
    """About 200 short documents: some lie within the first tokens of a block, some go on over its end."""
    inside = np.unique(np.random.default_rng(8).integers(1, TOKENS, 200))
    return (0, *(int(one) for one in inside), TOKENS + 30)


@dataclass(frozen=True)
class Collected:
    """Records of the planted codes, and what they should be made from, in positions of the split."""

    repairs: frozenset[Repair]
    documents: tuple[int, ...]
    codes: np.ndarray
    records: LayerRecords

    def blocks(self, width: int) -> np.ndarray:
        count = READ[width] // CONTEXT
        if "spread-blocks" not in self.repairs:
            return np.arange(count)
        wide = [i * 37 // 20 for i in range(20)]
        return np.array(wide if width == WIDE else [wide[i * 2] for i in range(10)])

    def read(self, width: int) -> np.ndarray:
        return np.concatenate([np.arange(CONTEXT) + block * CONTEXT for block in self.blocks(width)])

    def choosable(self, width: int) -> np.ndarray:
        read = self.read(width)
        return read[read % CONTEXT >= SKIPPED] if "skip-first-tokens" in self.repairs else read

    def document(self, position: int) -> int:
        return max(i for i, start in enumerate(self.documents) if start <= position)

    def ranked(self, width: int, neuron: int) -> list[int]:
        """Choosable tokens, strongest first, equal ones by position."""
        return sorted(self.choosable(width).tolist(), key=lambda position: (-self.codes[position, neuron], position))

    def sampled(self, width: int, kind: str, neuron: int) -> np.ndarray:
        """The tokens that windows were cut for, ABSENT where there is none."""
        first = self.records.arrays[f"{width}.all.{kind}.position"][neuron]
        if not self.repairs:
            cut = (first == 0) & (self.records.arrays[f"{width}.all.{kind}.length"][neuron] < width)
            inside = np.where(cut, self.records.arrays[f"{width}.all.{kind}.length"][neuron] - width // 2, width // 2)
        else:
            inside = self.records.arrays[f"{width}.all.{kind}.sampled"][neuron]
            assert ((inside == ABSENT) == (first == ABSENT)).all()
        return np.where(first == ABSENT, ABSENT, first + inside)


Collect = Callable[..., Collected]


@pytest.fixture(scope="module")
def collect(tmp_path_factory: pytest.TempPathFactory) -> Collect:
    """Collects with some repairs, each set once."""
    codes, done = planted(TOKENS), dict[object, Collected]()

    def one(*names: Repair, documents: tuple[int, ...] = documents()) -> Collected:
        key = (frozenset(names), documents)
        if key not in done:
            run = tmp_path_factory.mktemp("repairs") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(reading, "TOKENS", READ)
                collect_planted(run, codes, 3, documents=documents, repairs=frozenset(names))
            done[key] = Collected(frozenset(names), documents, codes, read_records(run, 0, mode="compat"))
        return done[key]

    return one


SETS: list[tuple[Repair, ...]] = [*((one,) for one in REPAIRS), REPAIRS]
"""Each repair alone, and all."""
every_set = pytest.mark.parametrize("names", SETS, ids=lambda names: names[0] if len(names) == 1 else "all")
each_width = pytest.mark.parametrize("width", [WIDE, NARROW])


@each_width
@pytest.mark.parametrize("few_documents", [False, True])
@every_set
def test_top_tokens_are_the_first_of_a_sort_that_the_repairs_let_through(
    collect: Collect, names: tuple[Repair, ...], few_documents: bool, width: int
) -> None:
    found = collect(*names, documents=TWO_DOCUMENTS) if few_documents else collect(*names)
    for neuron in range(NEURONS):
        expected: list[int] = []
        for position in found.ranked(width, neuron):
            silent = "no-filling" in names and found.codes[position, neuron] == 0
            known = "one-top-per-document" in names and found.document(position) in map(found.document, expected)
            if not silent and not known and len(expected) < TOP:
                expected.append(position)
        there = found.sampled(width, "top", neuron)
        assert there.tolist() == expected + [ABSENT] * (TOP - len(expected))


@each_width
@every_set
def test_each_interval_gives_distinct_tokens_of_its_ranks(
    collect: Collect, names: tuple[Repair, ...], width: int
) -> None:
    found = collect(*names)
    for neuron in range(NEURONS):
        order = found.ranked(width, neuron)
        if "positive-intervals" in names:
            order = [position for position in order if found.codes[position, neuron] > 0]
        bounds = rank_bounds(np.array(len(order)), width)
        drawn = found.sampled(width, "quantile", neuron).reshape(-1, PER_INTERVAL)
        for high, low, tokens in zip(bounds[:-1], bounds[1:], drawn, strict=True):
            chosen = tokens[tokens != ABSENT].tolist()
            assert len(set(chosen)) == len(chosen) == min(PER_INTERVAL, high - low)
            assert set(chosen) <= set(order[low:high])


@each_width
@every_set
def test_random_tokens_are_choosable_and_with_distinct_random_all_different_and_no_top_ones(
    collect: Collect, names: tuple[Repair, ...], width: int
) -> None:
    found = collect(*names)
    for neuron in range(NEURONS):
        chosen = found.sampled(width, "random", neuron).tolist()
        assert set(chosen) <= set(found.choosable(width).tolist())
        if "distinct-random" in names:
            assert len(set(chosen)) == RANDOM
            assert not set(chosen) & set(found.sampled(width, "top", neuron).tolist())


def bounds_of(found: Collected, width: int, position: int) -> tuple[int, int]:
    """The stretch of text around a token that its window may show, walked token by token."""
    read = set(found.read(width).tolist())

    def together(a: int, b: int) -> bool:
        if a not in read or b not in read:
            return False
        same = found.document(a) == found.document(b) and a // CONTEXT == b // CONTEXT
        return same or "clip-windows" not in found.repairs

    low, high = position, position + 1
    while low > position - width and together(low - 1, low):
        low -= 1
    while high < position + width and together(high - 1, high):
        high += 1
    return low, high


@each_width
@pytest.mark.parametrize("kind", KINDS)
@every_set
def test_windows_show_the_token_and_what_is_read_around_it(
    collect: Collect, names: tuple[Repair, ...], kind: str, width: int
) -> None:
    found = collect(*names)
    excerpts = found.records.excerpts(width, "all", kind)
    places = range(width) if "random-place" in names else (width // 2,)
    for neuron in range(0, NEURONS, 2):
        chosen = found.sampled(width, kind, neuron)
        for excerpt, position in zip(excerpts.of(neuron), chosen[chosen != ABSENT].tolist(), strict=True):
            low, high = bounds_of(found, width, position)
            possible = {(max(low, position - i), min(high, position - i + width)) for i in places}
            first, last = excerpt.position, excerpt.position + len(excerpt.tokens)
            assert (first, last) in possible
            assert excerpt.tokens.tolist() == list(range(first, last))
            assert np.array_equal(excerpt.activations, found.codes[first:last, neuron])
            assert excerpt.document == found.document(first)


@each_width
def test_with_random_place_the_sampled_token_stands_everywhere_equally_often(collect: Collect, width: int) -> None:
    found, places = collect("random-place"), dict[tuple[int, int], int]()
    for kind in KINDS:
        for neuron in range(NEURONS):
            for position, place in zip(
                found.sampled(width, kind, neuron), found.records.arrays[f"{width}.all.{kind}.sampled"][neuron],
                strict=True,
            ):  # fmt: skip
                if width <= position < READ[width] - width:
                    assert places.setdefault((neuron, int(position)), int(place)) == place
    counts = np.bincount(list(places.values()), minlength=width)
    expected = len(places) / width
    assert len(counts) == width
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


UNTOUCHED: dict[Repair, tuple[str, ...]] = {
    "one-top-per-document": ("random", "quantile"), "clip-windows": KINDS, "random-place": KINDS,
    "no-filling": ("random", "quantile"), "positive-intervals": ("top", "random"),
    "distinct-random": ("top", "quantile"),
}  # fmt: skip


@each_width
@pytest.mark.parametrize("name", UNTOUCHED)
def test_a_repair_leaves_the_other_draws_as_they_are(collect: Collect, name: Repair, width: int) -> None:
    """So that a difference between scores is the repair's, not that of other random tokens."""
    before, after = collect(), collect(name)
    for kind in UNTOUCHED[name]:
        for neuron in range(NEURONS):
            assert np.array_equal(before.sampled(width, kind, neuron), after.sampled(width, kind, neuron))


def test_each_repair_changes_something(collect: Collect) -> None:
    released = collect()
    for name in REPAIRS:
        repaired = collect(name).records.arrays
        assert any(not np.array_equal(array, repaired[key]) for key, array in released.records.arrays.items()), name


def test_distinct_random_tokens_are_uniform_among_those_that_are_not_top_ones() -> None:
    codes, repeats, counts = planted(600), 300, np.zeros((NEURONS, 600))
    read = Reading(
        blocks=np.arange(6) * CONTEXT, context=CONTEXT, documents=np.array([0, 600]),
        repairs=frozenset({"distinct-random"}),
    )  # fmt: skip
    for seed in range(repeats):
        layer = ReleasedLayer(NEURONS, NARROW, read, seed=(seed,), device=torch.device("cpu"))
        layer.count(torch.from_numpy(codes), 0)
        for neuron, chosen in enumerate(layer._top_and_random()[:, TOP:].numpy()):
            counts[neuron] += np.bincount(chosen, minlength=600)
    for neuron in range(NEURONS):
        top = np.argsort(-codes[:, neuron], kind="stable")[:TOP]
        chance = RANDOM / (600 - TOP)
        error = np.sqrt(repeats * chance * (1 - chance))
        assert not counts[neuron, top].any()
        assert (np.abs(np.delete(counts[neuron], top) - repeats * chance) < 5.5 * error).all()


def test_spread_blocks_reach_from_the_beginning_of_the_split_to_its_end_in_even_steps() -> None:
    bounds = np.array([0, 100_000_000])
    found = readings(bounds, available=100_000_000, context=1024, repairs={"spread-blocks"})
    for width, count in ((WIDE, 8000), (NARROW, 800)):
        blocks = found[width].blocks // 1024
        assert (len(blocks), blocks[0]) == (count, 0)
        assert set(np.diff(blocks)) <= {97656 // count - 1, 97656 // count, 97656 // count + 1, 97656 // count + 2}
        assert 97656 - blocks[-1] <= 97656 // count + 2
    assert set(found[NARROW].blocks) <= set(found[WIDE].blocks)
    few = readings(bounds, available=100_000_000, context=1024, max_tokens=20_000, repairs={"spread-blocks"})
    assert (few[WIDE].blocks // 1024).tolist() == [i * 97656 // 19 for i in range(19)]


def test_documents_read_are_those_with_a_token_in_a_block() -> None:
    starts = documents()
    sets: list[list[Repair]] = [[], ["spread-blocks"]]
    for names in sets:
        read = readings(np.array(starts), available=TOKENS, context=CONTEXT, max_tokens=2000, repairs=names)[WIDE]
        positions = read.blocks[:, None] + np.arange(CONTEXT)
        expected = np.unique(np.searchsorted(starts, positions.ravel(), side="right"))
        assert read.documents_read == len(expected)


def test_the_records_say_which_repairs_were_on_and_another_set_is_refused(tmp_path: Path) -> None:
    codes = planted(TOKENS)
    collect_planted(tmp_path / "run", codes, 8, repairs=frozenset({"random-place", "clip-windows"}))
    assert read_collection(tmp_path / "run", mode="compat")["repairs"] == ["clip-windows", "random-place"]
    collect_planted(tmp_path / "run", codes, 8, repairs=frozenset({"random-place", "clip-windows"}))
    for repairs in (frozenset[Repair](), frozenset[Repair]({"random-place"})):
        with pytest.raises(CrateError, match="compat records of other settings .repairs"):
            collect_planted(tmp_path / "run", codes, 8, repairs=repairs)
    collect_planted(tmp_path / "released", codes, 8)
    with pytest.raises(CrateError, match="compat records of other settings .repairs"):
        collect_planted(tmp_path / "released", codes, 8, repairs=frozenset({"random-place"}))


def test_too_few_choosable_tokens_are_refused(tmp_path: Path) -> None:
    repairs = frozenset[Repair]({"skip-first-tokens"})
    with pytest.raises(CrateError, match="192 tokens in whole blocks of 100 are too few"):
        collect_planted(tmp_path / "run", planted(TOKENS), 8, max_tokens=200, repairs=repairs)


def test_the_command_hands_repairs_on_and_refuses_them_for_fixed_records(tmp_path: Path) -> None:
    data = held_out_documents(tmp_path)
    run, _ = make_run(tmp_path / "run", data)
    chosen: tuple[Repair, ...] = ("no-filling", "clip-windows")
    assert message(options(run, data, repair=chosen)).startswith("--repair no-filling is for the released procedure")
    command.run(options(run, data, repair=chosen, mode="compat"))
    assert read_collection(run, mode="compat")["repairs"] == ["clip-windows", "no-filling"]
