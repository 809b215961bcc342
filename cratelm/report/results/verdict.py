"""Who wins where in plain words, whatever the outcome: scores, losses and costs of the models, and their controls."""

from collections.abc import Sequence

from cratelm.interpretation.scoring.correlation import ModelAggregate
from cratelm.report.results.gather import Outcome, Results, RunResult, listed, matched_pairs, outcome
from cratelm.report.results.loss import loss_difference
from cratelm.report.tables.paper import written


def verdict(results: Results) -> list[str]:
    """Who wins where, whatever the outcome: a sentence for each pair of models, then one for each model's controls."""
    matched = matched_pairs(results.models)
    pairs = [_pair_sentence(*pair, results.protocols) for pair in matched]
    alone = [_single_sentence(model, results.protocols) for model in results.models]
    controls = [text for model in results.models if (text := _control_sentence(model, results.protocols))]
    return [*(pairs or alone), *controls, _rule(matched)]


def _rule(pairs: Sequence[tuple[RunResult, RunResult]]) -> str:
    """When a difference is called clear; nothing about losses where none was compared by document."""
    rule = "A difference in score is clear where the 95 % intervals do not overlap"
    losses = [(first.loss, second.loss) for first, second in pairs]
    if any(a and b and loss_difference(a, b).standard_error is not None for a, b in losses):
        rule += "; one in loss, taken document by document, where it is more than 1.96 times its standard error (±)"
    return f"{rule}."


def _pair_sentence(first: RunResult, second: RunResult, protocols: Sequence[str]) -> str:
    found: dict[Outcome | None, list[str]] = {}
    for name in protocols:
        if name in first.scores and name in second.scores:
            mine, other = first.scores[name], second.scores[name]
            numbers = f"{name} ({points(mine.mean)} against {points(other.mean)} points)"
            found.setdefault(outcome(mine, other), []).append(numbers)
    clear = [f"{how} than {second.title} on {listed(found[how])}" for how in ("higher", "lower") if how in found]
    parts = [f"{first.title} scores {listed(clear)}"] if clear else []
    if tied := found.get("no clear difference"):
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
    found = loss_difference(first.loss, second.loss)
    how = f"nats per token {'worse' if found.nats > 0 else 'better'}"
    if found.standard_error is None:
        return f"the loss of {first.title} is {abs(found.nats):.3f} {how} at {cost}"
    clear = "clearly different" if found.clear else "not clearly different"
    amount = f"{abs(found.nats):.3f} ± {found.standard_error:.3f} {how}"
    return f"the loss of {first.title} is {clear}, {amount}, at {cost}"


def _single_sentence(model: RunResult, protocols: Sequence[str]) -> str:
    scored = [f"{points(model.scores[name].mean)} points on {name}" for name in protocols if name in model.scores]
    loss = "not evaluated" if model.loss is None else f"{model.loss.nats_per_token:.3f} nats per token"
    return f"{model.title} scores {listed(scored)}; its loss is {loss}."


def _control_sentence(model: RunResult, protocols: Sequence[str]) -> str:
    """How far a model stands above its controls; empty if it has none."""
    named = [name for name in protocols if name in model.scores]
    random_init = model.random_init.scores if model.random_init is not None else {}
    controls = {"the same model with random weights": random_init, "shuffled explanations": model.shuffled}
    clauses = [
        f"{listed([_gap(model.scores[name], control.get(name)) for name in named])} points against {what}"
        for what, control in controls.items()
        if any(name in control and control[name].mean is not None for name in named)
    ]
    return f"{model.title} on {listed(named)}: {'; '.join(clauses)}." if clauses else ""


def _gap(mine: ModelAggregate, control: ModelAggregate | None) -> str:
    if control is None:
        return "not compared"
    if mine.mean is None or control.mean is None:
        return "undefined"
    doubt = " (no clear difference)" if outcome(mine, control) == "no clear difference" else ""
    difference = mine.mean - control.mean
    return f"{'+' if difference > 0 else ''}{points(difference)}{doubt}"


def points(value: float | None) -> str:
    """Points to 0.1, or `undefined`."""
    return "undefined" if value is None else written(value, "0.1")
