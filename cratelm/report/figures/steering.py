"""Figures of steering: effect on the next token, sweep over strengths, ablation, ledger of a logit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cratelm.interpretation.lookup.tables import legible
from cratelm.report.figures.form import FAINT, INK, drawing, note
from cratelm.report.shown_text import visible
from cratelm.steering.effects import Effect, SweepPoint, token_rows, token_text
from cratelm.steering.ledger_rows import LedgerRow

RISE, FALL, OTHER = "#0072B2", "#D55E00", "#999999"
"""Okabe and Ito's blue and vermilion, distinguishable with any colour vision."""
SHOWN, LINES = 10, 6
LONGEST_LABEL, LONGEST_TEXT = 16, 66
NOTE_ROOM = 0.62
"""Width for the notes next to the bars, as a fraction of the bars' width."""


def effect_figure(effects: Mapping[str, Effect], strings: Sequence[str], title: str) -> Figure:
    """Largest increases and decreases of the next token's probability: a row of two panels per effect."""
    with drawing(7.4, 0.55 + 2.75 * len(effects)) as figure:
        _set_title(figure, title, 92)
        panels = figure.subplots(len(effects), 2, squeeze=False)
        for row, (name, effect) in zip(panels, effects.items(), strict=True):
            for axes, decreases in zip(row, (False, True), strict=True):
                _draw_effect(axes, effect, strings, decreases=decreases)
                axes.set_title(f"{name}: {'less' if decreases else 'more'} probable", fontweight="normal", fontsize=9)
    return figure


def _draw_effect(axes: Axes, effect: Effect, strings: Sequence[str], *, decreases: bool) -> None:
    rows = token_rows(effect, effect.largest(SHOWN, decreases=decreases), strings)
    change = np.array([100 * (row["after"] - row["before"]) for row in rows])
    error = [100 * (row["standard_error"] or 0) for row in rows] if effect.texts > 1 else None
    _bars(
        axes, [label(row["text"]) for row in rows], change, FALL if decreases else RISE, error=error,
        notes=[f"{_percent(row['before'])} → {_percent(row['after'])}" for row in rows],
    )  # fmt: skip
    axes.set_xlabel("change of probability (percentage points)")


def ledger_figure(rows: Sequence[LedgerRow], title: str, total: float) -> Figure:
    """Contributions to a logit as bars, neurons first, then the named terms."""
    with drawing(6.6, 1.2 + 0.21 * len(rows)) as figure:
        axes = figure.add_subplot()
        values = np.array([row.contribution for row in rows])
        colors = [OTHER if row.neuron is None else RISE if row.contribution > 0 else FALL for row in rows]
        _bars(axes, [_cut(visible(row.name), 44) for row in rows], values, colors, notes=[f"{v:+.3f}" for v in values])
        axes.set_title(_cut(title, 80))
        axes.set_xlabel(f"contribution to the logit; sum {total:.3f}")
    return figure


