"""Token directories: exact contents, exchange with nanoGPT, bounded memory, and a message for each kind of damage."""

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from cratelm.commands import tokenize as command
from cratelm.data import shards
from cratelm.data.shards import dtype_for, split_of
from cratelm.data.text import Document, stream_documents
from cratelm.data.tokenizer import END_OF_TEXT, gpt2_bpe, train_bpe
from cratelm.data.tokens import TokenDirectory, sample_batch, tokenize
from cratelm.errors import CrateError
from cratelm.rundir import write_json

WORDS = ["the ", "neuron", " fires", "\n\n", "  ", "漢字", "😀", "don't", "12,5", END_OF_TEXT, "<|", "é", "\t"]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([Document(text=" ".join(WORDS) * 3, origin="")], 300)


@pytest.fixture
def corpus(tmp_path: Path, rng: np.random.Generator) -> tuple[str, list[str]]:
    """A .jsonl of 80 random documents, and their texts."""
    texts = ["x" + "".join(rng.choice(WORDS, size=size)) for size in rng.integers(0, 60, size=80)]
    return jsonl(tmp_path / "corpus.jsonl", texts), texts


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def plain_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Reference: whole texts, one after the other, the special token's spelling as the letters it is."""
    ordinary = Tokenizer.from_str(tokenizer.to_str())
    ordinary.encode_special_tokens = True
    return [ordinary.encode(text, add_special_tokens=False).ids for text in texts]


