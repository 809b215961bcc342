"""Activations as prompts show them: whole numbers from 0 to a top, which is 10.

Two rules are in use, and m is the maximum that counts as 10:

    floor   n(a) = min(10, floor(10 max(a, 0) / m))
    ceil    n(a) = min(10, ceil(10 max(a, 0) / m))

m is taken over the excerpts of one prompt. `floor` is the rule of OpenAI and of the released code, and of `compat`. It
gives 10 to the strongest token alone and 0 to all tokens below a tenth of it, so one outlier hides the rest, and a 0
does not mean silence as the prompt says. `ceil` is Delphi's rule (with m over all records of the neuron), and that of
`fixed`: every token on which the neuron fires gets at least 1.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64

from cratelm.activations.records import Mode

Rounding = Literal["floor", "ceil"]
OWN: dict[Mode, Rounding] = {"fixed": "ceil", "compat": "floor"}
"""The default of each mode."""
_TOP = 10
"""The number that stands for the maximum."""


def normalised(
    activations: Float[np.ndarray, " tokens"], maximum: float, *, rounding: Rounding = "floor", top: int = _TOP
) -> Int64[np.ndarray, " tokens"]:
    """Activations as whole numbers; all 0 where the maximum is not positive.

    With a `top` of 9, for models that write 10 as two tokens, a 10 becomes a 9 and nothing else changes.
    """
    if not maximum > 0:
        return np.zeros(len(activations), dtype=np.int64)
    scaled = _TOP * np.maximum(activations.astype(np.float64), 0) / maximum
    whole = np.floor(scaled) if rounding == "floor" else np.ceil(scaled)
    return np.minimum(whole, top).astype(np.int64)


def shown_maximum(excerpts: Sequence[Float[np.ndarray, " _"]]) -> float:
    """The largest activation of the excerpts that one prompt shows; 0 where there are none."""
    return max((float(activations.max()) for activations in excerpts if len(activations)), default=0.0)
