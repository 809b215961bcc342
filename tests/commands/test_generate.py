"""Generation: the plain loop, sampling, and the command that streams text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.hugging_face import build, save
from fixtures.synthetic import make_tokenizer
from fixtures.tiny import random_model, tiny_config
from tokenizers import Tokenizer
from torch import Tensor

from cratelm import cli
from cratelm.errors import CrateError
from cratelm.model.language_model import sample
from cratelm.model.weights import load, save_model
from cratelm.steering import generate


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_greedy_generation_takes_the_largest_logit_and_slides_over_the_context(
    arch: Any, rng: np.random.Generator
) -> None:
    model = random_model(tiny_config(arch), rng)
    tokens = torch.from_numpy(rng.integers(272, size=(2, 10)))
    actual = model.generate(tokens, 14, temperature=0)
    expected = tokens
    for _ in range(14):
        best = model(expected[:, -16:])[:, -1].argmax(dim=1)
        expected = torch.cat([expected, best[:, None]], dim=1)
    assert torch.equal(actual, expected)


def test_a_seed_decides_the_text_and_without_one_it_varies(rng: np.random.Generator) -> None:
    model, prompt = random_model(tiny_config(), rng), torch.tensor([[5, 6]])
    first, same, other = (model.generate(prompt, 24, temperature=3.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    assert not torch.equal(model.generate(prompt, 24, temperature=3.0), model.generate(prompt, 24, temperature=3.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_each_new_token_is_reported_as_it_is_made(rng: np.random.Generator) -> None:
    model, seen = random_model(tiny_config(), rng), list[Tensor]()
    tokens = torch.from_numpy(rng.integers(272, size=(3, 4)))
    result = model.generate(tokens, 6, seed=0, on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), result[:, 4:])


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, None), (1.0, 3), (0.7, 1), (1.0, 99)]
)
def test_samples_follow_the_softmax(temperature: float, top_k: int | None, rng: np.random.Generator) -> None:
    logits = rng.normal(size=7).astype(np.float32)
    allowed = np.argsort(-logits)[:top_k]
    expected = np.zeros(7)
    expected[allowed] = softmax(logits[allowed].astype(np.float64) / temperature)
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    drawn = sample(
        torch.from_numpy(logits).expand(20_000, 7), temperature=temperature, top_k=top_k, generator=generator
    )
    counts = np.bincount(drawn, minlength=7)
    assert (counts[expected == 0] == 0).all()
    there = expected > 0
    # Chi squared with at most 6 degrees of freedom: above 45 once in ten million.
    assert ((counts - 20_000 * expected)[there] ** 2 / (20_000 * expected[there])).sum() < 45


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Path:
    save_model(random_model(tiny_config(vocab_size=320), rng), tmp_path / "model", make_tokenizer())
    return tmp_path / "model"


def test_the_command_streams_prompt_and_continuation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(folder), "--prompt", "the neuron", "--tokens", "20", "--seed", "3"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == first
    tokenizer = make_tokenizer()
    end = tokenizer.token_to_id("<|endoftext|>")  # before a text, as before every document
    prompt = torch.tensor([[end, *tokenizer.encode("the neuron").ids]])
    made = load(folder)[0].generate(prompt, 20, temperature=0.8, seed=3)
    assert first == tokenizer.decode(made[0].tolist()) + "\n"
    assert first.startswith("the neuron")


def test_without_a_prompt_the_model_begins_a_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(folder), "--tokens", "9", "--temperature", "0"]) == 0
    model, tokenizer = load(folder)
    assert tokenizer is not None
    made = model.generate(torch.tensor([[tokenizer.token_to_id("<|endoftext|>")]]), 9, temperature=0)[0, 1:]
    assert capsys.readouterr().out == tokenizer.decode(made.tolist()) + "\n"


def generates(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    """Make every model continue with these tokens."""

    def continue_with(*_: object, on_step: Any, **__: object) -> None:
        for token in ids:
            on_step(torch.tensor([token]), torch.zeros(1, 1))

    monkeypatch.setattr(generate, "generate", continue_with)


def test_a_hugging_face_model_continues_a_text(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = build("llama", rng, vocab=tokenizer.get_vocab_size())
    save(model, tmp_path / "llama", tmp_path / "tokenizer.json")
    tokens = torch.tensor([tokenizer.encode("the neuron").ids])
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    flags = ["--prompt", "the neuron", "--tokens", "6", "--temperature", "0", "--device", "cpu"]
    assert cli.main(["generate", str(tmp_path / "llama"), *flags]) == 0
    assert capsys.readouterr().out == tokenizer.decode(tokens[0].tolist()) + "\n"


@pytest.mark.parametrize("text", ["жар→漢字", "漢字 😀😀!", "ends in half a smile \N{GRINNING FACE}"])
def test_a_character_of_several_tokens_is_written_when_it_is_complete(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text).ids
    assert len(ids) > len(text) or "smile" in text
    ids = ids[:-1] if "smile" in text else ids
    generates(monkeypatch, ids)
    assert cli.main(["generate", str(folder), "--prompt", "a"]) == 0
    assert capsys.readouterr().out == tokenizer.decode([*tokenizer.encode("a").ids, *ids]) + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be a number of at least 0"),
        (["--prompt", "a", "--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["--prompt", "a", "--tokens", "0"], "--tokens must be at least 1, got 0"),
    ],
)
def test_an_impossible_option_gets_one_line(
    flags: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", str(folder), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_model_without_a_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").unlink()
    assert cli.main(["generate", str(folder), "--prompt", "a"]) == 2
    assert "must have a tokenizer.json, got none" in capsys.readouterr().err


def test_the_tokenizer_travels_with_the_model(folder: Path) -> None:
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).to_str() == make_tokenizer().to_str()


@pytest.mark.parametrize("temperature", ["nan", "inf", "-1"])
def test_a_temperature_that_is_not_a_number_is_refused(
    temperature: str, tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(tiny_config(), rng)
    with pytest.raises(CrateError, match="temperature must be"):
        model.generate(torch.zeros(1, 1, dtype=torch.int64), 1, temperature=float(temperature))
    assert cli.main(["generate", str(tmp_path), "--temperature", temperature]) == 2
    assert capsys.readouterr().err.startswith("error: --temperature must be a number of at least 0")
