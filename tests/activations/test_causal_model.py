"""One face for every causal language model: ours and Hugging Face's give the numbers of their modules."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.hugging_face import build
from fixtures.synthetic import make_tokenizer
from fixtures.tiny import random_model, tiny_config

from cratelm.activations.causal_model import causal_model
from cratelm.activations.taps import capture
from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.model.generate import pad_left

KINDS = ("crate", "gpt2", "llama", "opt")
each_kind = pytest.mark.parametrize("kind", KINDS)


def module(kind: str, rng: np.random.Generator, layers: int = 3) -> Any:
    """A random model of ours or of a Hugging Face family, with 60 token ids."""
    if kind in ("crate", "gpt2"):
        arch: Architecture = "crate" if kind == "crate" else "gpt2"
        return random_model(tiny_config(arch, vocab_size=60, num_layers=layers), rng)
    return build(kind, rng, num_hidden_layers=layers)


def some_tokens(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 60, (3, 10)))


def own_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    output = model(tokens)
    return output if isinstance(output, torch.Tensor) else output.logits


@each_kind
@torch.no_grad()
def test_logits_and_losses_are_those_of_the_module(kind: str, rng: np.random.Generator) -> None:
    model, tokens = module(kind, rng), some_tokens(rng)
    causal, logits = causal_model(model), own_logits(model, tokens)
    torch.testing.assert_close(causal.logits(tokens), logits)
    torch.testing.assert_close(causal.last_logits(tokens), logits[:, -1])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(causal.token_losses(tokens[:, :-1], tokens[:, 1:]).flatten(), expected)


@each_kind
@torch.no_grad()
def test_padding_on_the_left_does_not_change_the_last_logits(kind: str, rng: np.random.Generator) -> None:
    causal = causal_model(module(kind, rng))
    prompts = [rng.integers(1, 60, size=int(count)).tolist() for count in rng.integers(2, 9, size=3)]
    tokens, mask = pad_left(prompts)
    expected = torch.cat([causal.last_logits(torch.tensor([prompt])) for prompt in prompts])
    torch.testing.assert_close(causal.last_logits(tokens, mask), expected, rtol=1e-4, atol=1e-4)


@each_kind
@torch.no_grad()
def test_a_pass_ends_after_the_last_wanted_layer_and_gives_the_same_activations(
    kind: str, rng: np.random.Generator
) -> None:
    model, tokens = module(kind, rng), some_tokens(rng)
    causal, outputs = causal_model(model), causal_model(model).places("residual")
    taps = [causal.places()[1], outputs[0]]
    with capture(model, [*taps, *outputs.values()]) as whole:
        own_logits(model, tokens)
    with capture(model, [*taps, *outputs.values()]) as partial:
        causal.read(tokens, taps)
    assert outputs[2] in whole
    assert outputs[2] not in partial
    for tap in taps:
        assert torch.equal(partial[tap], whole[tap])
    torch.testing.assert_close(causal.logits(tokens), own_logits(model, tokens))  # no hook is left


@torch.no_grad()
def test_the_last_layers_alone_give_the_losses_of_the_whole_model(rng: np.random.Generator) -> None:
    model, tokens = module("crate", rng), some_tokens(rng)
    causal, inputs, targets = causal_model(model), tokens[:, :-1], tokens[:, 1:]
    with capture(model, ["blocks.0"]) as seen:
        expected = causal.token_losses(inputs, targets)
    assert causal.losses_from is not None
    torch.testing.assert_close(causal.losses_from(1, seen["blocks.0"], targets), expected)
    assert causal_model(module("llama", rng)).losses_from is None


@each_kind
def test_a_prompt_is_encoded_in_one_place_and_an_empty_or_long_one_is_refused(
    kind: str, rng: np.random.Generator
) -> None:
    tokenizer = make_tokenizer()
    causal = causal_model(module(kind, rng), tokenizer)
    end, own = tokenizer.token_to_id("<|endoftext|>"), kind in ("crate", "gpt2")
    assert causal.encode("a crate") == [*([end] if own else []), *tokenizer.encode("a crate").ids]
    assert causal.end_tokens == (end,)
    with pytest.raises(CrateError, match="the prompt is empty"):
        causal.encode("")
    assert causal.context_length is not None
    with pytest.raises(CrateError, match="the model's context is"):
        causal.logits(torch.zeros(1, causal.context_length + 1, dtype=torch.long))
