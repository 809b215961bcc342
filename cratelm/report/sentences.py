"""The report's sentences: scores, losses and costs of the models, their controls, seeds of a study, and firing."""

from collections.abc import Sequence

import numpy as np

from cratelm.interpretation.firing.means import Mean
from cratelm.interpretation.scoring.correlation import ModelAggregate
from cratelm.interpretation.scoring.statistics import interval
from cratelm.report.results.firing import RunFiring
from cratelm.report.results.gather import Outcome, Results, RunResult, listed, matched_pairs, outcome
from cratelm.report.results.loss import loss_difference
from cratelm.report.results.study import BASES, Difference, Study, display_variant
from cratelm.report.tables.form import points


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


def study_sentences(study: Study) -> list[str]:
    """What the seeds say, a sentence for each pair and basis and score, and how to read it."""
    sentences: list[str] = []
    for one, other in study.pairs:
        none = f"{display_variant(one)} minus {display_variant(other)}: no two models to compare."
        before = len(sentences)
        for basis in BASES:
            said = [
                text for difference in study.differences
                if difference.group.variant == one and difference.other == other and difference.basis == basis
                and difference.quantity in (*study.results.protocols, "loss") and (text := _clause(difference))
            ]  # fmt: skip
            title = f"{display_variant(one)} minus {display_variant(other)} at equal {basis}"
            sentences += [f"{title}: {'; '.join(said)}."] if said else []
        sentences += [none] if len(sentences) == before else []
    return [*sentences, "A difference is clear where its 95 % interval over seeds leaves out 0."]


def _clause(difference: Difference) -> str:
    found = difference.found
    if found is None:
        return ""
    digits = 2 if difference.quantity == "loss" else 1
    text = f"{difference.group.title} {found.mean:+.{digits}f}"
    if found.low is not None and found.high is not None:
        text += f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
        text += "" if found.low > 0 or found.high < 0 else " (not clear)"
    return f"{text} {'nats of loss' if difference.quantity == 'loss' else f'points on {difference.quantity}'}"


def firing_sentences(found: Sequence[RunFiring]) -> list[str]:
    """Who fires more consistently and more distinctively on random text, in plain words, with differences."""
    by_title = {one.run.title: one for one in found}
    models = [one.run for one in found if one.run.control is None]
    sentences = []
    for first, second in matched_pairs(models):
        pair = (by_title[first.title].own.overall, by_title[second.title].own.overall)
        if not all("random" in overall for overall in pair):
            continue
        ours, theirs = (overall["random"] for overall in pair)
        if None in (ours.of("consistency"), theirs.of("consistency"), ours.of("distinctiveness")):
            continue
        names = first.title, second.title
        sentences += [_consistency(*names, ours, theirs), _distinctiveness(*names, ours, theirs)]
    return sentences


def _consistency(first: str, second: str, ours: Mean, theirs: Mean) -> str:
    apart, above = (_difference(ours, theirs, names) for names in (("consistency",), ("consistency", "firing")))
    return (
        f"On random text the neurons of {first} fire on {_percent(ours, 'consistency')} of the tokens that their "
        f"explanations call relevant, those of {second} on {_percent(theirs, 'consistency')}: a difference of {apart} "
        f"points. But they fire on {_percent(ours, 'firing')} and {_percent(theirs, 'firing')} of all tokens anyway; "
        f"how far consistency lies above that differs by {above} points."
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
    """Of one measure, or of one less another, with its interval: models are resampled apart."""
    values, low, high = difference(ours, theirs, names)
    return f"{_signed(values)} [{_signed(low)}, {_signed(high)}]"


def difference(ours: Mean, theirs: Mean, names: Sequence[str]) -> tuple[float, float, float]:
    """Ours less theirs, in points, with the ends of its 95 % interval; of the first measure less the others."""

    def of(mean: Mean) -> tuple[float, np.ndarray]:
        columns = [(mean.of(name) or 0.0, mean.column(name)) for name in names]
        signs = [1.0, *(-1.0 for _ in names[1:])]
        return (
            sum(sign * value for sign, (value, _) in zip(signs, columns, strict=True)),
            np.sum([sign * samples for sign, (_, samples) in zip(signs, columns, strict=True)], axis=0),
        )

    (ours_value, ours_samples), (theirs_value, theirs_samples) = of(ours), of(theirs)
    return ours_value - theirs_value, *interval(ours_samples - theirs_samples)


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}").replace("+0.0", "0.0").replace("\N{MINUS SIGN}0.0", "0.0")
