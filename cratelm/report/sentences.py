"""The report's sentences: scores, losses and costs of the models, their controls, seeds of a study, and firing."""

from collections.abc import Sequence

import numpy as np

from cratelm.interpretation.firing.means import ALL, Mean
from cratelm.interpretation.scoring.correlation import ModelAggregate
from cratelm.interpretation.scoring.small_samples import pooled_freedom
from cratelm.interpretation.scoring.statistics import interval
from cratelm.report.results.firing import RunFiring
from cratelm.report.results.gather import Outcome, Results, RunResult, listed, matched_pairs, outcome
from cratelm.report.results.loss import loss_difference
from cratelm.report.results.study import BASES, Difference, Study, display_variant
from cratelm.report.tables.form import points


def verdict(results: Results) -> list[str]:
    """A sentence for each pair of models, then one for the controls of each model, and the rule for differences."""
    matched = matched_pairs(results.models)
    pairs = [_pair_sentence(*pair, results.protocols) for pair in matched]
    alone = [_single_sentence(model, results.protocols) for model in results.models]
    controls = [text for model in results.models if (text := _control_sentence(model, results.protocols))]
    return [*(pairs or alone), *controls, _rule(matched)]


def _rule(pairs: Sequence[tuple[RunResult, RunResult]]) -> str:
    """The rule for a clear difference; it mentions losses only if some are compared by document."""
    rule = "A difference in score is clear where the 95 % intervals do not overlap"
    losses = [(first.loss, second.loss) for first, second in pairs]
    if any(a and b and loss_difference(a, b).standard_error is not None for a, b in losses):
        rule += "; one in loss, taken document by document, where it is more than 1.96 times its standard error (±)"
    return f"{rule}."


def _pair_sentence(first: RunResult, second: RunResult, protocols: Sequence[str]) -> str:
    outcomes: dict[Outcome | None, list[str]] = {}
    for name in protocols:
        if name in first.scores and name in second.scores:
            mine, other = first.scores[name], second.scores[name]
            numbers = f"{name} ({points(mine.mean)} against {points(other.mean)} points)"
            outcomes.setdefault(outcome(mine, other), []).append(numbers)
    clear = [f"{way} than {second.title} on {listed(outcomes[way])}" for way in ("higher", "lower") if way in outcomes]
    parts = [f"{first.title} scores {listed(clear)}"] if clear else []
    if tied := outcomes.get("no clear difference"):
        between = f"No clear difference between {first.title} and {second.title}"
        parts.append(f"{'no clear difference' if clear else between} on {listed(tied)}")
    if not parts:
        parts = [f"{first.title} and {second.title} have no score to compare"]
    cost = [] if first.path == second.path else [_cost_clause(first, second)]
    return f"{'; '.join([*parts, *cost])}."


def _cost_clause(first: RunResult, second: RunResult) -> str:
    parameters = 100 * (first.parameters / second.parameters - 1)
    flops = first.flops_per_token / second.flops_per_token
    more = "as many" if abs(parameters) < 0.5 else f"{abs(parameters):.0f} % {'more' if parameters > 0 else 'fewer'}"
    cost = f"{more} parameters and {flops:.2f} times the FLOPs per token"
    if first.loss is None or second.loss is None:
        return f"{first.title} has {cost} (loss not evaluated)"
    difference = loss_difference(first.loss, second.loss)
    unit = f"nats per token {'worse' if difference.nats > 0 else 'better'}"
    if difference.standard_error is None:
        return f"the loss of {first.title} is {abs(difference.nats):.3f} {unit} at {cost}"
    clear = "clearly different" if difference.clear else "not clearly different"
    amount = f"{abs(difference.nats):.3f} ± {difference.standard_error:.3f} {unit}"
    return f"the loss of {first.title} is {clear}, {amount}, at {cost}"


def _single_sentence(model: RunResult, protocols: Sequence[str]) -> str:
    scored = [f"{points(model.scores[name].mean)} points on {name}" for name in protocols if name in model.scores]
    loss = "not evaluated" if model.loss is None else f"{model.loss.nats_per_token:.3f} nats per token"
    return f"{model.title} scores {listed(scored)}; its loss is {loss}."


def _control_sentence(model: RunResult, protocols: Sequence[str]) -> str:
    """The difference of a model from its controls; empty without controls."""
    scored = [name for name in protocols if name in model.scores]
    random_init = model.random_init.scores if model.random_init is not None else {}
    controls = {"the same model with random weights": random_init, "shuffled explanations": model.shuffled}
    clauses = [
        f"{listed([_difference_from(control.get(name), model.scores[name]) for name in scored])} points against {what}"
        for what, control in controls.items()
        if any(name in control and control[name].mean is not None for name in scored)
    ]
    return f"{model.title} on {listed(scored)}: {'; '.join(clauses)}." if clauses else ""


