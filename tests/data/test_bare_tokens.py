"""Token folders as nanoGPT writes them, without a tokens.json."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from cratelm.data.text import Document
from cratelm.data.tokenizer import train_bpe
from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([Document(text="some text in a file " * 9, origin="")], 300)


def test_tokens_of_letters_by_nanogpt_get_the_command_that_tokenizes_them_again(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(b"")
    np.arange(65, dtype=np.uint16).tofile(tmp_path / "train.bin")
    for named in (None, "gpt2"):
        with pytest.raises(
            CrateError, match=rf"Hint: .* cratelm tokenize {tmp_path}/input.txt --tokenizer bpe:512 --out"
        ):
            TokenDirectory.open(tmp_path, tokenizer=named)


def test_a_bare_folder_needs_its_tokenizer_and_ids_inside_it(tmp_path: Path, bpe: Tokenizer) -> None:
    bpe.save(str(tmp_path / "tokenizer.json"))
    np.array([5, 6, 400, 0], dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(CrateError, match=r"has no tokens.json, so --tokenizer is needed"):
        TokenDirectory.open(tmp_path)
    directory = TokenDirectory.open(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(CrateError, match=r"train.bin: id 400 at token 2 is outside the vocabulary of \d+"):
        directory.documents("train")
    (tmp_path / "train.bin").write_bytes(b"odd")
    with pytest.raises(CrateError, match="holds 3 bytes, not a whole number of uint16 ids"):
        TokenDirectory.open(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(CrateError, match=r"is not a token directory \(no tokens.json, no train.bin\)"):
        TokenDirectory.open(tmp_path / "nowhere")
