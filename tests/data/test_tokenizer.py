"""Tokenizers: GPT-2's known ids, training that repeats, hashes that mean sameness, tokens as a person reads them."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cratelm.data.special_tokens import end_of_text_id
from cratelm.data.text import Document, stream_documents
from cratelm.data.tokenizer import (
    END_OF_TEXT,
    LONGEST_WORD,
    _without_long_words,
    gpt2_bpe,
    load_tokenizer,
    token_bytes,
    token_strings,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)
from cratelm.errors import CrateError


@pytest.fixture(scope="module")
def gpt2(real_data: Path) -> Tokenizer:
    return gpt2_bpe(real_data / "gpt2")


def some_of_stdlib(count: int = 60) -> Iterator[Document]:
    return (document for document, _ in zip(stream_documents(["stdlib"]), range(count), strict=False))


def test_a_word_of_any_length_is_cut_and_ordinary_text_is_not(rng: np.random.Generator) -> None:
    word = "".join(map(chr, rng.integers(97, 123, size=200_000)))
    for text in (word, f"some {word[:5000]} text {' ' * 5000} and {'=' * 3001}", "漢" * 2500, "short words"):
        pieces = list(_without_long_words(text))
        assert "".join(pieces) == text
        words = [part for piece in pieces for part in pre_tokenizers.ByteLevel(False).pre_tokenize_str(piece)]
        assert max(end - start for _, (start, end) in words) <= LONGEST_WORD
    assert list(_without_long_words("a " * 5000)) == ["a " * 5000]
    started = time.process_time()
    assert train_bpe([Document(text=word, origin="")], 600).get_vocab_size() == 600
    assert time.process_time() - started < 20, "two hundred words of a thousand letters take a second"


def test_ctrl_c_interrupts_the_training_of_a_tokenizer() -> None:
    code = (
        "import os, random, signal, threading; from cratelm.data.text import Document\n"
        "from cratelm.data import tokenizer\n"
        "tokenizer.LONGEST_WORD = 1 << 30\n"
        "word = ''.join(random.choices('abcdefghij', k=1_000_000))\n"
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n    tokenizer.train_bpe([Document(text=word, origin='')], 5000)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "interrupted\n"), result.stderr


def test_ctrl_c_while_texts_are_read_waits_for_the_thread_that_reads_them() -> None:
    code = (
        "import os, signal, time; from cratelm.data.tokenizer import _interruptible\n"
        "def texts():\n"
        "    yield 'a text'\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.3)\n"
        "    yield 'another text'\n"
        "def work(texts):\n"
        "    try:\n        print(*texts)\n"
        "    finally:\n        time.sleep(0.1)\n        print('the thread ends')\n"
        "try:\n    _interruptible(work, texts())\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "the thread ends\ninterrupted\n"), result.stderr


def test_a_failure_while_the_texts_are_read_reaches_the_caller() -> None:
    def documents() -> Iterator[Document]:
        yield Document(text="a text", origin="")
        raise CrateError("a bad line")

    with pytest.raises(CrateError, match="a bad line"):
        train_bpe(documents(), 300)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe(some_of_stdlib(), 600)


def word_level() -> Tokenizer:
    return Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))


def test_gpt2_gives_the_known_ids(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello world").ids == [15496, 995]
    assert gpt2.encode("Hello, I'm a language model,").ids == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.encode(" 😀").ids == [30325, 222]
    assert end_of_text_id(gpt2) == 50256
    assert vocabulary_size(gpt2) == 50257


def test_gpt2_decodes_what_it_encoded(gpt2: Tokenizer, rng: np.random.Generator) -> None:
    text = "".join(chr(code) for code in rng.integers(1, 0xD7FF, size=300)) + "  \n\n x\t'll "
    assert gpt2.decode(gpt2.encode(text).ids) == text


def test_training_repeats_and_round_trips(trained: Tokenizer) -> None:
    again = train_bpe(some_of_stdlib(), 600)
    assert tokenizer_hash(again) == tokenizer_hash(trained)
    assert vocabulary_size(trained) == 600
    assert end_of_text_id(trained) == 0
    text = "def f(x):\n    return 'é漢😀'\r\n\x00"
    assert trained.decode(trained.encode(text).ids) == text


def test_the_hash_survives_storage_and_sees_any_change(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(str(tmp_path / "tokenizer.json"))
    same = load_tokenizer(tmp_path)
    same.enable_truncation(5)
    assert tokenizer_hash(same) == tokenizer_hash(trained)
    same.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert tokenizer_hash(same) != tokenizer_hash(trained)
    assert tokenizer_hash(train_bpe(some_of_stdlib(), 599)) != tokenizer_hash(trained)
    extended = load_tokenizer(tmp_path / "tokenizer.json")
    extended.add_tokens(["cratelm"])
    assert tokenizer_hash(extended) != tokenizer_hash(trained)


def test_both_pairs_of_gpt2_files_and_its_tokenizer_json_are_the_same_tokenizer(
    gpt2: Tokenizer, real_data: Path, tmp_path: Path
) -> None:
    shutil.copy(real_data / "gpt2" / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(real_data / "gpt2" / "vocab.bpe", tmp_path / "merges.txt")
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == tokenizer_hash(gpt2)
    gpt2.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == tokenizer_hash(gpt2)


def test_token_strings_show_text_and_legible_bytes(gpt2: Tokenizer) -> None:
    strings = token_strings(gpt2)
    assert strings[995] == " world"
    assert strings[198] == "\n"
    assert strings[50256] == END_OF_TEXT
    assert "".join(strings[index] for index in gpt2.encode("漢").ids) == "\\xe6\\xbc\\xa2"
    known = gpt2.get_vocab()
    assert [strings[known[token]] for token in ("Ġthe", "ĉ", "âĢ", "Ã©", "Ġ")] == [" the", "\t", "\\xe2\\x80", "é", " "]
    # The few left are the replacement character itself, spelled out in the text that GPT-2 learnt from.
    assert [string for string in strings if "\ufffd" in string] == [
        string.decode() for string in token_bytes(gpt2) if "\ufffd".encode() in string
    ]
    assert not any("Ġ" in string for string in strings)


def test_token_bytes_joined_are_the_text(gpt2: Tokenizer, trained: Tokenizer, rng: np.random.Generator) -> None:
    text = "".join(chr(code) for code in rng.integers(1, 0xD7FF, size=500)) + " and words"
    for tokenizer in (gpt2, trained):
        pieces = token_bytes(tokenizer)
        assert b"".join(pieces[index] for index in tokenizer.encode(text).ids) == text.encode()


def test_token_strings_of_a_sentencepiece_like_tokenizer_keep_the_space() -> None:
    vocab = {"<unk>": 0, "▁a": 1, "b": 2, "<0xE2>": 3, "<0x41>": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>"])
    assert token_strings(tokenizer) == ["<unk>", " a", "b", "\\xe2", "A"]


def test_an_id_without_a_token_has_an_empty_string() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a"))
    assert token_strings(tokenizer) == ["a", "", "", "b"]


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    tokenizer = word_level()
    tokenizer.add_special_tokens(["<s>"])
    with pytest.raises(CrateError, match=r"has no <\|endoftext\|>.*\(special tokens: <s>\).*--end-token"):
        end_of_text_id(tokenizer)


@pytest.mark.parametrize("end", ["<|end_of_text|>", "</s>", "<eos>"])
def test_another_family_ends_a_text_with_its_own_special_token(end: str) -> None:
    tokenizer = word_level()
    tokenizer.add_special_tokens(["<s>", end])
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id(end)
    tokenizer.add_special_tokens([END_OF_TEXT])
    assert end_of_text_id(tokenizer) == tokenizer.token_to_id(END_OF_TEXT)


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(CrateError, match="a vocabulary of 256 is too small"):
        train_bpe([], 256)


def test_a_file_that_is_not_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CrateError, match=r"tokenizer.json is not a readable tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(CrateError, match=r"no.such.json does not exist"):
        load_tokenizer(str(tmp_path / "no.such.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CrateError, match=r"has no GPT-2 tokenizer. It needs encoder.json \+ vocab.bpe or vocab.json"):
        load_tokenizer(tmp_path / "empty")


def test_broken_gpt2_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text(json.dumps({"a": 0, "b": 1}))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na b\n")
    with pytest.raises(CrateError, match="vocab.bpe joins a b, which"):
        gpt2_bpe(tmp_path)
    (tmp_path / "encoder.json").write_text('{"a": ')
    with pytest.raises(CrateError, match="encoder.json is not readable JSON"):
        gpt2_bpe(tmp_path)


def test_a_hub_name_offline_says_what_to_give_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CrateError, match=r"tokenizer gpt2 is not a local file and could not be fetched .* bpe:4096"):
        load_tokenizer("gpt2")