def _difference_from(control: ModelAggregate | None, model: ModelAggregate) -> str:
    if control is None:
        return "not compared"
    if model.mean is None or control.mean is None:
        return "undefined"
    unclear = " (no clear difference)" * (outcome(model, control) == "no clear difference")
    difference = model.mean - control.mean
    return f"{'+' if difference > 0 else ''}{points(difference)}{unclear}"


def study_sentences(study: Study) -> list[str]:
    """A sentence for each pair of variants, basis and score, and how to read it."""
    sentences: list[str] = []
    quantities = (*study.results.protocols, "loss")
    for variant, other in study.pairs:
        title = f"{display_variant(variant)} minus {display_variant(other)}"
        compared: dict[str, list[str]] = {basis: [] for basis in BASES}
        for difference in study.differences:
            if (difference.group.variant, difference.other) == (variant, other) and difference.quantity in quantities:
                compared[difference.basis] += [_clause(difference)] if difference.estimate is not None else []
        lines = [f"{title} at equal {basis}: {'; '.join(clauses)}." for basis, clauses in compared.items() if clauses]
        sentences += lines or [f"{title}: no two models to compare."]
    return [*sentences, "A difference is clear where its 95 % interval over seeds excludes 0."]


def _clause(difference: Difference) -> str:
    mean = difference.estimate
    assert mean is not None
    digits = 2 if difference.quantity == "loss" else 1
    text = f"{difference.group.title} {mean.mean:+.{digits}f}"
    if mean.interval is not None:
        low, high = mean.interval
        text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
        text += "" if low > 0 or high < 0 else " (not clear)"
    return f"{text} {'nats of loss' if difference.quantity == 'loss' else f'points on {difference.quantity}'}"


def firing_sentences(entries: Sequence[RunFiring]) -> list[str]:
    """Consistency and distinctiveness of two models on random text, with differences."""
    overall = {entry.run.title: entry.own.overall for entry in entries}
    models = [entry.run for entry in entries if entry.run.control is None]
    sentences = []
    for first, second in matched_pairs(models):
        ours, theirs = (overall[run.title].get("random") for run in (first, second))
        if (
            ours is None
            or theirs is None
            or None in (ours.of("consistency"), theirs.of("consistency"), ours.of("distinctiveness"))
        ):
            continue
        sentences += [write(first.title, second.title, ours, theirs) for write in (_consistency, _distinctiveness)]
    return sentences


def _consistency(first: str, second: str, ours: Mean, theirs: Mean) -> str:
    raw, above_chance = (_difference(ours, theirs, names) for names in (("consistency",), ("consistency", "firing")))
    return (
        f"On random text the neurons of {first} fire on {_percent(ours, 'consistency')} of the tokens that their "
        f"explanations call relevant, those of {second} on {_percent(theirs, 'consistency')}: a difference of {raw} "
        f"points. But they fire on {_percent(ours, 'firing')} and {_percent(theirs, 'firing')} of all tokens; "
        f"consistency minus this chance level differs by {above_chance} points."
    )


def _distinctiveness(first: str, second: str, ours: Mean, theirs: Mean) -> str:
    tokens, mass = (_difference(ours, theirs, (name,)) for name in ("distinctiveness", "distinctiveness_mass"))
    return (
        f"Of the tokens on which they fire, {_percent(ours, 'distinctiveness')} are relevant in {first} and "
        f"{_percent(theirs, 'distinctiveness')} in {second} (difference {tokens} points), and of their activation "
        f"{_percent(ours, 'distinctiveness_mass')} and {_percent(theirs, 'distinctiveness_mass')} ({mass} points)."
    )


def _percent(mean: Mean, name: str) -> str:
    value = mean.of(name)
    return "–" if value is None else f"{value:.1f} %"


def _difference(ours: Mean, theirs: Mean, names: Sequence[str]) -> str:
    numbers = (f"{number:+.1f}" for number in difference(ours, theirs, names))
    value, *ends = ("0.0" if number in ("+0.0", "-0.0") else number for number in numbers)
    return f"{value} [{', '.join(ends)}]".replace("-", "\N{MINUS SIGN}")


def difference(ours: Mean, theirs: Mean, names: Sequence[str]) -> tuple[float, float, float]:
    """One model minus the other in points, with the ends of the 95 % interval: of the first measure minus the others.

    The two models are resampled independently.
    """
    first, *others = names

    def value(mean: Mean) -> float:
        return (mean.of(first) or 0.0) - sum(mean.of(name) or 0.0 for name in others)

    def samples(mean: Mean) -> np.ndarray:
        return np.subtract(mean.column(first), sum(mean.column(name) for name in others))

    def freedom(mean: Mean) -> float:
        return min(float(mean.freedom[ALL.index(name)]) for name in names)

    parts = samples(ours), samples(theirs)
    pooled = pooled_freedom(parts, [freedom(ours), freedom(theirs)])
    return value(ours) - value(theirs), *interval(parts[0] - parts[1], pooled)
