"""Held-out loss against a brute-force computation in float64, and the command around it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import hidden_bar, make_tokens, random_model, tiny_config
from safetensors.numpy import load_file

from cratelm import cli
from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import load_model, save_model
from cratelm.report.results.loss import DOCUMENTS, read_loss
from cratelm.rundir import claim
from cratelm.runtime import ProgressBar
from cratelm.training.evaluate import Evaluation, document_losses, held_out_loss, summarise

Stream = tuple[LanguageModel, np.ndarray, np.ndarray]


@pytest.fixture
def stream(rng: np.random.Generator) -> Stream:
    """A model, some 500 tokens, and where their 23 documents begin and end; some are longer than the context."""
    model = random_model(tiny_config(rng.choice(["crate", "gpt2"]), context_length=8), rng)
    documents = np.concatenate([[0], np.cumsum(rng.integers(1, 45, size=23))])
    return model, rng.integers(272, size=documents[-1]).astype(np.uint16), documents


def brute_losses(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Loss of each token but the first, from the tokens that precede it in its sequence, one at a time."""
    model = model.double()
    losses = []
    for position in range(1, len(tokens)):
        start = (position - 1) // 8 * 8
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[start:position].astype(np.int64))[None])[0, -1].numpy()
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[position]])
    model.float()
    return np.array(losses)


def evaluate(*text: Any, text_bytes: int, batch: int, bar: ProgressBar) -> Evaluation:
    return summarise(document_losses(*text, batch=batch, bar=bar), text_bytes=text_bytes)


def run_evaluate(stream: Stream, batch: int = 4) -> Evaluation:
    model, tokens, documents = stream
    return evaluate(model, tokens, documents, text_bytes=1234, batch=batch, bar=hidden_bar())


def test_the_evaluation_equals_brute_force(stream: Stream) -> None:
    model, tokens, documents = stream
    losses = brute_losses(model, tokens)
    actual = run_evaluate(stream)
    mean = losses.mean()
    assert (actual.tokens, actual.documents) == (len(tokens) - 1, 23)
    assert actual.nats_per_token == pytest.approx(mean, rel=1e-6)
    assert actual.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert actual.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / 1234, rel=1e-6)
    of_position = np.concatenate([[0.0], losses])
    residuals = []
    for start, stop in zip(documents[:-1], documents[1:], strict=True):
        mine = of_position[max(start, 1) : stop]
        residuals.append(mine.sum() - mean * len(mine))
    error = math.sqrt(23 / 22 * np.square(residuals).sum()) / len(losses)
    assert actual.standard_error == pytest.approx(error, rel=1e-5)


def test_the_standard_error_is_the_spread_over_samples_of_documents(rng: np.random.Generator) -> None:
    """Draw the documents again many times: the loss varies by the standard error."""
    model = random_model(tiny_config(context_length=8, num_layers=1), rng)
    errors, losses = [], []
    for _ in range(100):
        # A document is one token again and again, so that losses within it agree and between documents differ.
        sizes = rng.integers(2, 12, size=40)
        tokens = np.repeat(rng.integers(272, size=40), sizes).astype(np.uint16)
        actual = evaluate(
            model, tokens, np.concatenate([[0], np.cumsum(sizes)]), text_bytes=1, batch=64, bar=hidden_bar()
        )
        errors.append(actual.standard_error)
        losses.append(actual.nats_per_token)
    assert np.std(losses) == pytest.approx(np.mean(errors), rel=0.3)