def sweep_figure(points: Sequence[SweepPoint], strings: Sequence[str], title: str, unit: str) -> Figure:
    """Probability of the tokens that the strongest changes raise most, against strength, next to the continuations."""
    with drawing(10.4, max(3.4, 1.1 + 0.36 * len(points))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        _set_title(figure, title, 120)
        tokens = _most_raised(points)
        values = [point.value for point in points]
        for number, token in enumerate(tokens):
            chance = [100 * point.effect.after[token] for point in points]
            left.plot(
                values, chance, marker="o^sDvP"[number % 6], markersize=4, linewidth=1.4,
                color=f"C{number}", label=label(token_text(token, strings)),
            )  # fmt: skip
        left.set_xlabel(f"strength ({unit})")
        left.set_ylabel("probability of the next token (%)")
        left.set_ylim(bottom=0)
        if tokens:
            left.legend(loc="best", ncols=2)
        right.axis("off")
        right.set_xlim(0, 1)
        right.set_ylim(len(points), -1)
        right.text(0.0, -0.6, "strength", color=FAINT)
        right.text(0.14, -0.6, "continuation", color=FAINT)
        for row, point in enumerate(points):
            right.text(0.0, row + 0.15, point.strength, ha="left", va="center")
            right.text(0.14, row + 0.15, _cut(visible(point.text), LONGEST_TEXT), va="center", fontsize=7.5)
    return figure


def ablation_figure(
    nats: Sequence[float], densities: Sequence[float], scores: Sequence[float | None], title: str
) -> Figure | None:
    """Change of loss of each neuron against its density and, if any neuron has a score, against its score."""
    if not len(nats):
        return None
    loss = np.array(nats, dtype=np.float64)
    scored = np.array([np.nan if score is None else score for score in scores], dtype=np.float64)
    panels = 1 + bool(np.isfinite(scored).any())
    with drawing(1.0 + 3.6 * panels, 3.5) as figure:
        _set_title(figure, title, 92)
        axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
        _scatter(axes[0], 100 * np.array(densities, dtype=np.float64), loss)
        axes[0].set_xscale("symlog", linthresh=0.01, linscale=0.4)
        axes[0].set_xticks([0, 0.01, 0.1, 1, 10, 100])
        axes[0].xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
        axes[0].minorticks_off()
        axes[0].set_xlabel("density (% of tokens)")
        axes[0].set_ylabel("change of loss (nats per token)")
        if panels > 1:
            _scatter(axes[1], 100 * scored, loss)
            axes[1].set_xlabel("score (points)")
    return figure


def _scatter(axes: Axes, x: np.ndarray, loss: np.ndarray) -> None:
    axes.axhline(0, color=FAINT, linewidth=0.8)
    for side, color in ((loss > 0, RISE), (loss <= 0, FALL)):
        axes.plot(x[side], loss[side], "o", color=color, markersize=3.4, alpha=0.6, markeredgewidth=0)
    reach = max(float(np.abs(loss).max()), 1e-12)
    axes.set_yscale("symlog", linthresh=max(float(np.median(np.abs(loss))), reach * 1e-4), linscale=0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{nats:g}"))
    axes.minorticks_off()


def _bars(
    axes: Axes, labels: Sequence[str], values: np.ndarray, color: Any, *, notes: Sequence[str],
    error: Sequence[float] | None = None,
) -> None:  # fmt: skip
    """Horizontal bars from top to bottom, each with a note at its end."""
    rows = list(range(len(values)))
    axes.grid(False)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.barh(
        rows, values, color=color, height=0.72, xerr=error,
        error_kw={"ecolor": INK, "elinewidth": 0.8, "capsize": 2, "capthick": 0.8},
    )  # fmt: skip
    axes.set_yticks(rows, labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if not len(values):
        note(axes, "none")
        axes.set_xticks([])
        return
    spread = np.zeros(len(values)) if error is None else np.asarray(error)
    low, high = min(float((values - spread).min()), 0.0), max(float((values + spread).max()), 0.0)
    room = (high - low or 1) * NOTE_ROOM
    axes.set_xlim(low * 1.03, high + room)
    for row, value, text, margin in zip(rows, values, notes, spread, strict=True):
        # To the right of the bar; for negative bars, to the right of the axis.
        x = max(value + margin, 0.0) + room * 0.06
        axes.text(x, row, text, va="center", ha="left", fontsize=7, color=INK, in_layout=False)


def _most_raised(points: Sequence[SweepPoint]) -> list[int]:
    """Tokens that rise most at the first or the last strength."""
    if not points:
        return []
    tokens = [int(token) for point in (points[-1], points[0]) for token in point.effect.largest(LINES)]
    ends = np.maximum(points[-1].effect.change, points[0].effect.change)
    return sorted(dict.fromkeys(tokens), key=lambda token: -ends[token])[:LINES]


def _set_title(figure: Figure, title: str, length: int) -> None:
    figure.suptitle(_cut(title, length), fontsize=10, fontweight="bold", x=0.01, ha="left")


def label(token: str) -> str:
    """A token as the label of a bar."""
    return _cut(visible(legible(token)), LONGEST_LABEL)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
