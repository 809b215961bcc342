"""Generation: what the cache gives equals what reading everything again gives, and draws are the draws asked for."""

from typing import Any

import numpy as np
import pytest
import torch

from cratelm.activations.taps import edit
from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig, sized
from cratelm.model.generate import Cache, pad_left, probabilities, sample
from cratelm.model.language_model import LanguageModel

ALL = {"rotary": True, "shifted_keys": True, "normalised": True, "strict_mask": True}
MODELS: list[dict[str, Any]] = [
    {"arch": "crate"}, {"arch": "gpt2"}, {"arch": "crate", **ALL}, {"arch": "gpt2", **ALL},
    {"arch": "crate", "rotary": True}, {"arch": "crate", "attention": "qkv", "shifted_keys": True},
    {"arch": "crate", "dictionary": "complete", "expansion": 1, "ista_steps": 1},
]  # fmt: skip


def made(rng: np.random.Generator, **changes: Any) -> LanguageModel:
    config = ModelConfig(num_layers=2, d_model=16, num_heads=2, vocab_size=60, context_length=16, **changes)
    model = LanguageModel(config).initialise(int(rng.integers(1 << 31)))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.from_numpy(rng.normal(size=parameter.shape)).float()
    return model.eval()


def new_cache(model: LanguageModel, batch: int, capacity: int = 16) -> Cache:
    return Cache(model.config, batch=batch, capacity=capacity, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_cached_logits_equal_uncached_ones(changes: dict[str, Any], batch: int, rng: np.random.Generator) -> None:
    model, tokens = made(rng, **changes), torch.from_numpy(rng.integers(60, size=(batch, 16)))
    cache, first = new_cache(model, batch), int(rng.integers(1, 8))
    with torch.no_grad():
        expected = model(tokens)
        pieces = [model(tokens[:, :first], cache=cache), model(tokens[:, first : first + 4], cache=cache)]
        pieces += [model(tokens[:, t : t + 1], cache=cache) for t in range(first + 4, 16)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_a_prompt_padded_on_the_left_reads_as_it_does_alone(
    changes: dict[str, Any], cached: bool, rng: np.random.Generator
) -> None:
    model = made(rng, **changes)
    prompts = [rng.integers(60, size=size).tolist() for size in (5, 9, 1)]
    tokens, mask = pad_left(prompts)
    cache = new_cache(model, 3) if cached else None
    with torch.no_grad():
        logits = model(tokens, mask=mask, cache=cache)
        if cached:
            more = torch.from_numpy(rng.integers(60, size=(3, 2)))
            logits = torch.cat([logits, model(more, cache=cache)], dim=1)
            prompts = [prompt + row.tolist() for prompt, row in zip(prompts, more, strict=True)]
        for row, prompt in zip(logits, prompts, strict=True):
            torch.testing.assert_close(row[-len(prompt) :], model(torch.tensor([prompt]))[0], rtol=1e-4, atol=1e-4)
    assert logits.isfinite().all()


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_generation_with_and_without_the_cache_is_the_same_text(
    changes: dict[str, Any], rng: np.random.Generator
) -> None:
    model = made(rng, **changes)
    tokens, mask = pad_left([rng.integers(60, size=size).tolist() for size in (3, 6)])
    texts = [
        model.generate(tokens, 30, temperature=0, mask=mask, slide=slide, use_cache=use_cache)
        for slide in (1, 5, 16)
        for use_cache in (True, False)
    ]
    for cached, uncached in zip(texts[::2], texts[1::2], strict=True):
        assert cached.tolist() == uncached.tolist()
    assert texts[0].shape == (2, 36)


def test_sliding_by_one_takes_the_last_context_of_tokens_each_time(rng: np.random.Generator) -> None:
    model = made(rng, arch="crate")
    tokens = torch.from_numpy(rng.integers(60, size=(2, 20)))
    expected = tokens
    with torch.no_grad():
        for _ in range(6):
            new = model(expected[:, -16:])[:, -1].argmax(-1)
            expected = torch.cat([expected, new[:, None]], dim=1)
    assert model.generate(tokens, 6, temperature=0, slide=1).tolist() == expected.tolist()


def test_beyond_the_context_the_rest_is_read_again_once_per_slide(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = made(rng, arch="crate"), []
    features = model.features

    def counted(tokens: torch.Tensor, **more: Any) -> torch.Tensor:
        read.append(tokens.shape[1])
        return features(tokens, **more)

    monkeypatch.setattr(model, "features", counted)
    model.generate(torch.zeros((1, 10), dtype=torch.int64), 20, temperature=0, slide=4)
    assert read == [10, *[1] * 6, 13, 1, 1, 1, 13, 1, 1, 1, 13, 1, 1, 1, 13]


def test_an_edit_steers_generation_with_the_cache_as_without(rng: np.random.Generator) -> None:
    model = made(rng, arch="crate")
    tokens = torch.from_numpy(rng.integers(60, size=(1, 4)))
    with edit(model, {model.neuron_taps[1]: lambda code: code + 3}):
        texts = [model.generate(tokens, 10, temperature=0, use_cache=use_cache).tolist() for use_cache in (True, False)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("size", ["2l", "s"])
def test_crates_cache_has_half_the_bytes_of_gpt2s(size: Any) -> None:
    sizes = []
    for arch in ("crate", "gpt2"):
        config = sized(arch, size)
        cache = Cache(config, batch=1, capacity=1024, device=torch.device("meta"), dtype=torch.float32)
        sizes.append(cache.nbytes)
    assert sizes[0] == sized("crate", size).num_layers * 1024 * sized("crate", size).d_model * 4
    assert 2 * sizes[0] == sizes[1]


def test_draws_follow_the_restricted_distribution(rng: np.random.Generator) -> None:
    logits = torch.log(torch.tensor([[0.4, 0.05, 0.3, 0.15, 0.1]]))

    def kept(**how: Any) -> list[float]:
        how = {"temperature": 1.0, "top_k": None, "top_p": None} | how
        return [round(x, 4) for x in probabilities(logits, **how)[0].tolist()]

    assert kept() == [0.4, 0.05, 0.3, 0.15, 0.1]
    assert kept(top_k=2) == [0.5714, 0, 0.4286, 0, 0]
    assert kept(top_p=0.5) == [0.4, 0, 0.3, 0, 0]
    assert kept(top_p=0.75) == [0.4, 0, 0.3, 0.15, 0]
    assert kept(top_p=1) == kept()
    assert kept(top_p=1e-9) == [0.4, 0, 0, 0, 0]
    assert kept(top_k=2, top_p=0.5) == [0.5714, 0, 0, 0, 0]
    squared = np.array([0.16, 0.0025, 0.09, 0.0225, 0.01])
    np.testing.assert_allclose(kept(temperature=0.5), squared / squared.sum(), atol=1e-4)
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    drawn = sample(logits.expand(4000, 5), temperature=1, top_k=None, top_p=0.75, generator=generator)
    shares = torch.bincount(drawn, minlength=5) / 4000
    np.testing.assert_allclose(shares, np.array([0.4, 0, 0.3, 0.15, 0]) / 0.85, atol=0.05)


def test_a_seed_decides_the_text_and_each_token_is_streamed(rng: np.random.Generator) -> None:
    model, streamed = made(rng, arch="gpt2"), []
    tokens = torch.from_numpy(rng.integers(60, size=(2, 3)))
    one = model.generate(tokens, 12, seed=7, on_token=lambda new: streamed.append(new.tolist()))
    assert one.tolist() == model.generate(tokens, 12, seed=7).tolist()
    assert one.tolist() != model.generate(tokens, 12, seed=8).tolist()
    assert np.array(streamed).T.tolist() == one[:, 3:].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0 and top_k at least 1, got -1.0"),
        ({"top_k": 0}, "top_k at least 1, got .* and 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"slide": 17}, r"slide must be 1 to 16 \(the context\), got 17"),
        ({"mask": torch.tensor([[True, False]])}, "Pad on the left"),
    ],
)
def test_impossible_options_say_what_is_possible(
    options: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    with pytest.raises(CrateError, match=message):
        made(rng, arch="crate").generate(torch.zeros((1, 2), dtype=torch.int64), 1, **options)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(CrateError, match="an empty prompt has no next token"):
        pad_left([[1], []])
