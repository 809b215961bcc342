"""Runs that differ only in their seed: means with intervals over seeds, and differences between variants.

A variant is a model configuration without its size; a group is a variant at one size, with all its seeds. Two variants
are compared at equal size, at equal parameters, and at equal FLOPs. For the last two the other variant's scores are
interpolated between its sizes (linearly in the logarithm of the cost), seed by seed; outside the range of its sizes
there is no difference.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

import numpy as np

from cratelm.interpretation.scoring.small_samples import student
from cratelm.report.results.descriptions import display_name
from cratelm.report.results.gather import Results, RunResult
from cratelm.rundir import read_json

Basis = Literal["size", "parameters", "FLOPs"]

BASES: tuple[Basis, ...] = ("size", "parameters", "FLOPs")

SIZE_FIELDS = ("num_layers", "d_model", "num_heads")
"""The fields that define a size; the rest of a model's configuration is its variant."""

TOLERANCE = 0.005
"""Largest distance (as a share) of a cost from the other variant's range that still counts as the end of the range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds with its 95 % interval; without an interval for a single seed."""

    mean: float
    interval: tuple[float, float] | None
    seeds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One variant at one size, trained from several seeds."""

    variant: str
    title: str
    """Variant and size."""
    num_layers: int
    size: tuple[int, ...]
    """Layers, width, heads."""
    parameters: int
    flops_per_token: int
    runs: dict[int, RunResult]
    """Seed -> run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The difference of a group from another variant."""

    group: Group
    other: str
    """The other variant."""
    basis: Basis
    quantity: str
    """A protocol (points), `loss` (nats per token), or `variance, PROTOCOL` (points squared)."""
    estimate: Estimate | None
    """None where the other variant has no model of that cost."""


Quantity = Callable[[RunResult], float | None]


@dataclass(frozen=True)
class Study:
    """The groups of a report in which some runs differ only in their seed."""

    results: Results
    groups: tuple[Group, ...]

    @cached_property
    def variants(self) -> dict[str, tuple[Group, ...]]:
        """Variant -> its groups, smallest first."""
        names = dict.fromkeys(group.variant for group in self.groups)
        return {
            name: tuple(sorted((g for g in self.groups if g.variant == name), key=lambda g: g.parameters))
            for name in names
        }

    @cached_property
    def quantities(self) -> dict[str, Quantity]:
        """The compared quantities, by name."""
        quantities: dict[str, Quantity] = {name: _score(name) for name in self.results.protocols}
        quantities |= {f"variance, {name}": _variance(name) for name in self.results.protocols}
        return quantities | {"loss": lambda run: None if run.loss is None else run.loss.nats_per_token}

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """CRATE variants against GPT-2 variants, then each variant against the paper's model of its architecture.

        Without either of these, all variants against the last one.
        """
        arch = {name: next(iter(groups[0].runs.values())).arch for name, groups in self.variants.items()}
        crate, gpt2 = ([name for name in arch if arch[name] == family] for family in ("crate", "gpt2"))
        against_paper = [
            (name, base) for family, base in ((crate, "crate"), (gpt2, "gpt2")) if base in family
            for name in family if name != base
        ]  # fmt: skip
        if crate and gpt2:
            return [*product(crate, gpt2), *against_paper]
        *names, last = arch
        return against_paper or [(name, last) for name in names]

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """Every group of the first variant of a pair against the second variant, for every quantity and basis.

        A basis is left out where a pair has no estimate, for example because one variant has a single size, and where
        all its estimates are those of equal size, because the costs are the same.
        """
        shown: list[Difference] = []
        at_equal_size: list[Estimate | None] = []
        for (variant, other), basis in product(self.pairs, BASES):
            differences = [
                Difference(
                    group=group, other=other, basis=basis, quantity=name,
                    estimate=_difference(group, self.variants[other], quantity, basis),
                )
                for group in self.variants[variant] for name, quantity in self.quantities.items()
            ]  # fmt: skip
            estimates = [difference.estimate for difference in differences]
            at_equal_size = estimates if basis == "size" else at_equal_size
            shown += differences if any(estimates) and (basis == "size" or estimates != at_equal_size) else []
        return tuple(shown)

    @cached_property
    def first_seeds(self) -> Results:
        """The results with one run of each group, for the tables and figures of single runs."""
        repeated = {id(run) for group in self.groups for run in list(group.runs.values())[1:]}
        return replace(self.results, models=tuple(run for run in self.results.models if id(run) not in repeated))


def study_of(results: Results) -> Study | None:
    """The runs grouped by seed; None if no two trained runs differ only in their seed, or for several taps."""
    if len(results.taps) > 1:
        return None
    groups: dict[tuple[str, ...], list[tuple[RunResult, dict[str, Any]]]] = {}
    for run in results.models:
        if run.control is None and "seed" in run.training:
            model = read_json(run.path / "run.json", made_by="cratelm train")["model"]
            training = {name: value for name, value in run.training.items() if name != "seed"}
            groups.setdefault((repr(sorted(model.items())), repr(sorted(training.items()))), []).append((run, model))
    if all(len(runs) < 2 for runs in groups.values()):
        return None
    return Study(results, tuple(_group(runs) for runs in groups.values()))


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and Student's t interval; None without a value."""
    if not values:
        return None
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean=mean, interval=None, seeds=1)
    half = student(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean=mean, interval=(mean - half, mean + half), seeds=len(values))


