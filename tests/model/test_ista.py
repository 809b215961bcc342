"""The hand-written ISTA operation against autograd on the formulas as the released code writes them."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cratelm.activations.taps import capture, edit
from cratelm.model.config import ModelConfig
from cratelm.model.crate import ISTA
from cratelm.model.ista import sparse_code

WAYS = [(steps, from_input) for steps in (1, 2, 4) for from_input in (False, True)]


def written_out(
    x: Tensor, atoms: Tensor, step_sizes: Tensor, thresholds: Tensor, *, from_input: bool = False, **_: Any
) -> Tensor:
    """Five products for two steps (with the decoder's): D^T x is computed anew in each step."""
    code = x if from_input else torch.zeros((*x.shape[:-1], len(atoms)), dtype=x.dtype)
    for step_size, threshold in zip(step_sizes, thresholds, strict=True):
        gradient = F.linear(x, atoms) - F.linear(code @ atoms, atoms)
        code = F.relu(code + step_size * gradient - threshold)
    return code


def problem(rng: np.random.Generator, *, steps: int = 2, square: bool = False, dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    """Tokens, atoms, step sizes and a threshold per neuron, all of which ask for gradients."""
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype).normal_(generator=generator)

    neurons = 5 if square else 12
    tensors = draw(2, 3, 5), draw(neurons, 5) / 2, 0.2 + 0.1 * draw(steps).sigmoid(), 0.1 * draw(steps, neurons).abs()
    return [tensor.requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(("steps", "from_input"), WAYS)
def test_the_gradients_are_those_of_finite_differences(
    steps: int, from_input: bool, recompute: bool, rng: np.random.Generator
) -> None:
    inputs = problem(rng, steps=steps, square=from_input)
    assert torch.autograd.gradcheck(
        lambda *tensors: sparse_code(*tensors, from_input=from_input, recompute=recompute), inputs, eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(("steps", "from_input"), WAYS)
def test_codes_and_gradients_equal_autograd_on_the_naive_form(
    steps: int, from_input: bool, recompute: bool, rng: np.random.Generator
) -> None:
    inputs = problem(rng, steps=steps, square=from_input)
    weight = torch.from_numpy(rng.normal(size=(2, 3, len(inputs[1]))))
    results = []
    for function in (sparse_code, written_out):
        code = function(*inputs, from_input=from_input, recompute=recompute)
        results.append([code, *torch.autograd.grad((code * weight).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_frozen_atoms_leave_the_gradient_of_the_tokens(rng: np.random.Generator) -> None:
    x, atoms, *rest = (tensor.detach() for tensor in problem(rng))
    x.requires_grad_()
    (ours,) = torch.autograd.grad(sparse_code(x, atoms, *rest).sum(), x)
    (theirs,) = torch.autograd.grad(written_out(x, atoms, *rest).sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_a_second_derivative_is_refused(rng: np.random.Generator) -> None:
    x, *rest = problem(rng)
    (first,) = torch.autograd.grad(sparse_code(x, *rest).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def block(**changes: Any) -> ISTA:
    config = ModelConfig(arch="crate", num_layers=1, d_model=16, num_heads=2, vocab_size=8, **changes)
    ista = ISTA(config)
    nn.init.uniform_(ista.atoms, -0.6, 0.6)
    return ista


@pytest.mark.parametrize(("recompute", "products"), [(False, 12), (True, 13)])
def test_a_block_takes_four_products_forward_and_eight_backward(recompute: bool, products: int) -> None:
    ista, x = block(), torch.randn(3, 7, 16, requires_grad=True)
    ista.recompute = recompute
    one = 2 * 21 * 16 * 64
    with FlopCounterMode(display=False) as counter:
        output = ista(x)
        assert counter.get_total_flops() == 4 * one
        output.sum().backward()
    assert counter.get_total_flops() == products * one


class Kept:
    """Elements that autograd keeps for the backward pass, each tensor once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def __enter__(self) -> "Kept":
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        self.sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    def __exit__(self, *_: object) -> None:
        self.hooks.__exit__()


def test_recomputing_keeps_one_code_instead_of_two() -> None:
    x, ista, sizes = torch.randn(50, 1, 16), block(), []
    for ista.recompute in (False, True):
        with Kept() as kept:
            ista(x)
        sizes.append([size for size in kept.sizes.values() if size == 50 * 64])
    assert [len(codes) for codes in sizes] == [2, 1]


def test_the_backward_pass_makes_one_tensor_of_the_size_of_the_code() -> None:
    class CodeSized(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            fresh = func._schema.name in ("aten::empty_like", "aten::mm", "aten::addmm", "aten::empty.memory_format")
            self.made += (
                fresh and isinstance(result, Tensor) and result.numel() == 50 * 64 and "out" not in (kwargs or {})
            )
            return result

    x, atoms = torch.randn(50, 16, requires_grad=True), torch.rand(64, 16, requires_grad=True)
    code = sparse_code(x, atoms, torch.full((2,), 0.1), torch.full((2, 1), 0.01))
    with CodeSized() as mode:
        code.backward(torch.ones_like(code))
    assert mode.made == 1


@pytest.mark.parametrize("tokens", [(3, 7), (1, 1)])
def test_autocast_gives_bfloat16_near_the_float32_result(tokens: tuple[int, int]) -> None:
    ista, x = block(), F.layer_norm(torch.randn(*tokens, 16), (16,)).requires_grad_()
    expected = ista(x)
    gradients = torch.autograd.grad(expected.square().sum(), [x, ista.atoms])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ista(x)
    assert output.dtype == torch.bfloat16
    actual = torch.autograd.grad(output.float().square().sum(), [x, ista.atoms])
    for ours, theirs in zip([output, *actual], [expected, *gradients], strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_the_tap_sees_the_code_and_an_edit_reaches_output_and_gradients() -> None:
    ista, x = block(), torch.randn(2, 5, 16, requires_grad=True)
    factor = torch.tensor(2.0, requires_grad=True)
    plain = ista(x)
    with edit(ista, {"neurons": lambda code: code * factor}), capture(ista, ["neurons"]) as codes:
        edited = ista(x)
    torch.testing.assert_close(edited, 2 * plain)
    torch.testing.assert_close(edited, codes["neurons"] @ ista.atoms)
    codes["neurons"].retain_grad()
    edited.sum().backward()
    torch.testing.assert_close(factor.grad, plain.sum())
    torch.testing.assert_close(codes["neurons"].grad, torch.ones_like(plain) @ ista.atoms.T)


def test_an_edit_in_place_is_refused_in_training_and_works_without_gradients() -> None:
    ista, x = block(), torch.randn(1, 4, 16)

    def clear(code: Tensor) -> Tensor:
        code[..., 3] = 0
        return code

    with edit(ista, {"neurons": clear}):
        with torch.no_grad():
            ista(x)
        output = ista(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
