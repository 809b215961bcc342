"""Ablation and spliced losses where every window of the model begins with a token."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures.hugging_face import build

from cratelm.activations.causal_model import causal_model
from cratelm.activations.taps import capture
from cratelm.sae.splicing import spliced_losses
from cratelm.steering.ablation import Ablation, held_out

BEGIN = 7


@pytest.mark.parametrize("limit", [None, 200])
def test_every_window_begins_with_the_token_and_the_text_alone_counts(
    limit: int | None, rng: np.random.Generator
) -> None:
    model = build("llama", rng, max_position_embeddings=24)
    tokens = rng.integers(8, 60, size=300).astype(np.uint16)
    documents = np.array([0, 30, 31, 90, 200, 300])
    plain, text = (held_out(tokens, documents, model, limit, begin) for begin in ((), (BEGIN,)))
    for _, inputs, targets in text.batches(3):
        assert bool((inputs[:, 0] == BEGIN).all())
        assert not bool((inputs[:, 1:] == BEGIN).any())
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert text.begins is not None
    if limit is None:
        assert np.array_equal(text.tokens[~text.begins], tokens)
        assert text.sizes.sum() == plain.sizes.sum() + 1  # the first token of the stream is predicted too
        assert text.sizes.tolist()[1:] == plain.sizes.tolist()[1:]
    ablation = Ablation(model, text, [1])
    sums = torch.zeros(40, dtype=torch.float64)
    tap = causal_model(model).places()[1]
    count = 0
    for _, inputs, _ in text.batches(1):
        with capture(model, [tap]) as codes, torch.no_grad():
            model(inputs)
        sums += codes[tap][0, 1:].double().sum(0)
        count += inputs.shape[1] - 1
    torch.testing.assert_close(ablation.means[1], sums / count, rtol=1e-4, atol=1e-6)
    change = ablation.each(1, [3], "zero")[0]
    together = ablation.together([(1, 3)], "zero")
    np.testing.assert_allclose(change, together, rtol=1e-3, atol=1e-4)


def test_the_loss_of_a_row_is_that_after_its_beginning_which_no_edit_changes(rng: np.random.Generator) -> None:
    model = build("llama", rng)
    tokens = torch.from_numpy(rng.integers(8, 60, size=(3, 12)))
    rows = torch.cat([torch.full((3, 1), BEGIN), tokens], dim=1)
    tap = "model.layers.0"
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(3, 11)
    torch.testing.assert_close(spliced_losses(model, tokens, begin=(BEGIN,)), expected)
    seen = list[torch.Size]()

    def double(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return 2 * x

    edited = spliced_losses(model, tokens, {tap: double}, (BEGIN,))
    assert seen == [torch.Size((3, 11, 16))]
    with capture(model, [tap]) as codes, torch.no_grad():
        model(rows[:, :-1])
    assert not torch.equal(edited, expected)
    assert codes[tap].shape == (3, 12, 16)
