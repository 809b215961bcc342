"""The tables of the white-box view: what each layer does to the objective."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cratelm.report.results.whitebox import View, maybe_rate, objective_share, shown_rate
from cratelm.report.tables.form import Cell, Column, Table


def whitebox_tables(views: Sequence[View]) -> tuple[Table, ...]:
    """Compression, sparsification and dictionary: a row per model and layer."""
    measured = [view for view in views if view.found]
    if not measured:
        return ()
    dictionaries = [view for view in measured if any("dictionary" in layer for layer in view.layers)]
    return (_compression(measured), _sparsification(measured), *([_dictionary(dictionaries)] if dictionaries else []))


def _compression(views: Sequence[View]) -> Table:
    columns = (
        Column("Model"), Column("Layer", "count"), Column("R before", "0.1", "nats"), Column("R after", "0.1", "nats"),
        Column("Rᶜ before", "0.1", "nats"), Column("Rᶜ after", "0.1", "nats"),
        Column("ΔR before", "0.1", "nats"), Column("ΔR after", "0.1", "nats"), Column("ΔR change", "0.1", "nats"),
        Column("Sparse objective", "0.1", "nats"),
        Column("Unit Rᶜ before", "0.1", "nats"), Column("Unit Rᶜ after", "0.1", "nats"),
        Column("Tokens per set", "count"), Column("Sets", "count"),
    )  # fmt: skip
    rows = [
        (
            view.title, layer["layer"], layer["rate"]["before"]["mean"], layer["rate"]["after"]["mean"],
            shown_rate(layer, "orthonormal_rate", "before"), shown_rate(layer, "orthonormal_rate", "after"),
            *(maybe_rate(layer, "rate_reduction", when) for when in ("before", "after", "change")),
            maybe_rate(layer, "sparse_objective"),
            shown_rate(layer, "normalised_rate", "before"), shown_rate(layer, "normalised_rate", "after"),
            view.found["tokens_per_set"], view.found["sets"],
        )
        for view, layer in _layers(views)
    ]  # fmt: skip
    return Table(
        name="whitebox_compression", caption="White-box view: compression by attention", columns=columns,
        rows=tuple(rows), notes=(
            "Coding rates of sets of tokens before attention (the normalised input of a layer) and after it (the same "
            "plus what attention adds), so that both are on one scale. R is of the whole, Rᶜ summed over the heads' "
            "subspaces with orthonormal bases; ΔR = R - Rᶜ is the rate reduction, below 0 where subspaces overlap and "
            "Rᶜ counts what they share more than once. The sparse objective is ΔR after attention - lambda ||A||_0, "
            "with A the codes of all tokens of a set, lambda the model's penalty, or 0.1 for GPT-2. Unit Rᶜ has each "
            "token's projection to each head at unit length, as in the released code for CRATE's figures. Of GPT-2 the "
            "subspaces are those of the values.",
        ),
    )  # fmt: skip


def _sparsification(views: Sequence[View]) -> Table:
    steps = max(len(layer["active"]) for view in views for layer in view.layers)
    named = [f"step {step}" for step in range(1, steps + 1)] if steps > 1 else [""]
    columns = (
        Column("Model"), Column("Layer", "count"), *(Column(f"Active {name}".strip(), "0.1", "%") for name in named),
        Column("Hoyer", "0.01"), Column("Dead", "0.1", "%"),
        *(Column(f"Objective {name}".strip(), "0.1", "% of a = 0") for name in named),
        Column("Of possible decrease", "0.1", "%"), Column("Error", "0.01"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for view, layer in _layers(views):
        active = [layer["active"].get(str(step), {}).get("mean") for step in range(1, steps + 1)]
        if len(layer["active"]) == 1:  # of GPT-2 the one there is stands in the last column
            active = [None] * (steps - 1) + active[:1]
        last = max(layer["hoyer"], key=int)
        rows.append((
            view.title, layer["layer"], *(_percent(value) for value in active), layer["hoyer"][last]["mean"],
            _percent(layer["dead"]), *(objective_share(layer, str(step)) for step in range(1, steps + 1)),
            _percent(layer.get("converged")), layer.get("reconstruction_error", {}).get(last, {}).get("mean"),
        ))  # fmt: skip
    return Table(
        name="whitebox_sparsification", caption="White-box view: sparsification", columns=columns, rows=tuple(rows),
        notes=(
            "Active is the share of neurons that are not exactly 0, a mean over tokens; dead are those never active on "
            "the tokens measured. The objective is 1/2 ||x - D a||^2 + lambda ||a||_1 after each ISTA step, relative "
            "to its value at a = 0 (where all but complete dictionaries begin); the possible decrease is what an "
            "unlimited number of steps comes to. "
            "Error is ||x - D a|| / ||x||.",
        ),
    )  # fmt: skip


def _dictionary(views: Sequence[View]) -> Table:
    columns = (
        Column("Model"), Column("Layer", "count"), Column("Step size × ‖D‖²", "0.01"), Column("‖D‖²", "0.1"),
        Column("Coherence", "0.001"), Column("Mean coherence", "0.001"),
        Column("Mean atom length", "0.01"), Column("Support overlap", "0.01"),
        Column("Penalty", "0.001"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for view, layer in _layers(views):
        if (found := layer.get("dictionary")) is not None:
            overlaps = layer.get("support_overlap", {})
            overlap = overlaps[max(overlaps, key=int)]["mean"] if overlaps else None
            rows.append((
                view.title, layer["layer"], max(found["stability"]), found["squared_norm"], found["coherence"],
                found["mean_coherence"], found["atom_norm"][1], overlap, layer["penalty"],
            ))  # fmt: skip
    return Table(
        name="whitebox_dictionary", caption="White-box view: dictionary", columns=columns, rows=tuple(rows),
        notes=(
            "Up to a step size × ‖D‖² of 1 no ISTA step raises the objective; above 2 gradient steps are unstable. "
            "Coherence is the largest cosine of two atoms, without its sign, and mean coherence the mean over atoms of "
            "each one's largest. Support overlap: of the last two steps, neurons active in both / in either.",
        ),
    )  # fmt: skip


def _layers(views: Sequence[View]) -> Iterator[tuple[View, Mapping[str, Any]]]:
    yield from ((view, layer) for view in views for layer in view.layers)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
