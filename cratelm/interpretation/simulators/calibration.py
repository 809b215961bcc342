"""Calibrate simulated activations: map them from the scale of prompts to the neuron's own units.

    linear        a = slope s + intercept, by least squares; a slope below 0 becomes 0
    percentile    the k-th largest s gets the k-th largest a; values between them are interpolated

`linear` does not change correlations, but R squared and absolute deviation need a calibration. It is fitted on separate
excerpts: of the explaining half, from documents that the explainer was not shown.
"""

import numpy as np
from jaxtyping import Bool, Float, Float64

from cratelm.activations.records import ABSENT, Excerpts, LayerRecords
from cratelm.interpretation.protocols import Draw, Part, Protocol, draw
from cratelm.interpretation.store.identities import CalibrationMethod


def calibrated(
    method: CalibrationMethod, simulated: Float[np.ndarray, " tokens"], *, fit_on: Float[np.ndarray, " fitted"],
    activations: Float[np.ndarray, " fitted"],
) -> Float64[np.ndarray, " tokens"]:  # fmt: skip
    """Simulated activations in the neuron's own units, fitted on tokens of which both activations are known.

    Constant if there are none of them, or if all are simulated alike. Outside the fitted range `percentile` is level.
    """
    s, a = fit_on.astype(np.float64), activations.astype(np.float64)
    assert len(s) == len(a), f"{len(s)} simulated activations of {len(a)} tokens"
    if len(s) == 0 or np.ptp(s) == 0:
        return np.full(len(simulated), a.mean() if len(a) else 0.0)
    if method == "linear":
        centred = s - s.mean()
        slope = max(float(centred @ (a - a.mean()) / (centred @ centred)), 0.0)
        return a.mean() + slope * (simulated.astype(np.float64) - s.mean())
    points, places, times = np.unique(np.sort(s), return_inverse=True, return_counts=True)
    # Tokens simulated alike share the activations of their ranks.
    return np.interp(simulated, points, np.bincount(places, weights=np.sort(a)) / times).astype(np.float64)


def calibration_excerpts(records: LayerRecords, protocol: Protocol) -> Excerpts:
    """The excerpts to fit on: as many top and random ones as are scored, next in rank after the explainer's excerpts.

    `fixed` takes them from the explaining half, without documents that the explainer was shown; `compat` from the ranks
    after the explaining and scoring ones, without excerpts that overlap with these.
    """
    part: Part = "explain"
    used = protocol.explain if protocol.mode == "fixed" else (*protocol.explain, *protocol.score)
    draws = []
    for scored in protocol.score:
        if scored.kind == "quantile" or scored.crop is not None:  # all quantile excerpts are shown
            continue
        first = 1 + max((max(other.picks) for other in used if other.kind == scored.kind), default=-1)
        picks = tuple(range(first, first + len(scored.picks)))
        draws.append(Draw(width=scored.width, kind=scored.kind, picks=picks))
    excerpts = draw(records, draws, part)
    shown = draw(records, protocol.explain, part)
    taken = _same_document(excerpts, shown)
    if protocol.mode == "compat":
        taken = _overlaps(excerpts, shown) | _overlaps(excerpts, draw(records, protocol.score, "score"))
    usable = ~taken & excerpts.present
    return Excerpts(
        tokens=np.where(usable[..., None], excerpts.tokens, ABSENT),
        activations=np.where(usable[..., None], excerpts.activations, 0).astype(excerpts.activations.dtype),
        position=np.where(usable, excerpts.position, ABSENT), document=np.where(usable, excerpts.document, ABSENT),
    )  # fmt: skip


def _same_document(excerpts: Excerpts, others: Excerpts) -> Bool[np.ndarray, "neurons excerpts"]:
    same = excerpts.document[:, :, None] == others.document[:, None, :]
    return (same & others.present[:, None, :]).any(axis=2)


def _overlaps(excerpts: Excerpts, others: Excerpts) -> Bool[np.ndarray, "neurons excerpts"]:
    distance = np.abs(excerpts.position[:, :, None] - others.position[:, None, :])
    near = distance < max(excerpts.tokens.shape[2], others.tokens.shape[2])
    return (near & others.present[:, None, :]).any(axis=2)
