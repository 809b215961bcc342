"""Head and loss in one: the plain form's numbers, without the plain form's logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cratelm.model import loss as loss_module
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.loss import mean_loss, token_losses


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation puts out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def problem(rng: np.random.Generator, dtype: torch.dtype = torch.float32, tokens: int = 37, vocab: int = 101):  # type: ignore[no-untyped-def]
    features = torch.from_numpy(rng.normal(size=(tokens, 8))).to(dtype).requires_grad_()
    head = torch.from_numpy(rng.normal(size=(vocab, 8))).to(dtype).requires_grad_()
    return features, head, torch.from_numpy(rng.integers(vocab, size=tokens))


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-5, 1e-6), (torch.float64, 1e-12, 1e-14)])
@pytest.mark.parametrize("rows", [1, 10, 37, 1000])
def test_loss_and_gradients_equal_the_plain_form(
    rows: int, dtype: torch.dtype, rtol: float, atol: float, rng: np.random.Generator
) -> None:
    features, head, targets = problem(rng, dtype)
    plain = F.cross_entropy(F.linear(features, head), targets)
    expected = torch.autograd.grad(3 * plain, [features, head])
    ours = mean_loss(features, head, targets, rows=rows)
    torch.testing.assert_close(ours, plain)
    for actual, wanted in zip(torch.autograd.grad(3 * ours, [features, head]), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol)


def test_the_gradients_of_each_tokens_loss_are_those_of_finite_differences(rng: np.random.Generator) -> None:
    features, head, targets = problem(rng, torch.float64, tokens=5, vocab=7)
    assert torch.autograd.gradcheck(lambda x, w: token_losses(x, w, targets, rows=2), [features, head])


def test_the_loss_of_each_token_equals_the_plain_form(rng: np.random.Generator) -> None:
    features, head, targets = problem(rng)
    plain = F.cross_entropy(F.linear(features, head), targets, reduction="none")
    ours = token_losses(features, head, targets, rows=10)
    torch.testing.assert_close(ours, plain)
    weights = torch.from_numpy(rng.random(37).astype(np.float32))
    for actual, wanted in zip(
        *(torch.autograd.grad((weights * losses).sum(), [features, head]) for losses in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite() -> None:
    features, head = torch.full((4, 8), 100.0), torch.eye(8).mul(100).requires_grad_()
    loss = mean_loss(features, head, torch.tensor([0, 1, 2, 3]))
    assert loss.item() == pytest.approx(np.log(8), rel=1e-5)


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_module.LOGITS_AT_ONCE, "cpu", 8_000)
    config = ModelConfig(arch="crate", num_layers=1, d_model=16, num_heads=2, vocab_size=1000, context_length=32)
    model = LanguageModel(config).initialise(0)
    tokens = torch.from_numpy(rng.integers(1000, size=(4, 32)))
    parameters, chunk = 1000 * 16, 8_000
    assert 4 * max(parameters, chunk) < 4 * 32 * 1000
    with Largest() as most:
        model.loss(tokens, tokens).backward()
        model.token_losses(tokens, tokens).sum().backward()
        with torch.no_grad():
            model.loss(tokens, tokens)
            model.token_losses(tokens, tokens)
    assert most.elements == max(parameters, chunk)
    with Largest() as most:
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert most.elements == 4 * 32 * 1000


def test_the_tensors_saved_for_the_backward_pass_are_as_small_as_the_head(rng: np.random.Generator) -> None:
    features, head, targets = problem(rng)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mean_loss(features, head, targets, rows=10)
    assert kept == [features.shape, head.shape]


def test_a_second_backward_pass_is_refused_rather_than_wrong(rng: np.random.Generator) -> None:
    features, head, targets = problem(rng)
    loss = mean_loss(features, head, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_gives_a_float32_loss_near_the_plain_one(rng: np.random.Generator) -> None:
    features, head, targets = problem(rng)
    expected = mean_loss(features, head, targets)
    gradients = torch.autograd.grad(expected, [features, head])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mean_loss(features, head, targets, rows=10)
        each = token_losses(features, head, targets, rows=10)
    assert loss.dtype == each.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    for actual, wanted in zip(torch.autograd.grad(loss, [features, head]), gradients, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() < 0.02 * wanted.norm()
