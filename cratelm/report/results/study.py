"""Runs that differ only in their seed, taken together: means with intervals over seeds, and fair differences.

A variant is a model configuration without its size; a group is a variant at one size, with all its seeds. Between two
variants three questions are asked: what differs at equal size, at equal parameters, and at equal FLOPs. For the last
two the other variant's scores are interpolated between its sizes (linearly in the logarithm of the cost), seed by
seed; outside the range of its sizes there is no answer.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

import numpy as np

from cratelm.report.results.gather import Results, RunResult, display_name
from cratelm.rundir import read_json

Basis = Literal["size", "parameters", "FLOPs"]

BASES: tuple[Basis, ...] = ("size", "parameters", "FLOPs")

SIZE_FIELDS = ("num_layers", "d_model", "num_heads")
"""What a size consists of; the rest of a model's configuration is its variant."""

TOLERANCE = 0.005
"""A cost so little (as a share) outside the range of the other variant's sizes counts as its end."""

_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t by degrees of freedom: 97.5 % of the distribution lie below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over seeds with its 95 % interval; without an interval for a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends."""
        return None if self.low is None or self.high is None else (self.low, self.high)


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
    """How far one group is above another variant, at equal something."""

    group: Group
    other: str
    """The other variant."""
    basis: Basis
    quantity: str
    """A protocol (points), `loss` (nats per token), or `variance, PROTOCOL` (points squared)."""
    found: Estimate | None
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
        """What is compared, by name."""
        found: dict[str, Quantity] = {name: _score(name) for name in self.results.protocols}
        found |= {f"variance, {name}": _variance(name) for name in self.results.protocols}
        return found | {"loss": lambda run: None if run.loss is None else run.loss.nats_per_token}

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """CRATE variants against GPT-2 variants, then each variant against the paper's model of its architecture.

        Without one of the architectures, and without the paper's model of the other, all variants against the last.
        """
        arch = {name: next(iter(groups[0].runs.values())).arch for name, groups in self.variants.items()}
        crate, gpt2 = ([name for name in arch if arch[name] == which] for which in ("crate", "gpt2"))
        switched = [(one, base) for own, base in ((crate, "crate"), (gpt2, "gpt2")) if base in own
                    for one in own if one != base]  # fmt: skip
        if crate and gpt2:
            return [(one, other) for one in crate for other in gpt2] + switched
        names = list(arch)
        return switched or [(one, names[-1]) for one in names[:-1]]

    @cached_property
    def differences(self) -> tuple[Difference, ...]:
        """Every group of the first of a pair against the second variant, for every quantity and basis.

        What says nothing is left out: a basis on which a pair has no answer at all, for example because one variant
        has a single size, and one on which it has those of equal size again, because the costs are the same.
        """
        every: list[Difference] = []
        at_equal_size: list[Estimate | None] = []
        for (one, other), basis in product(self.pairs, BASES):
            own = [
                Difference(group=group, other=other, basis=basis, quantity=name, found=difference)
                for group in self.variants[one]
                for name, of in self.quantities.items()
                for difference in [_difference(group, self.variants[other], of, basis)]
            ]
            answers = [difference.found for difference in own]
            at_equal_size = answers if basis == "size" else at_equal_size
            every += own if any(answers) and (basis == "size" or answers != at_equal_size) else []
        return tuple(every)

    @cached_property
    def first_seeds(self) -> Results:
        """The results with one run of each group: what a page shows run by run."""
        kept = {id(next(iter(group.runs.values()))) for group in self.groups}
        grouped = {id(run) for group in self.groups for run in group.runs.values()}
        models = tuple(run for run in self.results.models if id(run) in kept or id(run) not in grouped)
        return replace(self.results, models=models)


def study_of(results: Results) -> Study | None:
    """The study that the results are; None if no two trained runs differ only in their seed, or for several taps."""
    if len(results.taps) > 1:
        return None
    found: dict[tuple[str, ...], list[tuple[RunResult, dict[str, Any]]]] = {}
    for run in results.models:
        if run.control is None and "seed" in run.training:
            model = read_json(run.path / "run.json", made_by="cratelm train")["model"]
            training = {name: value for name, value in run.training.items() if name != "seed"}
            found.setdefault((repr(sorted(model.items())), repr(sorted(training.items()))), []).append((run, model))
    if all(len(runs) < 2 for runs in found.values()):
        return None
    return Study(results, tuple(_group(runs) for runs in found.values()))


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and Student's interval; None without a value."""
    if not values:
        return None
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean=mean, low=None, high=None, seeds=1)
    half = student(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean=mean, low=mean - half, high=mean + half, seeds=len(values))


def student(freedom: int) -> float:
    """Below how many standard errors 97.5 % of Student's distribution lie."""
    z = 1.959964
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return _T.get(freedom, z + sum(term / freedom**power for power, term in enumerate(terms, 1)))


def over_seeds(group: Group, of: Quantity) -> Estimate | None:
    """A quantity's mean over a group's seeds."""
    return estimate([value for run in group.runs.values() if (value := of(run)) is not None])


def _group(found: list[tuple[RunResult, dict[str, Any]]]) -> Group:
    run, model = found[0]
    named = re.sub(r"-seed\d+$", "", run.name)
    variant = re.sub(r"-(1l|2l|3l|s|b)$", "", named)
    title = display_name(named) if named != run.name else run.title
    return Group(
        variant=variant, title=title, num_layers=run.num_layers, parameters=run.parameters,
        size=tuple(int(model.get(name, 0)) for name in SIZE_FIELDS), flops_per_token=run.flops_per_token,
        runs={int(one.training["seed"]): one for one, _ in sorted(found, key=lambda pair: pair[0].training["seed"])},
    )  # fmt: skip


def _score(protocol: str) -> Quantity:
    return lambda run: run.scores[protocol].mean if protocol in run.scores else None


def _variance(protocol: str) -> Quantity:
    return lambda run: run.scores[protocol].variance if protocol in run.scores and run.num_layers > 1 else None


def _difference(group: Group, others: Sequence[Group], of: Quantity, basis: Basis) -> Estimate | None:
    """Mean of (group - other) over the seeds that both sides have: the same seed is the same order of the data."""
    gaps = []
    for seed, run in group.runs.items():
        mine, theirs = of(run), _counterpart(group, seed, others, of, basis)
        if mine is not None and theirs is not None:
            gaps.append(mine - theirs)
    return estimate(gaps)


def _counterpart(group: Group, seed: int, others: Sequence[Group], of: Quantity, basis: Basis) -> float | None:
    """The other variant's value for this seed at the group's size or cost."""
    known = [(one, value) for one in others if seed in one.runs and (value := of(one.runs[seed])) is not None]
    if basis == "size":
        return next((value for one, value in known if one.size == group.size), None)
    if not known:
        return None
    points = sorted((_cost(one, basis), value) for one, value in known)
    wanted, costs = _cost(group, basis), [cost for cost, _ in points]
    if not costs[0] * (1 - TOLERANCE) <= wanted <= costs[-1] * (1 + TOLERANCE):
        return None
    return float(np.interp(math.log(wanted), np.log(costs), [value for _, value in points]))


def _cost(group: Group, basis: Basis) -> int:
    return group.parameters if basis == "parameters" else group.flops_per_token


def display_variant(name: str) -> str:
    """`crate` -> `CRATE`, `gpt2` -> `GPT-2`; any other name as it is."""
    return {"crate": "CRATE", "gpt2": "GPT-2"}.get(name, name)
