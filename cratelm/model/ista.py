"""ISTA as one differentiable operation: the arithmetic behind `crate.ISTA`, forward and backward.

Autograd on the formulas as they are written gives the same numbers, more slowly: it keeps and walks over every
elementwise intermediate, each as large as the code. Here the forward pass of two steps takes 3 matrix products (the
decoder's is the fourth), the backward pass 6 (the decoder's are two more), everything elementwise happens in place, and
the gradient of the dictionary is accumulated into one buffer by the matrix products themselves.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_relu_backward = torch.ops.aten.threshold_backward.grad_input


def sparse_code(
    x: Float[Tensor, "*tokens d_model"],
    atoms: Float[Tensor, "neurons d_model"],
    step_sizes: Float[Tensor, " steps"],
    thresholds: Float[Tensor, " steps #neurons"],
    *,
    from_input: bool = False,
    recompute: bool = False,
) -> Float[Tensor, "*tokens neurons"]:
    """The code of each token after proximal gradient steps t = 1, 2, ... on 1/2 ||x - D a||^2 + a weighted L1 norm.

        a_t = ReLU( a_{t-1} + eta_t D^T (x - D a_{t-1}) - theta_t )

    from a_0 = 0, or from a_0 = x (`from_input`, for a square dictionary). `atoms` is D^T. Gradients flow to x, atoms,
    step sizes and thresholds, once (there is no second derivative). Under autocast the products run in its type.

    Every a_t and every residual x - D a_{t-1} is kept for the backward pass. With `recompute` only the residuals are,
    which are `neurons / d_model` times smaller, and the last code, which the decoder keeps anyway: each earlier code
    then costs one more matrix product, 13 instead of 12 in all for two steps.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, atoms = x.to(dtype), atoms.to(dtype)
    code = _SparseCode.apply(x.flatten(0, -2), atoms, step_sizes, thresholds, from_input, recompute)
    return code.unflatten(0, x.shape[:-1])


class _SparseCode(torch.autograd.Function):
    """`sparse_code` of (tokens, d_model), by hand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, atoms: Tensor, step_sizes: Tensor, thresholds: Tensor, from_input: bool, recompute: bool
    ) -> Tensor:
        codes, pushes = ([x] if from_input else []), []  # a_{t-1} and eta_t (x - D a_{t-1})
        for step_size, threshold in zip(step_sizes, thresholds, strict=True):
            residual = torch.addmm(x, codes[-1], atoms, alpha=-1) if codes else x
            pushes.append(residual * step_size.to(x.dtype))
            codes.append(_step(codes[-1] if codes else None, pushes[-1], atoms, threshold))
        ctx.from_input, ctx.recompute = from_input, recompute
        saved = [*codes[: int(from_input)], codes[-1]] if recompute else codes
        ctx.save_for_backward(atoms, step_sizes, thresholds, *pushes, *saved)
        return codes[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Walk the steps back. With p the gradient before the ReLU of step t, r = x - D a_{t-1} and u = eta D p:

        d x += u,   d a_{t-1} = p - D^T u,   d D^T += p (eta r)^T - a_{t-1} u^T,   d eta = <D p, r>,   d theta = -p
        """
        atoms, step_sizes, thresholds, *rest = ctx.saved_tensors
        steps = len(step_sizes)
        pushes, codes = rest[:steps], rest[steps:]
        if ctx.recompute:
            last = codes.pop()
            for push, threshold in zip(pushes[:-1], thresholds[:-1], strict=True):
                codes.append(_step(codes[-1] if codes else None, push, atoms, threshold))
            codes.append(last)
        before = codes[:-1] if ctx.from_input else [None, *codes[:-1]]
        after = codes[-steps:]
        d_atoms, d_x = torch.empty_like(atoms), torch.zeros_like(pushes[0])
        d_step_sizes, d_thresholds = torch.zeros_like(step_sizes), torch.zeros_like(thresholds)
        _, needs_atoms, needs_steps, needs_thresholds, *_ = ctx.needs_input_grad
        for t in reversed(range(steps)):
            buffer = torch.empty_like(gradient) if t == steps - 1 else gradient  # the first one is autograd's
            p = _relu_backward(gradient, after[t], 0, grad_input=buffer)
            u = torch.mm(p, atoms)
            if needs_steps:
                d_step_sizes[t] = (u * pushes[t]).sum(dtype=step_sizes.dtype) / step_sizes[t]
            if needs_thresholds:
                d_thresholds[t] = -p.sum(0, dtype=thresholds.dtype).sum_to_size(thresholds[t].shape)
            u.mul_(step_sizes[t].to(u.dtype))
            d_x.add_(u)
            if needs_atoms:
                _add_product(d_atoms, p.T, pushes[t], beta=0 if t == steps - 1 else 1)
            if before[t] is not None:
                if needs_atoms:
                    _add_product(d_atoms, before[t].T, u, alpha=-1)
                gradient = _add_product(p, u, atoms.T, alpha=-1)
        if ctx.from_input:
            d_x.add_(gradient)
        return d_x, d_atoms if needs_atoms else None, d_step_sizes, d_thresholds, None, None


def _step(code: Tensor | None, push: Tensor, atoms: Tensor, threshold: Tensor) -> Tensor:
    """ReLU(code + D^T push - threshold); no code means zero."""
    threshold = threshold.to(push.dtype)
    if code is None:
        return torch.mm(push, atoms.T).sub_(threshold).relu_()
    return _add_product(torch.sub(code, threshold), push, atoms.T).relu_()


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, alpha: int = 1, beta: int = 1) -> Tensor:
    """total = beta total + alpha left right, in place; written so that torch's FLOP counter sees it."""
    return torch.addmm(total, left, right, alpha=alpha, beta=beta, out=total)