def test_the_shards_hold_every_document_in_order(tmp_path: Path, bpe: Tokenizer, corpus: tuple[str, list[str]]) -> None:
    source, texts = corpus
    directory = tokenize([source], tmp_path / "out", bpe, held_out=0.3, test=0.2, seed=5)
    for name in ("train", "val", "test"):
        mine = [text for text in texts if split_of(text, seed=5, shares={"val": 0.3, "test": 0.2}) == name]
        tokens, offsets = directory.tokens(name), directory.documents(name)
        actual = [tokens[start:stop].tolist() for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
        assert actual == [[*ids, 0] for ids in plain_ids(bpe, mine)]
        assert [bpe.decode(ids[:-1], skip_special_tokens=False) for ids in actual] == mine
        split = directory.splits[name]
        assert (split.tokens, split.documents) == (len(tokens), len(mine))
        assert directory.text_bytes(name) == sum(len(text.encode()) for text in mine)
        assert split.sha256 == hashlib.sha256((tmp_path / "out" / f"{name}.bin").read_bytes()).hexdigest()
    assert TokenDirectory.open(tmp_path / "out") == directory


def test_the_number_of_workers_does_not_change_the_files(
    tmp_path: Path, bpe: Tokenizer, corpus: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 500)
    one = tokenize([corpus[0]], tmp_path / "one", bpe, held_out=0.2, workers=1)
    three = tokenize([corpus[0]], tmp_path / "three", bpe, held_out=0.2, workers=3)
    assert one.splits == three.splits


def test_spelled_out_end_of_text_never_becomes_the_token(tmp_path: Path, bpe: Tokenizer) -> None:
    source = jsonl(tmp_path / "a.jsonl", [END_OF_TEXT, f"a{END_OF_TEXT}{END_OF_TEXT} b", f" {END_OF_TEXT}\n"])
    tokens = tokenize([source], tmp_path / "out", bpe, held_out=0.0).tokens("train")
    assert np.count_nonzero(tokens == 0) == 3
    expected = f"{END_OF_TEXT}a{END_OF_TEXT}{END_OF_TEXT} b {END_OF_TEXT}\n"
    assert bpe.decode(tokens[tokens != 0].tolist()) == expected


def test_cutting_a_long_document_does_not_change_its_tokens(
    tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = gpt2_bpe(real_data / "gpt2")
    text = (real_data / "eval" / "wikitext2-valid.txt").read_text(encoding="utf-8")[:200_000]
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 5_000)
    tokens = tokenize([str(tmp_path / "long.txt")], tmp_path / "out", gpt2, held_out=0.0).tokens("train")
    assert tokens.tolist() == [*gpt2.encode(text).ids, 50256]


def test_a_document_without_a_place_to_cut_is_still_whole(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 5_000)
    (tmp_path / "long.txt").write_text("0" * 12_345)
    tokens = tokenize([str(tmp_path / "long.txt")], tmp_path / "out", bpe, held_out=0.0).tokens("train")
    assert bpe.decode(tokens[:-1].tolist()) == "0" * 12_345
    assert np.flatnonzero(tokens == 0).tolist() == [len(tokens) - 1]


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_BATCH_CHARACTERS", 1 << 14)
    line = json.dumps({"text": "the neuron fires " * 200}) + "\n"
    peaks = []
    for count in (100, 1000):
        (tmp_path / f"{count}.jsonl").write_text(line * count)
        tracemalloc.start()
        tokenize([str(tmp_path / f"{count}.jsonl")], tmp_path / f"out{count}", bpe, held_out=0.0, workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_copies_of_a_document_fall_on_one_side_and_shares_are_kept(rng: np.random.Generator) -> None:
    shares, seed = {"val": 0.2, "test": 0.1}, int(rng.integers(1 << 31))
    actual = [split_of(str(index), seed=seed, shares=shares) for index in range(4000)]
    assert actual == [split_of(str(index), seed=seed, shares=shares) for index in range(4000)]
    assert actual != [split_of(str(index), seed=seed + 1, shares=shares) for index in range(4000)]
    assert abs(actual.count("val") / 4000 - 0.2) < 0.04
    assert abs(actual.count("test") / 4000 - 0.1) < 0.03


def test_a_bpe_is_trained_on_the_training_split_alone(tmp_path: Path, rng: np.random.Generator) -> None:
    texts = [f"document {number} " * 5 for number in rng.integers(1 << 40, size=30)]
    directory = tokenize([jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", "bpe:280", held_out=0.5)
    mine = [text for text in texts if split_of(text, seed=0, shares={"val": 0.5}) == "train"]
    expected = train_bpe([Document(text=text, origin="") for text in mine], 280)
    assert directory.tokenizer().get_vocab() == expected.get_vocab()
    assert expected.get_vocab() != train_bpe([Document(text=text, origin="") for text in texts], 280).get_vocab()


def test_the_same_call_again_changes_nothing_and_another_is_refused(
    tmp_path: Path, bpe: Tokenizer, corpus: tuple[str, list[str]]
) -> None:
    out = tmp_path / "out"
    first = tokenize([corpus[0]], out, "bpe:300", held_out=0.2)
    written = (out / "tokens.json").stat().st_mtime_ns
    assert tokenize([corpus[0]], out, "bpe:300", held_out=0.2) == first
    assert (out / "tokens.json").stat().st_mtime_ns == written
    with pytest.raises(CrateError, match=r"has other tokens \(held_out 0.2 -> 0.3, seed 0 -> 1\)"):
        tokenize([corpus[0]], out, "bpe:300", held_out=0.3, seed=1)
    with pytest.raises(CrateError, match=r"has other tokens \(tokenizer "):
        tokenize([corpus[0]], out, bpe, held_out=0.2)
    with open(corpus[0], "a") as file:
        file.write("\n")
    with pytest.raises(CrateError, match=r"has other tokens \(files "):
        tokenize([corpus[0]], out, "bpe:300", held_out=0.2)


def test_a_folder_of_something_else_is_not_touched(
    tmp_path: Path, bpe: Tokenizer, corpus: tuple[str, list[str]]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(CrateError, match="mine exists and is not a token directory"):
        tokenize([corpus[0]], tmp_path / "mine", bpe, held_out=0.2)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize(
    ("content", "expected_message"), [(b'{"text": "a"}\n{"tex', ":2: broken JSON"), (b'{"text": "a"}', "empty")]
)
@pytest.mark.parametrize("tokenizer", ["bpe:280", None])
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, bpe: Tokenizer, content: bytes, expected_message: str, tokenizer: str | None
) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CrateError, match=expected_message):
        tokenize([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer or bpe, held_out=0.0000001)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_empty_split_says_how_many_documents_there_were(tmp_path: Path, bpe: Tokenizer) -> None:
    source = jsonl(tmp_path / "a.jsonl", ["one", "two"])
    with pytest.raises(CrateError, match=r"split val is empty: 2 documents, shares 1e-09 for val. Give more documents"):
        tokenize([source], tmp_path / "out", bpe, held_out=1e-9)
    with pytest.raises(CrateError, match="must be at least 0 and below 1 together"):
        tokenize([source], tmp_path / "out", bpe, held_out=0.6, test=0.4)


def test_a_missing_source_is_reported_before_the_tokenizer_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(CrateError, match="source nowhere does not exist"):
        tokenize(["nowhere"], tmp_path / "out", "no-such/tokenizer", held_out=0.1)
    with pytest.raises(CrateError, match="no source of text was given"):
        tokenize([], tmp_path / "out", "no-such/tokenizer", held_out=0.1)
    source = jsonl(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(CrateError, match="needs a vocabulary size, got bpe:large"):
        tokenize([source], tmp_path / "out", "bpe:large", held_out=0.1)


def test_skipped_documents_are_counted_with_their_origins(tmp_path: Path, bpe: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + b"broken\n" * 25 + b'{"text": "b"}\n')
    directory = tokenize([str(tmp_path / "a.jsonl")], tmp_path / "out", bpe, held_out=0.0, skip_bad=True)
    assert directory.source["skipped"] == 25
    assert len(directory.source["skipped_origins"]) == 20
    assert "a.jsonl:2: broken JSON" in directory.source["skipped_origins"][0]
    assert directory.splits["train"].documents == 2


def test_a_vocabulary_past_65536_is_written_in_uint32(tmp_path: Path) -> None:
    large = train_bpe([Document(text="text", origin="")], 257)
    large.add_tokens([f"word{index}" for index in range(66_000)])
    source = jsonl(tmp_path / "a.jsonl", ["word65999", "text"])
    directory = tokenize([source], tmp_path / "out", large, held_out=0.0)
    assert directory.dtype == "uint32"
    assert np.fromfile(tmp_path / "out" / "train.bin", dtype="<u4")[0] == directory.vocab_size - 1 > 65_536
    assert (dtype_for(65_536), dtype_for(65_537)) == ("uint16", "uint32")


@pytest.fixture
def made(tmp_path: Path, bpe: Tokenizer, corpus: tuple[str, list[str]]) -> Path:
    return tokenize([corpus[0]], tmp_path / "out", bpe, held_out=0.2).path


def rewrite(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / "tokens.json").read_text())
    write_json(folder / "tokens.json", value | changes)


def test_damaged_shards_are_refused(made: Path) -> None:
    data = (made / "val.bin").read_bytes()
    (made / "val.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    directory = TokenDirectory.open(made)
    directory.tokens("train")
    with pytest.raises(CrateError, match=r"val.bin is damaged or was changed: its sha256 must be .*--no-verify"):
        directory.tokens("val")
    (made / "val.bin").write_bytes(data[:-2])
    with pytest.raises(CrateError, match=rf"val.bin must have {len(data)} bytes .* got {len(data) - 2}"):
        TokenDirectory.open(made)
    (made / "val.bin").unlink()
    with pytest.raises(CrateError, match=r"val.bin is missing"):
        TokenDirectory.open(made)


def test_a_wrong_description_is_refused(made: Path) -> None:
    with pytest.raises(CrateError, match=r"has no split test \(found: train, val\)"):
        TokenDirectory.open(made).tokens("test")
    damages: list[tuple[dict[str, Any], str]] = [
        ({"dtype": "uint32"}, r"train.bin must have .* bytes"),
        ({"dtype": "int16"}, r"says dtype int16, but a vocabulary of 300 needs uint16"),
        ({"vocab_size": 70_000}, r"says dtype uint16, but a vocabulary of 70000 needs uint32"),
        ({"splits": {"train": {"tokens": 3}}}, r"lacks or misspells a field"),
        ({"format_version": 99}, r"has format version 99"),
    ]
    for changes, expected_message in damages:
        before = (made / "tokens.json").read_text()
        rewrite(made, **changes)
        with pytest.raises(CrateError, match=expected_message):
            TokenDirectory.open(made)
        (made / "tokens.json").write_text(before)


def test_another_tokenizer_is_refused(made: Path, tmp_path: Path) -> None:
    other = train_bpe([Document(text="other text other text", origin="")], 260)
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CrateError, match="has another tokenizer than"):
        TokenDirectory.open(made, tokenizer=str(tmp_path / "tokenizer.json"))
    other.save(str(made / "tokenizer.json"))
    with pytest.raises(CrateError, match=r"is not the tokenizer that made the tokens"):
        TokenDirectory.open(made).tokenizer()
    (made / "tokenizer.json").unlink()
    with pytest.raises(CrateError, match=r"tokenizer.json is missing"):
        TokenDirectory.open(made).tokenizer()


def test_a_batch_is_windows_of_the_stream_shifted_by_one(rng: np.random.Generator) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    inputs, targets = sample_batch(tokens, seed=int(rng.integers(1 << 31)), step=3, rows=range(64), context=16)
    assert inputs.shape == targets.shape == (64, 16)
    assert (targets == inputs + 1).all()
    assert (np.diff(inputs, axis=1) == 1).all()
    assert len(np.unique(inputs[:, 0])) > 50


def test_a_row_depends_on_seed_step_and_row_alone(rng: np.random.Generator) -> None:
    tokens, seed = rng.integers(0, 60_000, size=5000).astype(np.uint16), int(rng.integers(1 << 31))
    whole, _ = sample_batch(tokens, seed=seed, step=7, rows=range(12), context=8)
    parts = [sample_batch(tokens, seed=seed, step=7, rows=range(r, r + 3), context=8)[0] for r in range(0, 12, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    striped, _ = sample_batch(tokens, seed=seed, step=7, rows=range(1, 12, 4), context=8)
    np.testing.assert_array_equal(striped, whole[1::4])
    for other in ({"seed": seed + 1, "step": 7}, {"seed": seed, "step": 8}):
        assert (sample_batch(tokens, **other, rows=range(12), context=8)[0] != whole).any(axis=1).sum() >= 11


def test_offsets_are_uniform_and_reach_both_ends(rng: np.random.Generator) -> None:
    tokens, seed = np.arange(20, dtype=np.uint32), int(rng.integers(1 << 31))
    starts = np.concatenate(
        [sample_batch(tokens, seed=seed, step=step, rows=range(50), context=10)[0][:, 0] for step in range(200)]
    )
    counts = np.bincount(starts, minlength=10)
    assert len(counts) == 10
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi squared with 9 degrees of freedom: 1 in a million


def test_too_few_tokens_for_the_context_are_refused() -> None:
    tokens = np.arange(9, dtype=np.uint16)
    assert sample_batch(tokens, seed=0, step=0, rows=range(2), context=8)[1][0, -1] == 8
    with pytest.raises(CrateError, match="a context of 9 needs at least 10 tokens, got 9"):
        sample_batch(tokens, seed=0, step=0, rows=range(2), context=9)


def test_the_command_prints_what_it_wrote(
    tmp_path: Path, corpus: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = command.Options(sources=(corpus[0],), out=tmp_path / "out", tokenizer="bpe:280", held_out=0.4)
    command.run(options)
    split = TokenDirectory.open(tmp_path / "out").splits["val"]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["val", f"{split.documents}", f"{split.tokens:,}", f"{split.text_bytes:,}"] in [row[:4] for row in rows]


def test_nanogpt_reads_our_shards_and_we_read_its(tmp_path: Path, real_data: Path) -> None:
    gpt2 = gpt2_bpe(real_data / "gpt2")
    documents = stream_documents([str(real_data / "minipile" / "test.jsonl.zst")])
    texts = [document.text for document in documents if len(document.text) < 6000][:20]
    ours = tokenize([jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "ours", gpt2, held_out=0.0)
    expected = [token for ids in plain_ids(gpt2, texts) for token in [*ids, 50256]]
    assert np.memmap(tmp_path / "ours" / "train.bin", dtype=np.uint16, mode="r").tolist() == expected

    (tmp_path / "theirs").mkdir()
    np.array(expected[:-1], dtype=np.uint16).tofile(tmp_path / "theirs" / "train.bin")
    theirs = TokenDirectory.open(tmp_path / "theirs", tokenizer=str(real_data / "gpt2"))
    assert theirs.tokenizer_hash == ours.tokenizer_hash
    assert theirs.text_bytes("train") == ours.text_bytes("train") == sum(len(text.encode()) for text in texts)
    assert theirs.documents("train")[:-1].tolist() == ours.documents("train")[:-1].tolist()
    assert theirs.documents("train")[-1] == len(expected) - 1
    assert theirs.tokenizer().encode("Hello world").ids == [15496, 995]
