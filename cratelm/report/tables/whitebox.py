"""The white-box view in tables: what each layer does to the objective, read from whitebox.json of each run."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cratelm.errors import CrateError
from cratelm.report.results.gather import RunResult, run_titles
from cratelm.report.tables.paper import Cell, Column, Table
from cratelm.rundir import read_json, read_jsonl

FILE = "whitebox.json"
SHOWN = ("shared", "value")
"""Which projection of the heads tables and figures show: MSSA's only one, or what GPT-2's attention moves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """The white-box view of one run."""

    title: str
    name: str
    arch: str
    of: str | None
    """For a control, the name of the model it controls."""
    found: Mapping[str, Any] = field(repr=False)
    """whitebox.json; empty for a run that has none."""
    curves: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(repr=False)
    """Measured along the training: name such as `layer_0.active` -> (tokens seen, values)."""

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:
        """The measurements of each layer."""
        return self.found.get("layers", ())


def open_views(runs: Sequence[Path]) -> list[View]:
    """The views of run directories that `cratelm whitebox` has measured."""
    descriptions = [read_json(run / "run.json", made_by=f"cratelm train --out {run} --data DIR") for run in runs]
    return [
        _view(run, title, description)
        for run, title, description in zip(runs, run_titles(runs, descriptions), descriptions, strict=True)
    ]


def views_of(rows: Sequence[RunResult]) -> list[View]:
    """The views of the runs of a report, those that have any."""
    first = {run.path: run for run in reversed(rows)}  # a run has a row for each of its taps
    made = [
        _view(run.path, run.title, {"name": run.name, "arch": run.arch, "of": run.of if run.control else None})
        for run in reversed(first.values())
    ]
    return [one for one in made if one.found or one.curves]


def _view(run: Path, title: str, description: Mapping[str, Any]) -> View:
    path = run / FILE
    found = read_json(path, made_by=f"cratelm whitebox {run} --data DIR") if path.exists() else {}
    if found and any("rate" not in layer for layer in found["layers"]):
        raise CrateError(f"{path} lacks a coding rate. Remove it and run: cratelm whitebox {run} --data DIR")
    return View(
        title=title, name=str(description["name"]), arch=str(description["arch"]), of=description.get("of"),
        found=found, curves=_curves(run),
    )  # fmt: skip


def _curves(run: Path) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """What `cratelm train --measure whitebox` logged."""
    if not os.path.exists(run / "metrics.jsonl"):
        return {}
    rows = read_jsonl(run / "metrics.jsonl")
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("whitebox/"))
    found = {}
    for name in names:
        points = [(float(row["tokens"]), float(row[name])) for row in rows if row.get(name) is not None]
        tokens, values = zip(*points, strict=True)
        found[name.removeprefix("whitebox/")] = (tokens, values)
    return found


def shown_rate(layer: Mapping[str, Any], kind: str, when: str) -> float:
    """The mean of a rate of the heads, by the projection that is shown."""
    rates = layer[kind][when]
    return float(next(rates[name] for name in SHOWN if name in rates)["mean"])


def maybe_rate(layer: Mapping[str, Any], *path: str) -> float | None:
    """The mean of a number of the heads at such a path, by the projection that is shown; None in files without it."""
    rates: Any = layer
    for step in path:
        rates = rates.get(step, {})
    return next((float(rates[name]["mean"]) for name in SHOWN if name in rates), None)


def objective_share(layer: Mapping[str, Any], step: str) -> float | None:
    """The LASSO objective after a step over that of a code of zeros, in %; of what it begins from in older files."""
    found = layer.get("objective", {})
    if step not in found:
        return None
    zero = layer.get("objective_at_zero", found["0"])["mean"]
    return 100 * float(found[step]["mean"]) / float(zero) if zero else None


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
