"""The plan of a `fixed` collection: rows, windows and halves, against their definitions."""

import numpy as np
import pytest

from cratelm.activations.plan import Plan, make_plan, read_rows, split_documents
from cratelm.errors import CrateError

END = 0


def corpus(rng: np.random.Generator, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of these many tokens, each followed by END."""
    pieces = [np.append(rng.integers(1, 200, length), END) for length in lengths]
    return np.concatenate(pieces).astype(np.uint16), np.concatenate([[0], np.cumsum([len(p) for p in pieces])])


def windows_of(plan: Plan, width: int) -> list[tuple[int, int, int]]:
    """(document, first, last) of every window, in the corpus."""
    actual = []
    for row, count in enumerate(plan.windows(width)):
        length = plan.window_length(slice(row, row + 1), width)[0]
        for index in range(count):
            first = plan.row_position[row] + plan.warmup + index * width
            actual.append((int(plan.row_document[row]), int(first), int(first + length)))
    return actual


@pytest.mark.parametrize("width", [64, 8])
def test_windows_are_disjoint_and_lie_inside_one_document_without_its_end(rng: np.random.Generator, width: int) -> None:
    tokens, documents = corpus(rng, rng.integers(1, 900, 60).tolist())
    plan = make_plan(tokens, documents, context=200)
    covered = np.zeros(len(tokens), dtype=int)
    for document, first, last in windows_of(plan, width):
        assert documents[document] <= first < last <= documents[document + 1] - 1
        covered[first:last] += 1
    assert covered.max() == 1


def test_a_long_document_is_covered_except_its_first_tokens_and_less_than_one_window_at_its_end(
    rng: np.random.Generator,
) -> None:
    tokens, documents = corpus(rng, [1000])
    plan = make_plan(tokens, documents, context=256, warmup=4)
    first = min(window[1] for window in windows_of(plan, 64))
    last = max(window[2] for window in windows_of(plan, 64))
    assert first == 3  # with <|endoftext|> before it, the fourth token has four tokens of context
    assert 1000 - last < 64
    assert sum(b - a for _, a, b in windows_of(plan, 64)) == last - first


def test_a_short_document_gives_one_shorter_window_and_a_tiny_one_none(rng: np.random.Generator) -> None:
    tokens, documents = corpus(rng, [20, 5, 3, 300])
    plan = make_plan(tokens, documents, context=128, warmup=4)
    assert [window for window in windows_of(plan, 64) if window[0] == 0] == [(0, 3, 20)]
    assert [window for window in windows_of(plan, 64) if window[0] == 1] == [(1, 24, 26)]
    assert not [window for window in windows_of(plan, 64) if window[0] == 2]


def test_rows_hold_the_document_behind_its_end_of_text_and_fit_the_context(rng: np.random.Generator) -> None:
    tokens, documents = corpus(rng, [500, 90, 700])
    plan = make_plan(tokens, documents, context=150)
    assert plan.row_length.max() <= 150
    assert (np.diff(plan.row_length) <= 0).all(), "longest first"
    for row in range(len(plan.row_length)):
        position, length = plan.row_position[row : row + 1], int(plan.row_length[row])
        read = read_rows(tokens, position, length, END)[0]
        document = plan.row_document[row]
        expected = np.concatenate([[END], tokens[documents[document] : documents[document + 1] - 1]])
        start = int(position[0]) - documents[document] + 1
        assert read.tolist() == expected[start : start + length].tolist()


def test_halves_depend_on_content_and_seed_alone(rng: np.random.Generator) -> None:
    tokens, documents = corpus(rng, rng.integers(20, 60, 400).tolist())
    half = split_documents(tokens, documents, seed=1)
    assert 150 < half.sum() < 250
    assert not np.array_equal(half, split_documents(tokens, documents, seed=2))
    twice = np.concatenate([tokens, tokens])
    bounds = np.concatenate([documents, documents[1:] + len(tokens)])
    assert np.array_equal(split_documents(twice, bounds, seed=1), np.concatenate([half, half]))


def test_max_tokens_takes_the_first_whole_documents(rng: np.random.Generator) -> None:
    tokens, documents = corpus(rng, [100] * 10)
    plan = make_plan(tokens, documents, context=128, max_tokens=350)
    assert set(plan.row_document.tolist()) == {0, 1, 2}


def test_a_context_without_room_for_an_excerpt_is_refused(rng: np.random.Generator) -> None:
    tokens, documents = corpus(rng, [100])
    with pytest.raises(
        CrateError, match="context must be at least 68 tokens .an excerpt of 64 after 4 of warm-up., got 64"
    ):
        make_plan(tokens, documents, context=64)
