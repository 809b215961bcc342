"""CRATE and GPT-2 once more, from their formulas alone: float64, one token, one head, one layer at a time.

ISTA is written as the released code has it, with five matrix products. Nothing here is fast or imports our models.
"""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

Weights = Mapping[str, np.ndarray]
EPSILON, STEP, PENALTY = 1e-5, 0.1, 0.1


def crate(
    weights: Weights, tokens: Int[np.ndarray, " seq"], *, layers: int, heads: int, steps: int = 2
) -> tuple[Float[np.ndarray, "seq vocab"], list[Float[np.ndarray, "seq neurons"]]]:
    """Logits of one sequence, and the code of each layer."""
    x, codes = embed(weights, tokens), []
    for layer in range(layers):
        name = f"blocks.{layer}"
        w = norm(weights, f"{name}.norm_1", x) @ weights[f"{name}.mssa.subspaces.weight"].T
        y = attend(w, w, w, heads)
        z = x + y @ weights[f"{name}.mssa.output.weight"].T + weights[f"{name}.mssa.output.bias"]
        dictionary = weights[f"{name}.ista.atoms"].T  # atoms are columns
        code = np.stack([ista(dictionary, row, steps) for row in norm(weights, f"{name}.norm_2", z)])
        x = code @ dictionary.T
        codes.append(code)
    return norm(weights, "norm", x) @ weights["embedding.weight"].T, codes


def gpt2(
    weights: Weights, tokens: Int[np.ndarray, " seq"], *, layers: int, heads: int, activation: str
) -> tuple[Float[np.ndarray, "seq vocab"], list[Float[np.ndarray, "seq neurons"]]]:
    """Logits of one sequence, and the MLP's activations of each layer."""
    x, codes = embed(weights, tokens), []
    for layer in range(layers):
        name = f"blocks.{layer}"
        q, k, v = np.split(
            linear(weights, f"{name}.attention.query_key_value", norm(weights, f"{name}.norm_1", x)), 3, axis=1
        )
        z = x + linear(weights, f"{name}.attention.output", attend(q, k, v, heads))
        up = linear(weights, f"{name}.mlp.up", norm(weights, f"{name}.norm_2", z))
        code = np.maximum(up, 0) if activation == "relu" else tanh_gelu(up)
        x = z + linear(weights, f"{name}.mlp.down", code)
        codes.append(code)
    return norm(weights, "norm", x) @ weights["embedding.weight"].T, codes


def ista(
    dictionary: Float[np.ndarray, "d_model neurons"], x: Float[np.ndarray, " d_model"], steps: int
) -> Float[np.ndarray, " neurons"]:
    """a <- ReLU(a + eta (D^T x - D^T D a) - eta lambda), from a = 0."""
    code = np.maximum(STEP * dictionary.T @ x - STEP * PENALTY, 0)
    for _ in range(steps - 1):
        gradient = dictionary.T @ x - dictionary.T @ (dictionary @ code)
        code = np.maximum(code + STEP * gradient - STEP * PENALTY, 0)
    return code


def attend(
    q: Float[np.ndarray, "seq width"], k: Float[np.ndarray, "seq width"], v: Float[np.ndarray, "seq width"], heads: int
) -> Float[np.ndarray, "seq width"]:
    """Softmax attention of each token to itself and the past."""
    size = q.shape[1] // heads
    result = np.zeros_like(v)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for t in range(len(q)):
            scores = np.array([q[t, part] @ k[s, part] / math.sqrt(size) for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            result[t, part] = (weights / weights.sum()) @ v[: t + 1, part]
    return result


def embed(weights: Weights, tokens: Int[np.ndarray, " seq"]) -> Float[np.ndarray, "seq d_model"]:
    """Token plus position."""
    return np.stack(
        [weights["embedding.weight"][token] + weights["positions.weight"][t] for t, token in enumerate(tokens)]
    )


def linear(weights: Weights, name: str, x: Float[np.ndarray, "seq inner"]) -> Float[np.ndarray, "seq outer"]:
    """W x, and the bias if there is one."""
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)


def norm(weights: Weights, name: str, x: Float[np.ndarray, "seq d_model"]) -> Float[np.ndarray, "seq d_model"]:
    """LayerNorm."""
    rows = [(row - row.mean()) / math.sqrt(((row - row.mean()) ** 2).mean() + EPSILON) for row in x]
    return np.stack(rows) * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    """OpenAI's approximation of GELU."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
