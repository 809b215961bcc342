"""File names that `tokenize` meets: any spelling of a folder, any bytes."""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cratelm.data.text import Document
from cratelm.data.tokenizer import train_bpe
from cratelm.data.tokens import tokenize
from cratelm.errors import CrateError


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([Document(text="some text in a file", origin="")], 280)


def test_the_same_folder_under_another_spelling_is_made_already(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(20):
        Path("texts", f"{number}.txt").write_text(f"text {number}")
    first = tokenize(["texts/"], Path("out"), bpe, held_out=0.2)
    for spelling in ("texts", "./texts", "texts//", str(tmp_path / "texts")):
        assert tokenize([spelling], Path("out"), bpe, held_out=0.2) == first
    Path("texts", "0.txt").write_text("changed")
    with pytest.raises(CrateError, match=r"has other tokens \(files "):
        tokenize(["texts"], Path("out"), bpe, held_out=0.2)


def test_file_names_of_any_bytes_are_read_and_recorded(tmp_path: Path, bpe: Tokenizer) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    for number in range(20):
        Path(os.fsdecode(os.path.join(folder, b"%d \xe9\n[x].txt" % number))).write_text(f"text {number}")
    bad = os.fsdecode(os.path.join(folder, b"bad\xe9.txt"))
    Path(bad).write_bytes(b"\xff")
    source = os.fsdecode(folder)
    made = tokenize([source], tmp_path / "out", bpe, held_out=0.2, skip_bad=True)
    assert sum(split.documents or 0 for split in made.splits.values()) == 20
    assert made.source["settings"]["sources"] == [source]
    assert made.source["skipped_origins"] == [f"{bad}: byte 0xff at position 0 (line 1) is not utf-8"]
    assert tokenize([source], tmp_path / "out", bpe, held_out=0.2, skip_bad=True) == made
