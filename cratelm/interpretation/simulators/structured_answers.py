"""The activations in the answer of a structured simulator: JSON in which each token comes back once and unchanged."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from cratelm.interpretation.explainers.answers import quoted
from cratelm.interpretation.llm import LLMError
from cratelm.interpretation.prompts.escaping import escaped, unescaped


def structured_activations(answer: str, tokens: Sequence[str]) -> Float64[np.ndarray, " _"]:
    """The activations in an answer. Raises `LLMError`, with the answer, where it is not what was asked for."""
    fenced = re.search(r"```(?:json)?\s*\n(.*?)```", answer, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else answer, strict=False)  # a line break as it is
    except json.JSONDecodeError as error:
        raise LLMError(f"the answer is no JSON ({error.msg}): {quoted(answer)}") from None
    rows = found.get("activations") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LLMError(f"the answer has no list of activations: {quoted(answer)}")
    if len(rows) != len(tokens):
        raise LLMError(f"the answer has {len(rows)} activations for {len(tokens)} tokens: {quoted(answer)}")
    for number, (row, token) in enumerate(zip(rows, tokens, strict=True), 1):
        if not _is_token(row.get("token"), token):
            raise LLMError(f"token {number} is {token!r}, and the answer has {row.get('token')!r}: {quoted(answer)}")
        value = row.get("activation")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
            raise LLMError(
                f"the activation of token {number} is {value!r}, not a number from 0 to 10: {quoted(answer)}"
            )
    return np.array([float(row["activation"]) for row in rows])


def _is_token(said: Any, token: str) -> bool:
    r"""Whether an answer spells a token, as it was given or without escapes: a line break for `\n`."""
    return isinstance(said, str) and token in (said, escaped(said)) or said == unescaped(token)
