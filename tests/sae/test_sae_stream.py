"""The stream of activations: bounded, shuffled, the same after a restart; and losses with something spliced in."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.tiny import random_model, tiny_config
from torch import Tensor

import cratelm
from cratelm.errors import CrateError
from cratelm.model.config import Architecture
from cratelm.sae.resampling import _drawn, costly_inputs
from cratelm.sae.splicing import spliced_losses
from cratelm.sae.stream import ActivationStream

D_IN, CONTEXT, BATCH = 3, 10, 16


def make_stream(rng: np.random.Generator, forward: Callable[[Tensor], Tensor], **changes: object) -> ActivationStream:
    """A stream over a made-up corpus, which the generator's state decides."""
    settings: dict[str, object] = {
        "d_in": D_IN, "context": CONTEXT, "batch_tokens": BATCH, "buffer_tokens": 70, "seed": 5, "rows_at_once": 3,
        "device": torch.device("cpu"),
    }  # fmt: skip
    return ActivationStream(forward, rng.integers(0, 50, 500).astype(np.uint16), **settings | changes)  # type: ignore[arg-type]


def expand(tokens: Tensor) -> Tensor:
    """Activations that say which token they are of, and where it stands in its row."""
    place = torch.arange(tokens.shape[1]).expand_as(tokens)
    return torch.stack([tokens, place, torch.ones_like(tokens)], dim=-1).float()


def test_a_stream_holds_one_buffer_and_computes_no_more_than_it_needs(rng: np.random.Generator) -> None:
    computed, largest = 0, 0

    def forward(tokens: Tensor) -> Tensor:
        nonlocal computed, largest
        computed += tokens.numel()
        largest = max(largest, tokens.numel())
        return expand(tokens)

    stream = make_stream(rng, forward)
    per_buffer = 64  # four whole batches of the 70 that were asked for
    for served in range(1, 41):
        assert next(stream).shape == (BATCH, D_IN)
        buffers = -(-served * BATCH // per_buffer)
        assert computed == buffers * 70, "seven rows of ten make a buffer of 64"
    assert largest == 30
    held = [value for value in vars(stream).values() if isinstance(value, Tensor)]
    assert sum(value.numel() for value in held) == per_buffer * (D_IN + 1), "the buffer and its order, nothing else"


def test_every_buffer_is_served_whole_in_another_order(rng: np.random.Generator) -> None:
    made: list[Tensor] = []

    def forward(tokens: Tensor) -> Tensor:
        made.append(expand(tokens).flatten(0, 1))
        return made[-1].view(*tokens.shape, D_IN)

    stream = make_stream(rng, forward)
    served = torch.cat([next(stream) for _ in range(4)])
    computed = torch.cat(made)[:64]
    assert sorted(map(tuple, served.tolist())) == sorted(map(tuple, computed.tolist()))
    assert not torch.equal(served, computed)


@pytest.mark.parametrize("first", [1, 3, 4, 7, 13])
def test_a_stream_that_begins_later_gives_the_same_batches(first: int, rng: np.random.Generator) -> None:
    state = rng.bit_generator.state
    whole = make_stream(rng, expand)
    expected = [next(whole) for _ in range(16)]
    rng.bit_generator.state = state
    later = make_stream(rng, expand, first=first)
    for batch in expected[first:]:
        assert torch.equal(next(later), batch)
    rng.bit_generator.state = state
    other = make_stream(rng, expand, seed=6)
    assert not torch.equal(next(other), expected[0])


def test_a_corpus_shorter_than_a_row_and_bad_activations(rng: np.random.Generator) -> None:
    short = ActivationStream(
        expand, np.arange(6).astype(np.uint16), d_in=D_IN, context=CONTEXT, batch_tokens=4, buffer_tokens=8, seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert int(next(short)[:, 1].max()) <= 4
    with pytest.raises(CrateError, match="must be finite"):
        next(make_stream(rng, lambda tokens: expand(tokens) * float("nan")))
    with pytest.raises(CrateError, match="must have at least 2 tokens, got"):
        ActivationStream(
            expand, np.arange(1).astype(np.uint16), d_in=D_IN, context=CONTEXT, batch_tokens=4, buffer_tokens=8,
            seed=0, device=torch.device("cpu"),
        )  # fmt: skip


@pytest.mark.parametrize("arch", ["crate", "gpt2"])
def test_spliced_losses_are_the_cross_entropy_of_the_edited_model(arch: Architecture, rng: np.random.Generator) -> None:
    model = random_model(tiny_config(arch), rng)
    tokens = torch.from_numpy(rng.integers(0, 272, (3, 12)))
    tap = model.neuron_taps[0]

    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    for edits in ({}, {tap: doubled}):
        with torch.no_grad(), cratelm.edit(model, edits):
            logits = model(tokens[:, :-1]).double()
        expected = -torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
        torch.testing.assert_close(spliced_losses(model, tokens, edits).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_spliced_losses_of_a_hugging_face_model(rng: np.random.Generator) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-all)")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.from_numpy(rng.integers(0, 40, (2, 9)))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.double()
    expected = -torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(spliced_losses(model, tokens).double(), expected, rtol=1e-4, atol=1e-4)
    added = spliced_losses(model, tokens, {"model.layers.1.mlp.down_proj:input": torch.zeros_like}) - expected
    assert float(added.abs().max()) > 1e-4


def test_draws_follow_the_weights(rng: np.random.Generator) -> None:
    weights = np.array([[1.0, 0.0001, 3.0, 6.0]])
    firsts = np.concatenate([_drawn(weights, 1, rng)[0] for _ in range(4000)])
    share = np.bincount(firsts, minlength=4) / len(firsts)
    np.testing.assert_allclose(share, weights[0] / weights.sum(), atol=0.04)
    every = _drawn(np.repeat(weights, 5, axis=0), 6, rng)
    assert all(sorted(row[:4]) == [0, 1, 2, 3] for row in every.tolist())
    assert (every[:, 4:] == every[:, :2]).all()


@pytest.mark.parametrize("count", [3, 25])
def test_latents_restart_where_the_reconstruction_costs_most(count: int, rng: np.random.Generator) -> None:
    model = random_model(tiny_config(), rng)
    corpus, tap = rng.integers(0, 272, 400).astype(np.uint16), model.neuron_taps[0]

    def settings(**changes: Any) -> dict[str, Any]:
        # In about every second row the loss is lower without the last token's code: of many rows some pay for it.
        return {"count": count, "rows": 64 if count == 3 else 8, "context": 16, "seed": 1, "step": 70} | changes

    def last_is_lost(x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], torch.zeros_like(x[:, -1:])], dim=1)

    result = costly_inputs(model, tap, last_is_lost, corpus, **settings())
    again = costly_inputs(model, tap, last_is_lost, corpus, **settings())
    other = costly_inputs(model, tap, last_is_lost, corpus, **settings(step=71))
    assert result.shape == (count, 64)
    assert torch.equal(result, again)
    assert not torch.equal(result, other)
    if count == 3:  # only the last tokens of rows cost anything, and a token's code there is one of 400 windows' ends
        with torch.no_grad(), cratelm.capture(model, [tap]) as codes:
            windows = np.lib.stride_tricks.sliding_window_view(corpus.astype(np.int64), 16)
            model(torch.from_numpy(windows.copy()))
        distance = torch.cdist(result, codes[tap][:, -1]).min(dim=1).values
        assert float(distance.max()) < 1e-3
