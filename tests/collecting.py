"""A run of ours and the options of `cratelm collect`, for the tests of the command."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_tokens, random_model, tiny_config

from cratelm.commands import collect
from cratelm.commands.collect import Options
from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import save_model

CONTEXT = 128


def held_out_documents(folder: Path) -> TokenDirectory:
    """About 80 held-out documents, enough for 25 top excerpts from each half."""
    return make_tokens(folder / "tokens", np.random.default_rng(2), documents=260)


def make_run(folder: Path, data: TokenDirectory, seed: int = 0, **changes: Any) -> tuple[Path, LanguageModel]:
    """A run directory of ours around an untrained model."""
    config = tiny_config("gpt2", **{"context_length": CONTEXT, "vocab_size": data.vocab_size} | changes)
    model = random_model(config, np.random.default_rng(seed))
    save_model(model, folder / "model", data.tokenizer())
    return folder, model


def options(source: Path, data: TokenDirectory, **changes: Any) -> Options:
    return replace(Options(runs=(source,), data=data.path, device="cpu"), **changes)


def message(options_: Options) -> str:
    """What the command says when it refuses; always one line."""
    with pytest.raises(CrateError) as refused:
        collect.run(options_)
    text = str(refused.value)
    assert "\n" not in text
    return text


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}
