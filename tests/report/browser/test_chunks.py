"""What a chunk of the browser holds and how it is written, and the index that a search reads."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cratelm.report.browser.chunks import as_script, pack, pack_sparse, read_script, unpack
from cratelm.report.browser.search_index import SearchIndex, as_term


def unpack_sparse(text: str, length: int) -> np.ndarray:
    content = base64.b64decode(text)
    there = np.unpackbits(np.frombuffer(content[: -(-length // 8)], np.uint8))[:length].astype(bool)
    values = np.zeros(length, np.float32)
    values[there] = np.frombuffer(content[-(-length // 8) :], "<f4")
    return values


@pytest.mark.parametrize(
    "value",
    [
        {"text": "</script><!-- <script>alert(1)</script>"}, {"text": "\u2028\u2029\\'\"\\\\'"},
        {"__proto__": {"x": 1}}, {"text": "\ud800 half"}, {"text": "\x00\x1f\n"},
        {"text": "café → 日本 \U0001f600"}, {"": [None, 1.5, -3, True]},
    ],
)  # fmt: skip
def test_a_chunk_brings_back_any_value_and_holds_no_markup(value: dict[str, Any], tmp_path: Path) -> None:
    content = as_script("m0/t0/l1/neurons-2", value)
    assert content.startswith(b"cratelmChunk('m0/t0/l1/neurons-2','")
    assert not set(b"<>&") & set(content)
    assert content.count(b"\n") == 1
    assert "\u2028" not in content.decode()
    (tmp_path / "chunk.js").write_bytes(content)
    assert read_script(tmp_path / "chunk.js") == {"format_version": 1, **value}


@pytest.mark.parametrize("name", ["../x", "a b", "a'b", "x.js", "é"])
def test_a_chunk_has_no_name_but_of_our_own_words(name: str) -> None:
    with pytest.raises(AssertionError):
        as_script(name, {})


def test_packed_numbers_come_back_exactly(rng: np.random.Generator) -> None:
    values = (rng.normal(size=100) * (rng.random(100) < 0.4)).astype(np.float32)
    assert np.array_equal(unpack(pack(values, "f32")), values)
    for length in (1, 7, 8, 9, 64):
        assert np.array_equal(unpack_sparse(pack_sparse(values[:length]), length), values[:length])


def test_the_index_finds_what_a_scan_of_all_terms_finds(rng: np.random.Generator) -> None:
    index = SearchIndex()
    words = ["".join(rng.choice(list("abé\U0001f600ß "), size=rng.integers(1, 5))) for _ in range(400)]
    holders: dict[str, set[int]] = {}
    for place in range(2):
        tokens = [[str(word) for word in rng.choice(words, size=3)] for _ in range(50)]
        index.add(place, {"start": 0, "tokens": tokens, "texts": [[]] * 50}, [0.5] * 50, [])
        for neuron, own in enumerate(tokens):
            for token in own:
                holders.setdefault(as_term(token), set()).add((place << 20) | neuron)
    chunks = list(index.chunks())
    terms = [term for chunk in chunks for term in chunk["terms"]]
    assert terms == sorted(terms, key=lambda term: term.encode("utf-16-be"))
    found = {
        term: set(unpack(packed).tolist())
        for chunk in chunks
        for term, packed in zip(chunk["terms"], chunk["neurons"], strict=True)
    }
    assert found == {term: neurons for term, neurons in holders.items() if term}


def test_better_matches_come_first_and_long_lists_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cratelm.report.browser.search_index.MOST_NEURONS", 3)
    index = SearchIndex()
    tokens = [[" the"], [" The"], ["x", "the"], ["y"]]
    texts = [[], [], [], [['the "the" word', [0]]]]
    index.add(5, {"start": 0, "tokens": tokens, "texts": texts}, [0.1, 0.9, float("nan"), 0.99], ["an-llm"])
    [chunk] = index.chunks()
    place = chunk["terms"].index("the")
    assert (unpack(chunk["neurons"][place]) & 0xFFFFF).tolist() == [1, 0, 2]
    assert chunk["totals"][place] == 4
    assert "word" in chunk["terms"]