def test_each_token_is_predicted_once_whatever_the_batch(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokens, _ = stream
    expected = run_evaluate(stream, batch=1)
    for batch in (2, 7, 1000):
        seen: list[int] = []
        real = LanguageModel.token_losses

        def spy(self: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            seen.extend(targets.flatten().tolist())  # noqa: B023
            assert inputs.shape == targets.shape
            assert inputs.shape[1] <= 8
            return real(self, inputs, targets)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(LanguageModel, "token_losses", spy)
            actual = run_evaluate(stream, batch=batch)
        assert seen == tokens[1:].tolist()
        assert actual.nats_per_token == pytest.approx(expected.nats_per_token, rel=1e-6)
        assert actual.standard_error == pytest.approx(expected.standard_error, rel=1e-5)
    assert run_evaluate(stream, batch=1) == expected


def test_the_held_out_loss_is_the_mean_of_the_same_losses(stream: Stream) -> None:
    model, tokens, _ = stream
    for length in (2, 8, 9, 10, 17, len(tokens)):
        expected = brute_losses(model, tokens[:length]).mean()
        assert held_out_loss(model, tokens[:length], batch=3) == pytest.approx(expected, rel=1e-6)


def test_one_document_has_no_standard_error(stream: Stream) -> None:
    model, tokens, documents = stream
    actual = evaluate(model, tokens, documents[[0, -1]], text_bytes=1, batch=4, bar=hidden_bar())
    assert math.isnan(actual.standard_error)
    assert actual.nats_per_token == pytest.approx(run_evaluate(stream).nats_per_token)


def test_nothing_to_predict_is_refused(stream: Stream) -> None:
    with pytest.raises(CrateError, match="a text must have at least 2 tokens, got 1"):
        evaluate(stream[0], stream[1][:1], np.array([0, 1]), text_bytes=1, batch=4, bar=hidden_bar())


def test_a_diverged_model_is_refused_and_a_hopeless_one_is_not(stream: Stream) -> None:
    model = stream[0]
    with torch.no_grad():
        model.get_parameter("norm.weight").mul_(1e4)
        assert run_evaluate(stream).perplexity == math.inf
        model.get_parameter("norm.weight").mul_(math.nan)
    with pytest.raises(CrateError, match="the loss of this model is nan: its training has diverged"):
        run_evaluate(stream)


@pytest.fixture
def made(tmp_path: Path, rng: np.random.Generator) -> tuple[TokenDirectory, Path]:
    """A token directory, and a run directory with a model of its tokenizer."""
    data = make_tokens(tmp_path / "tokens", rng, documents=20)
    save_model(random_model(tiny_config(vocab_size=320), rng), tmp_path / "run" / "model", data.tokenizer())
    return data, tmp_path / "run"


def test_the_command_prints_and_writes_the_evaluation(
    made: tuple[TokenDirectory, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = made
    written = []
    for _ in range(2):
        assert cli.main(["evaluate", str(run), "--data", str(data.path)]) == 0
        written.append(json.loads((run / "evaluation.json").read_text()))
    for one in written:
        del one["origin"], one["checksum"]
    first, second = written
    assert first == second
    tokens = data.tokens("val")
    losses = held_out_loss(load_model(run / "model"), tokens, batch=16)
    assert first["nats_per_token"] == pytest.approx(losses, rel=1e-6)
    assert first["bits_per_byte"] == pytest.approx(
        losses * (len(tokens) - 1) / math.log(2) / data.text_bytes("val"), rel=1e-6
    )
    assert (first["split"], first["data_hash"]) == ("val", data.splits["val"].sha256)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == out[1]
    assert out[0].startswith(f"run: {first['nats_per_token']:.4f} ± {first['standard_error']:.4f} nats per token, ")
    assert f"({len(tokens) - 1} tokens of {first['documents']} val documents)" in out[0]


def strictly(text: str) -> Any:
    """What other readers of JSON make of it: they know no NaN and no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_command_keeps_the_loss_of_every_document(tmp_path: Path, rng: np.random.Generator) -> None:
    data, run = make_tokens(tmp_path / "tokens", rng, documents=30), tmp_path / "run"
    save_model(random_model(tiny_config(vocab_size=320, context_length=8), rng), run / "model", data.tokenizer())
    assert cli.main(["evaluate", str(run), "--data", str(data.path), "--batch", "3"]) == 0
    tokens, documents = data.tokens("val"), data.documents("val")
    of_position = np.concatenate([[0.0], brute_losses(load_model(run / "model"), tokens)])
    spans = [(max(start, 1), stop) for start, stop in zip(documents[:-1], documents[1:], strict=True)]
    kept = load_file(run / DOCUMENTS)
    np.testing.assert_allclose(kept["nats"], [of_position[a:b].sum() for a, b in spans], rtol=1e-5)
    np.testing.assert_array_equal(kept["tokens"], [b - a for a, b in spans])
    assert {name: str(one.dtype) for name, one in kept.items()} == {"nats": "float64", "tokens": "int64"}
    assert len(spans) > 2
    loss = read_loss(run)
    assert loss is not None
    assert loss.by_document is not None
    np.testing.assert_array_equal(loss.by_document.nats, kept["nats"])
    np.testing.assert_array_equal(loss.by_document.tokens, kept["tokens"])
    assert loss.data_hash == data.splits["val"].sha256


def test_numbers_that_are_not_finite_are_null_in_evaluation_json(
    made: tuple[TokenDirectory, Path], rng: np.random.Generator
) -> None:
    data, run = made
    model = random_model(tiny_config(vocab_size=320), rng)
    with torch.no_grad():
        model.get_parameter("norm.weight").mul_(1e4)
    save_model(model, run / "model", data.tokenizer())
    (run / "evaluation.json").write_text('{"zero_shot": {"old": {"standard_error": NaN}}}')
    assert cli.main(["evaluate", str(run), "--data", str(data.path)]) == 0
    actual = strictly((run / "evaluation.json").read_text())
    assert actual["perplexity"] is None
    assert actual["nats_per_token"] > 700
    assert actual["zero_shot"] == {"old": {"standard_error": None}}
    loss = read_loss(run)
    assert loss is not None
    assert loss.perplexity is None


def test_an_unreadable_evaluation_is_refused_with_a_whole_command(
    made: tuple[TokenDirectory, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = made
    (run / "evaluation.json").write_text("{")
    assert cli.main(["evaluate", str(run), "--data", str(data.path)]) == 2
    assert capsys.readouterr().err.endswith(f"run: cratelm evaluate {run} --data DIR\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{run} --data {other}", "come from another tokenizer than the model"),
        ("{small} --data {tokens}", "must have at most the 99 tokens of the model .*, got 270"),
        ("{run} --data {tokens} --batch 0", "--batch must be at least 1, got 0"),
        ("{run} --data {tokens} --split test", "has no split test"),
        ("{run} --data {run}", "is not a token directory"),
        ("{tokens} --data {tokens}", "no model in"),
    ],
)
def test_a_mistake_gets_one_line_and_writes_nothing(
    arguments: str, message: str, made: tuple[TokenDirectory, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = made
    folders = {"run": run, "tokens": data.path, "other": run / "other", "small": run / "small"}
    if "{other}" in arguments:
        make_tokens(folders["other"], np.random.default_rng(0), vocab=265)
    if "{small}" in arguments:
        save_model(LanguageModel(tiny_config(vocab_size=99)).initialise(0), folders["small"])
    assert cli.main(["evaluate", *arguments.format(**folders).split()]) == 2
    err = capsys.readouterr().err
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert not list(run.rglob("evaluation.json"))


def test_a_run_in_use_is_refused(made: tuple[TokenDirectory, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data, run = made
    with claim(run):
        assert cli.main(["evaluate", str(run), "--data", str(data.path)]) == 2
    assert f"{run} is in use by process" in capsys.readouterr().err
