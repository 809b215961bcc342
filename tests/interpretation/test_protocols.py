"""Which excerpts each protocol draws: the counts of the paper's procedure, and nothing shared where it must not be."""

from pathlib import Path

import numpy as np
import pytest
from fixtures.synthetic import make_run

from cratelm.activations.records import ABSENT, Mode, read_records
from cratelm.errors import CrateError
from cratelm.interpretation.protocols import PROTOCOLS, Draw, draw, protocol

MODES: tuple[Mode, ...] = ("fixed", "compat")
COUNTS = {"top-and-random": (5, 10, 640), "random-only": (5, 5, 320), "anthropic": (42, 47, 326)}
"""Protocol -> excerpts explained from, excerpts scored on, tokens scored on."""


def widths(draws: tuple[Draw, ...]) -> list[int]:
    return [one.crop or one.width for one in draws for _ in one.picks]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_draws_as_many_excerpts_and_tokens_as_the_paper(name: str, mode: Mode) -> None:
    asked = protocol(name, mode)
    explained, scored = widths(asked.explain), widths(asked.score)
    assert (len(explained), len(scored), sum(scored)) == COUNTS[name]


def test_compat_draws_the_released_ranks() -> None:
    def picks(name: str, part: str) -> list[tuple]:
        draws = protocol(name, "compat").explain if part == "explain" else protocol(name, "compat").score
        return [(one.kind, one.picks) for one in draws]

    even, odd = (0, 2, 4, 6, 8), (1, 3, 5, 7, 9)
    assert picks("top-and-random", "explain") == picks("random-only", "explain") == [("top", even)]
    assert picks("top-and-random", "score") == [("random", even), ("top", odd)]
    assert picks("random-only", "score") == [("random", even)]
    first_two = tuple(20 * interval + item for interval in range(11) for item in (0, 1))
    next_two = tuple(20 * interval + item for interval in range(11) for item in (2, 3))
    assert picks("anthropic", "explain") == [
        ("top", tuple(range(15))),
        ("quantile", first_two),
        ("random", tuple(range(5))),
    ]
    assert picks("anthropic", "score") == [
        ("top", tuple(range(15, 25))),
        ("quantile", next_two),
        ("random", tuple(range(5, 10))),
        ("top", tuple(range(25, 35))),
    ]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_fixed_explains_and_scores_on_different_documents(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    records = read_records(make_run(tmp_path, rng, layers=1), 0)
    asked = protocol(name)
    explained, scored = draw(records, asked.explain, "explain"), draw(records, asked.score, "score")
    assert (explained.present.sum(axis=1)[4:] == len(widths(asked.explain))).all()
    assert (scored.present.sum(axis=1)[4:] == len(widths(asked.score))).all()
    for ours, theirs in zip(explained.document, scored.document, strict=True):
        assert not (set(ours) & set(theirs)) - {ABSENT}


@pytest.mark.parametrize("mode", MODES)
def test_an_excerpt_out_of_context_is_three_tokens_around_the_one_that_matters(
    mode: Mode, tmp_path: Path, rng: np.random.Generator
) -> None:
    records = read_records(make_run(tmp_path, rng, layers=1, mode=mode), 0, mode=mode)
    split, first_rank = ("score", 10) if mode == "fixed" else ("all", 25)
    whole, cut = records[5].excerpts[8, split, "top"], draw(records, protocol("anthropic", mode).score, "score")
    for rank, short in enumerate(list(cut.of(5))[-10:]):
        long = whole[first_rank + rank]
        strongest = int(long.activations.argmax())
        middle = min(max(strongest, 1), max(len(long.tokens) - 2, 1)) if mode == "fixed" else 4
        np.testing.assert_array_equal(short.tokens, long.tokens[middle - 1 : middle + 2])
        np.testing.assert_array_equal(short.activations, long.activations[middle - 1 : middle + 2])
        assert short.position == long.position + middle - 1
        if mode == "fixed":
            assert short.activations.max() == long.activations.max()


def test_top_needed_counts_the_ranks_that_are_drawn() -> None:
    assert protocol("top-and-random").top_needed("explain") == (64, 5)
    assert protocol("random-only").top_needed("score") == (64, 0)
    assert protocol("anthropic").top_needed("score") == (8, 20)


def test_an_unknown_protocol_is_refused_with_those_there_are() -> None:
    with pytest.raises(CrateError, match=r"no protocol 'tar'.*top-and-random, random-only, anthropic"):
        protocol("tar")
