"""The loss of a Hugging Face model on the text it is to be recorded on, next to that of a unigram model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.collecting import held_out_documents, message, options
from fixtures.dense_families import BOS, build_dense, save_with_beginning
from fixtures.hugging_face import build, save

from cratelm.activations.causal_model import causal_model
from cratelm.activations.subject import Corpus
from cratelm.activations.text_loss import loss_on
from cratelm.commands import collect
from cratelm.data.tokens import TokenDirectory, tokenize
from cratelm.workflows.opening import open_model
from cratelm.workflows.token_data import open_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    return held_out_documents(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def with_bos(data: TokenDirectory, tmp_path_factory: pytest.TempPathFactory) -> TokenDirectory:
    """The same documents by a tokenizer that has a beginning-of-text token."""
    tokenizer = data.tokenizer()
    tokenizer.add_special_tokens([BOS])
    source = str(data.path.with_suffix(".jsonl"))
    return tokenize([source], tmp_path_factory.mktemp("bos") / "tokens", tokenizer, held_out=0.3)


def test_both_losses_are_those_of_the_first_tokens(data: TokenDirectory, rng: np.random.Generator) -> None:
    model = build("llama", rng, vocab=data.vocab_size)
    corpus = Corpus(
        tokens=data.tokens("val"), documents=data.documents("val"), end_of_text=data.end_of_text, identity={}
    )
    result = loss_on(causal_model(model), corpus, (3, 4))
    nats, unigram = [], []
    frequency = np.bincount(corpus.tokens, minlength=data.vocab_size) / len(corpus.tokens)
    for start, end in zip(corpus.documents[:-1], corpus.documents[1:], strict=True):
        row = corpus.tokens[start : min(end - 1, start + 126)].astype(np.int64)
        with torch.no_grad():
            logits = model(torch.tensor([[3, 4, *row[:-1]]])).logits[0, 2:]
        nats += F.cross_entropy(logits, torch.from_numpy(row[1:]), reduction="none").tolist()
        unigram += (-np.log(frequency[row[1:]])).tolist()
        if len(nats) >= 1024:
            break
    assert result.tokens == len(nats)
    assert result.model == pytest.approx(np.mean(nats), rel=1e-4)
    assert result.unigram == pytest.approx(np.mean(unigram))


def test_a_model_that_predicts_worse_than_token_frequencies_is_refused_unless_forced(
    data: TokenDirectory, rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(build("llama", rng, vocab=data.vocab_size), tmp_path / "model", data.path / "tokenizer.json")
    text = message(options(folder, data, out=tmp_path / "run", layer=(0,), force=False))
    assert "must be below" in text
    assert "unigram model, got" in text
    assert "--force" in text
    assert not (tmp_path / "run" / "records").exists()
    collect.run(options(folder, data, out=tmp_path / "run", layer=(0,)))
    assert "nats per token, of a unigram model" in capsys.readouterr().err
    collect.run(options(tmp_path / "run", data, layer=(1,), tap="residual", force=False))  # checked before


def train_to_need(bos: int, model: Any, data: TokenDirectory) -> None:
    """Train a model to predict the text after its beginning token, and to predict noise without it."""
    torch.manual_seed(0)
    stream = torch.from_numpy(np.asarray(data.tokens("train")).astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        starts = torch.randint(len(stream) - 40, (8,))
        rows = stream[starts[:, None] + torch.arange(40)]
        noise = torch.randint(data.vocab_size, rows.shape)
        first = torch.full((8, 1), bos)
        right = model(torch.cat([first, rows[:, :-1]], 1)).logits
        wrong = model(rows[:, :-1]).logits
        loss = F.cross_entropy(right.flatten(0, 1), rows.flatten()) + F.cross_entropy(
            wrong.flatten(0, 1), noise[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.slow
def test_a_gemma_without_its_beginning_token_is_refused_and_the_hint_names_the_token(
    with_bos: TokenDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(5)
    model = build_dense("gemma3", rng, vocab=with_bos.vocab_size)
    bos = with_bos.begin_of_text or with_bos.tokenizer().token_to_id(BOS)
    assert isinstance(bos, int)
    train_to_need(bos, model, with_bos)
    right = save_with_beginning("gemma3", model, tmp_path / "right", with_bos.tokenizer())
    collect.run(options(right, with_bos, out=tmp_path / "run", layer=(0,), force=False))
    corpus, _ = open_corpus(open_model(right, "cpu"), with_bos.path, "val")
    causal = open_model(right, "cpu").causal
    with_token, without = loss_on(causal, corpus, (bos,)), loss_on(causal, corpus, ())
    assert with_token.model < with_token.unigram < without.model - 0.2
    broken = save_with_beginning("qwen2", model, tmp_path / "broken", with_bos.tokenizer())
    text = message(options(broken, with_bos, out=tmp_path / "other", layer=(0,), force=False))
    assert f"lower with {BOS} before each row: tokenize with --begin-token" in text
    capsys.readouterr()