def over_seeds(group: Group, quantity: Quantity) -> Estimate | None:
    """A quantity's mean over a group's seeds."""
    return estimate([value for run in group.runs.values() if (value := quantity(run)) is not None])


def _group(runs: list[tuple[RunResult, dict[str, Any]]]) -> Group:
    run, model = runs[0]
    name = re.sub(r"-seed\d+$", "", run.name)
    by_seed = {int(seeded.training["seed"]): seeded for seeded, _ in runs}
    return Group(
        variant=re.sub(r"-(1l|2l|3l|s|b)$", "", name), title=display_name(name) if name != run.name else run.title,
        num_layers=run.num_layers, parameters=run.parameters, flops_per_token=run.flops_per_token,
        size=tuple(int(model.get(field, 0)) for field in SIZE_FIELDS), runs=dict(sorted(by_seed.items())),
    )  # fmt: skip


def _score(protocol: str) -> Quantity:
    return lambda run: run.scores[protocol].mean if protocol in run.scores else None


def _variance(protocol: str) -> Quantity:
    return lambda run: run.scores[protocol].variance if protocol in run.scores and run.num_layers > 1 else None


def _difference(group: Group, others: Sequence[Group], quantity: Quantity, basis: Basis) -> Estimate | None:
    """Mean of (group - other) over the seeds of both sides: the same seed means the same order of the data."""
    differences = []
    for seed, run in group.runs.items():
        mine, theirs = quantity(run), _counterpart(group, seed, others, quantity, basis)
        if mine is not None and theirs is not None:
            differences.append(mine - theirs)
    return estimate(differences)


def _counterpart(group: Group, seed: int, others: Sequence[Group], quantity: Quantity, basis: Basis) -> float | None:
    """The other variant's value for this seed at the group's size or cost."""
    values = [
        (other, value) for other in others
        if seed in other.runs and (value := quantity(other.runs[seed])) is not None
    ]  # fmt: skip
    if basis == "size":
        return next((value for other, value in values if other.size == group.size), None)
    if not values:
        return None
    points = sorted((_cost(other, basis), value) for other, value in values)
    cost, costs = _cost(group, basis), [cost for cost, _ in points]
    if not costs[0] * (1 - TOLERANCE) <= cost <= costs[-1] * (1 + TOLERANCE):
        return None
    return float(np.interp(math.log(cost), np.log(costs), [value for _, value in points]))


def _cost(group: Group, basis: Basis) -> int:
    return group.parameters if basis == "parameters" else group.flops_per_token


def display_variant(name: str) -> str:
    """`crate` -> `CRATE`, `gpt2` -> `GPT-2`; other names unchanged."""
    return {"crate": "CRATE", "gpt2": "GPT-2"}.get(name, name)
