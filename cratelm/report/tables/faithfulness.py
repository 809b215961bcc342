"""The tables of neurons and autoencoder latents whose scores are multiplied by the share of behaviour kept."""

from collections.abc import Iterator, Sequence

from cratelm.report.results.faithfulness import Units
from cratelm.report.results.gather import Results
from cratelm.report.tables.form import Cell, Column, Table, written
from cratelm.report.tables.paper import INTERVAL, SCORED

FAITHFULNESS_COLUMNS = (
    Column("Protocol"), Column("Units"), Column("Layer", "count"), Column("Score", "0.1", "points"), INTERVAL,
    Column("Undefined = 0", "0.1", "points"), SCORED, Column("Kept", "0.001", "of the model"),
    Column("Adjusted", "0.1", "points"), Column("Kept", "0.001", "of the layer"),
    Column("Adjusted, layer", "0.1", "points"), Column("CE added", "0.001", "nats/token"), Column("FVU", "0.001"),
    Column("L0", "0.1"), Column("Parameters", "human"), Column("Training", "human", "FLOPs"),
)  # fmt: skip


def faithfulness(results: Results, units: Sequence[Units]) -> Table:
    """One row per protocol and kind of units."""
    rows = [_cells(name, one) for name in results.protocols for one in units if name in one.scores]
    return Table(
        name="faithfulness", caption="Scores of neurons and autoencoder latents, adjusted for the behaviour kept",
        columns=FAITHFULNESS_COLUMNS, rows=tuple(rows), notes=tuple(_notes(units)),
    )  # fmt: skip


def _cells(name: str, units: Units) -> tuple[Cell, ...]:
    score = units.scores[name]
    return (
        name, units.title, units.layer, score.points, score.interval, score.points_undefined_zero,
        (score.scored, score.total), units.kept("model"), units.adjusted(name, "model"), units.kept("layer"),
        units.adjusted(name, "layer"), units.evaluation.get("ce_added", 0.0), units.evaluation.get("fvu", 0.0),
        units.l0, units.parameters, units.training_flops,
    )  # fmt: skip


def faithfulness_summary(results: Results, units: Sequence[Units]) -> Table:
    """The short table for a terminal: score and adjusted score by protocol."""

    def adjusted(one: Units, name: str) -> str | None:
        if name not in one.scores or one.scores[name].points is None:
            return None
        return f"{written(one.scores[name].points, '0.1')} → {written(one.adjusted(name, 'model'), '0.1')}"

    return Table(
        name="faithfulness-summary",
        caption="score → score times the share kept of the model's gain over token frequencies",
        columns=(
            Column("Units"), Column("Layer", "count"), *(Column(name, "0.1", "points") for name in results.protocols),
            Column("Kept", "0.001"), Column("CE added", "0.001", "nats/token"),
        ),
        rows=tuple(
            (one.title, one.layer, *(adjusted(one, name) for name in results.protocols), one.kept("model"),
             one.evaluation.get("ce_added", 0.0))
            for one in units
        ),
    )  # fmt: skip


def _notes(units: Sequence[Units]) -> Iterator[str]:
    """The meaning of the columns, and where they mislead."""
    yield (
        "Adjusted is score times kept. Kept of the model: (CE by token frequency - CE with the autoencoder) / (CE by "
        "token frequency - CE), clipped to 0 and 1; 1 for neurons. Kept of the layer: the same relative to mean "
        "ablation of the activation."
    )
    latents = [one for one in units if one.evaluation]
    if inflated := [one.title for one in latents if _has_no_bypass(one)]:
        yield (
            f"Kept of the layer is inflated for {', '.join(inflated)}: no path bypasses this activation, so its mean "
            "ablation costs nearly all of the model's gain. Compare CE added and FVU."
        )
    if tokens := sorted({one.evaluation["tokens"] for one in latents}):
        yield (
            f"CE added and FVU on {' and '.join(f'{count:,}' for count in tokens)} held-out tokens. Scores are means "
            "over the scored units; latents fire more rarely than neurons, so fewer of them have a score."
        )
    yield (
        "Training FLOPs are those of the model (3 forward passes a token) and of the autoencoder, including the "
        "forward passes for the activations that it reads."
    )


def _has_no_bypass(units: Units) -> bool:
    """Whether mean ablation of the activation costs most of the model's gain over token frequencies."""
    ce, ce_mean, ce_unigram = (units.evaluation[name] for name in ("ce", "ce_mean", "ce_unigram"))
    return bool(ce_mean - ce >= 0.9 * (ce_unigram - ce))
