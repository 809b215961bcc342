"""From the scale of prompts to the neuron's own: what simulated activations mean, learnt on excerpts of their own.

    linear        a = slope s + intercept, by least squares; a slope below 0 becomes 0
    percentile    the k-th largest s is given the k-th largest a, and what lies between is interpolated

Correlations do not change by `linear`, but R squared and absolute deviation mean little without. The excerpts are from
documents that were kept for explaining and that the explainer was not shown, so neither the explanation nor the score
knows them.
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
    """The excerpts to learn from: as many top and random ones as are scored, next after those the explainer is shown.

    In `fixed` mode of the explaining half; one of a document that the explainer is shown is left out. In `compat` mode
    of the ranks after those explained and scored; one that overlaps with these is left out.
    """
    part: Part = "explain"
    used = protocol.explain if protocol.mode == "fixed" else (*protocol.explain, *protocol.score)
    draws = []
    for one in protocol.score:
        if one.kind == "quantile" or one.crop is not None:  # all quantile excerpts are shown
            continue
        first = 1 + max((max(other.picks) for other in used if other.kind == one.kind), default=-1)
        picks = tuple(range(first, first + len(one.picks)))
        draws.append(Draw(width=one.width, kind=one.kind, picks=picks))
    found = draw(records, draws, part)
    shown = draw(records, protocol.explain, part)
    taken = _same_document(found, shown)
    if protocol.mode == "compat":
        taken = _overlaps(found, shown) | _overlaps(found, draw(records, protocol.score, "score"))
    kept = ~taken & found.present
    return Excerpts(
        tokens=np.where(kept[..., None], found.tokens, ABSENT),
        activations=np.where(kept[..., None], found.activations, 0).astype(found.activations.dtype),
        position=np.where(kept, found.position, ABSENT), document=np.where(kept, found.document, ABSENT),
    )  # fmt: skip


def _same_document(found: Excerpts, others: Excerpts) -> Bool[np.ndarray, "neurons excerpts"]:
    same = found.document[:, :, None] == others.document[:, None, :]
    return (same & others.present[:, None, :]).any(axis=2)


def _overlaps(found: Excerpts, others: Excerpts) -> Bool[np.ndarray, "neurons excerpts"]:
    distance = np.abs(found.position[:, :, None] - others.position[:, None, :])
    near = distance < max(found.tokens.shape[2], others.tokens.shape[2])
    return (near & others.present[:, None, :]).any(axis=2)
