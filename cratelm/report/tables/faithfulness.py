"""The tables of neurons and autoencoder latents whose scores are multiplied by the share of behaviour kept."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cratelm.report.results.faithfulness import Units
from cratelm.report.results.gather import Results
from cratelm.report.tables.form import Column, Table, written
from cratelm.report.tables.paper import INTERVAL, SCORED


def faithfulness(results: Results, units: Sequence[Units]) -> Table:
    """One row per protocol and kind of units."""
    columns = (
        Column("Protocol"), Column("Units"), Column("Layer", "count"), Column("Score", "0.1", "points"), INTERVAL,
        Column("Undefined = 0", "0.1", "points"), SCORED, Column("Kept", "0.001", "of the model"),
        Column("Adjusted", "0.1", "points"), Column("Kept", "0.001", "of the layer"),
        Column("Adjusted, layer", "0.1", "points"), Column("CE added", "0.001", "nats/token"), Column("FVU", "0.001"),
        Column("L0", "0.1"), Column("Parameters", "human"), Column("Training", "human", "FLOPs"),
    )  # fmt: skip
    rows = []
    for name in results.protocols:
        for one in units:
            if (score := one.scores.get(name)) is not None:
                low, high = score.low, score.high
                rows.append((
                    name, one.title, one.layer, score.points, None if low is None or high is None else (low, high),
                    score.points_undefined_zero, (score.scored, score.total), one.kept("model"),
                    one.adjusted(name, "model"), one.kept("layer"), one.adjusted(name, "layer"),
                    one.evaluation.get("ce_added", 0.0), one.evaluation.get("fvu", 0.0), one.l0,
                    one.parameters, one.training_flops,
                ))  # fmt: skip
    return Table(
        name="faithfulness", caption="Neurons and autoencoders, counting what is left out", columns=columns,
        rows=tuple(rows), notes=tuple(_notes(units)),
    )  # fmt: skip


def faithfulness_summary(results: Results, units: Sequence[Units]) -> Table:
    """What fits a terminal: score and adjusted score by protocol."""

    def both(one: Units, name: str) -> str | None:
        if name not in one.scores or one.scores[name].points is None:
            return None
        return f"{written(one.scores[name].points, '0.1')} → {written(one.adjusted(name, 'model'), '0.1')}"

    return Table(
        name="faithfulness-summary",
        caption="score → score times the share of the model's gain over token frequencies that is kept",
        columns=(
            Column("Units"), Column("Layer", "count"), *(Column(name, "0.1", "points") for name in results.protocols),
            Column("Kept", "0.001"), Column("CE added", "0.001", "nats/token"),
        ),
        rows=tuple(
            (one.title, one.layer, *(both(one, name) for name in results.protocols), one.kept("model"),
             one.evaluation.get("ce_added", 0.0))
            for one in units
        ),
    )  # fmt: skip


def _notes(units: Sequence[Units]) -> Iterator[str]:
    """What the columns mean, and where they mislead."""
    yield (
        "Adjusted is score times kept. Kept of the model: (CE by token frequency - CE with the autoencoder) / (CE by "
        "token frequency - CE), clipped to 0 and 1; neurons keep all. Kept of the layer: the same against the "
        "activation's mean in its place (mean ablation)."
    )
    inflated = [one.title for one in units if one.evaluation and _deletes(one.evaluation)]
    if inflated:
        yield (
            f"Kept of the layer is inflated for {', '.join(inflated)}: no path leads round this activation, so its "
            "mean in its place costs about all that the model knows. Compare CE added and FVU."
        )
    tokens = sorted({one.evaluation["tokens"] for one in units if one.evaluation})
    if tokens:
        yield (
            f"CE added and FVU on {' and '.join(f'{count:,}' for count in tokens)} held-out tokens. Scores are means "
            "over units that have one; latents fire more rarely than neurons, and more of them have none."
        )
    yield (
        "Training FLOPs are the model's (3 forward passes a token) and the autoencoder's, with the forward passes that "
        "make the activations it reads."
    )


def _deletes(evaluation: Mapping[str, Any]) -> bool:
    """Whether the mean in the activation's place costs most of what the model gains over token frequencies."""
    return evaluation["ce_mean"] - evaluation["ce"] >= 0.9 * (evaluation["ce_unigram"] - evaluation["ce"])
