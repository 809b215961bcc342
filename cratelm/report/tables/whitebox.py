"""The tables of the white-box view: what each layer does to the objective."""

from collections.abc import Sequence

from cratelm.report.results.whitebox import (
    View,
    last_step,
    maybe_rate,
    objective_per_token,
    objective_share,
    penalty_term,
    shown_rate,
)
from cratelm.report.tables.form import Cell, Column, Table


def whitebox_tables(views: Sequence[View]) -> tuple[Table, ...]:
    """Compression, sparsification and dictionary: a row per model and layer."""
    measured = [view for view in views if view.measurements]
    if not measured:
        return ()
    tables = (_compression(measured), _sparsification(measured), _dictionary(measured))
    return tuple(table for table in tables if table.rows)


def _compression(views: Sequence[View]) -> Table:
    columns = (
        Column("Model"), Column("Layer", "count"), Column("R before", "0.1", "nats"), Column("R after", "0.1", "nats"),
        Column("Rᶜ before", "0.1", "nats"), Column("Rᶜ after", "0.1", "nats"),
        Column("ΔR before", "0.1", "nats"), Column("ΔR after", "0.1", "nats"), Column("ΔR change", "0.1", "nats"),
        Column("Penalty per token", "0.1", "nats"), Column("Objective per token", "0.1", "nats"),
        Column("Sparse objective", "0.1", "nats"),
        Column("Unit Rᶜ before", "0.1", "nats"), Column("Unit Rᶜ after", "0.1", "nats"),
        Column("Tokens per set", "count"), Column("Sets", "count"),
    )  # fmt: skip
    rows = [
        (
            view.title, layer["layer"], layer["rate"]["before"]["mean"], layer["rate"]["after"]["mean"],
            shown_rate(layer, "orthonormal_rate", "before"), shown_rate(layer, "orthonormal_rate", "after"),
            *(maybe_rate(layer, "rate_reduction", when) for when in ("before", "after", "change")),
            penalty_term(layer), objective_per_token(layer), maybe_rate(layer, "sparse_objective"),
            shown_rate(layer, "normalised_rate", "before"), shown_rate(layer, "normalised_rate", "after"),
            view.measurements["tokens_per_set"], view.measurements["sets"],
        )
        for view in views for layer in view.layers
    ]  # fmt: skip
    return Table(
        name="whitebox_compression", caption="White-box view: compression by attention", columns=columns,
        rows=tuple(rows), notes=(
            "Coding rates of sets of tokens before attention (the normalised input of a layer) and after it (that "
            "input plus the output of attention), so that both have one scale. R is the rate of the whole tokens, Rᶜ "
            "the sum over the heads' subspaces with orthonormal bases; ΔR = R - Rᶜ is the rate reduction, below 0 "
            "where subspaces overlap and Rᶜ counts the overlap more than once. The penalty per token is lambda "
            "||A||_0 / N with A the codes of the N tokens of a set and lambda the model's penalty (0.1 for GPT-2); the "
            "objective per token is ΔR after attention minus it, both per token. The sparse objective is the paper's "
            "form ΔR - lambda ||A||_0, whose second term is a sum over N tokens: its trend over layers depends on N, "
            "the tokens per set. Unit Rᶜ scales each token's projection to each head to unit length, as the released "
            "code for CRATE's figures does. GPT-2's subspaces are its value projections.",
        ),
    )  # fmt: skip


def _sparsification(views: Sequence[View]) -> Table:
    steps = max(len(layer["active"]) for view in views for layer in view.layers)
    names = [f" step {step}" for step in range(1, steps + 1)] if steps > 1 else [""]
    columns = (
        Column("Model"), Column("Layer", "count"), *(Column(f"Active{name}", "0.1", "%") for name in names),
        Column("Hoyer", "0.01"), Column("Dead", "0.1", "%"),
        *(Column(f"Objective{name}", "0.1", "% of a = 0") for name in names),
        Column("Of possible decrease", "0.1", "%"), Column("Error", "0.01"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for view in views:
        for layer in view.layers:
            active = [layer["active"].get(str(step), {}).get("mean") for step in range(1, steps + 1)]
            if len(layer["active"]) == 1:  # GPT-2 has no steps: its share belongs into the last column
                active = [None] * (steps - 1) + active[:1]
            rows.append((
                view.title, layer["layer"], *(_percent(share) for share in active), last_step(layer, "hoyer"),
                _percent(layer["dead"]), *(objective_share(layer, str(step)) for step in range(1, steps + 1)),
                _percent(layer.get("converged")), last_step(layer, "reconstruction_error"),
            ))  # fmt: skip
    return Table(
        name="whitebox_sparsification", caption="White-box view: sparsification", columns=columns, rows=tuple(rows),
        notes=(
            "Active is the share of neurons that are not exactly 0, a mean over tokens; dead neurons were not active "
            "on any token. The objective is 1/2 ||x - D a||^2 + lambda ||a||_1 after each ISTA step, relative to its "
            "value at a = 0 (the start of all dictionaries except complete ones); the possible decrease is that of an "
            "unlimited number of steps. Error is ||x - D a|| / ||x||.",
        ),
    )  # fmt: skip


def _dictionary(views: Sequence[View]) -> Table:
    columns = (
        Column("Model"), Column("Layer", "count"), Column("Step size × ‖D‖²", "0.01"), Column("‖D‖²", "0.1"),
        Column("Coherence", "0.001"), Column("Mean coherence", "0.001"),
        Column("Mean atom length", "0.01"), Column("Support overlap", "0.01"),
        Column("Penalty", "0.001"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = [
        (
            view.title, layer["layer"], max(dictionary["stability"]), dictionary["squared_norm"],
            dictionary["coherence"], dictionary["mean_coherence"], dictionary["atom_norm"][1],
            last_step(layer, "support_overlap"), layer["penalty"],
        )
        for view in views for layer in view.layers if (dictionary := layer.get("dictionary")) is not None
    ]  # fmt: skip
    return Table(
        name="whitebox_dictionary", caption="White-box view: dictionary", columns=columns, rows=tuple(rows),
        notes=(
            "Up to a step size × ‖D‖² of 1 no ISTA step raises the objective; above 2 gradient steps are unstable. "
            "Coherence is the largest |cosine| of two atoms, and mean coherence the mean over atoms of each atom's "
            "largest |cosine|. Support overlap: neurons active in both of the last two steps / in either.",
        ),
    )  # fmt: skip


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
