"""Activations as prompts show them: whole numbers from 0 to a top, which is 10.

Two rules are in use, and m is the maximum that counts as 10:

    floor   n(a) = min(10, floor(10 max(a, 0) / m))
    ceil    n(a) = min(10, ceil(10 max(a, 0) / m))

m is taken over the excerpts that are shown together in one prompt. `floor` is OpenAI's and the released code's, and
`compat` has it. It gives 10 to the strongest token alone and 0 to all below a tenth of it, so one outlier among the
excerpts shown hides the rest, and a 0 does not mean silence as the prompt says. `ceil` is Delphi's (with m over all
that is known of the neuron): whatever fires is at least 1. `fixed` has it.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int64

from cratelm.activations.records import Mode

Rounding = Literal["floor", "ceil"]
OWN: dict[Mode, Rounding] = {"fixed": "ceil", "compat": "floor"}
"""What each mode does where nothing else is asked for."""
TOP = 10
"""What the maximum is shown as."""


def normalised(
    activations: Float[np.ndarray, " tokens"], maximum: float, *, rounding: Rounding = "floor", top: int = TOP
) -> Int64[np.ndarray, " tokens"]:
    """Activations as whole numbers; all 0 where the maximum is not positive.

    With a `top` of 9, for models that write 10 as two tokens, a 10 becomes a 9 and nothing else changes.
    """
    if not maximum > 0:
        return np.zeros(len(activations), dtype=np.int64)
    scaled = TOP * np.maximum(activations.astype(np.float64), 0) / maximum
    whole = np.floor(scaled) if rounding == "floor" else np.ceil(scaled)
    return np.minimum(whole, top).astype(np.int64)


def shown_maximum(excerpts: Sequence[Float[np.ndarray, " _"]]) -> float:
    """The largest activation of the excerpts that one prompt shows; 0 where there are none."""
    return max((float(one.max()) for one in excerpts if len(one)), default=0.0)
