"""Cards of the page: a neuron with its score, its explanation, and text in the heat of its activations, as HTML."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from jaxtyping import Bool, Float32

from cratelm.activations.records import Excerpt
from cratelm.report.results.examples import NeuronExample, Rank
from cratelm.report.results.firing import FiringExample, RunFiring, shown_examples
from cratelm.report.results.gather import Results, RunResult, undefined_neurons
from cratelm.report.shown_text import marked, paragraph, prose, visible
from cratelm.report.tables.form import points

LEVELS = 8
"""Shades of a token, by the activation in units of the neuron's maximum; of a prediction, of the largest one."""

RANKS: dict[Rank, str] = {"best": "Best explained", "median": "In the middle", "worst": "Worst explained"}

Prediction = tuple[Float32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]
"""Predicted activation on each token, as a share of the largest prediction; which tokens are relevant."""


def scale(kind: str) -> str:
    """All shades of activations (`h`) or of predictions (`p`), weakest first."""
    shades = "".join(f'<i class="{kind}{level}"></i>' for level in range(1, LEVELS + 1))
    return f'<span class="scale" aria-hidden="true">{shades}</span>'


def side_by_side(found: Sequence[RunFiring], how_chosen: str) -> str:
    """The best examples of the models, a column each, the n-th of each beside the n-th of the others."""
    shown: Mapping[str, tuple[FiringExample, ...]] = shown_examples(found)
    if not shown:
        return paragraph("No neuron has enough relevant tokens in random excerpts to stand here as an example.")
    strings = {one.run.title: one.run.token_strings for one in found}
    columns = "".join(
        f"<div><h4>{prose(title)}</h4>{''.join(firing_card(one, strings[title]) for one in examples)}</div>"
        for title, examples in shown.items()
    )
    key = (
        f"<p>Colour{scale('h')}: what the neuron did, in units of its largest activation. Line below a token"
        f"{scale('p')}: what the simulation from the explanation predicts, in units of its largest prediction; dotted "
        "where that is too little for the token to count as relevant. Point at a token to read both.</p>"
    )
    return f'{paragraph(how_chosen)}{key}<div class="beside">{columns}</div>'


def firing_card(one: FiringExample, strings: Sequence[str]) -> str:
    """A neuron with what it did and what was predicted, token by token."""
    excerpts = "".join(
        excerpt_html(excerpt, one.maximum, strings, (predicted, relevant))
        for excerpt, predicted, relevant in zip(one.excerpts, one.predicted, one.relevant, strict=True)
    )
    facts = (
        f"On random text it fires on {100 * one.consistency:.0f} % of the relevant tokens (consistency), and "
        f"{100 * one.distinctiveness:.0f} % of the tokens on which it fires are relevant (distinctiveness)."
    )
    return (
        f'<article class="neuron">{_head(one.layer, one.index, one.score)}'
        f'<p class="said">{escape(visible(one.explanation))}</p>{excerpts}'
        f'<p class="facts-line">{prose(facts)}</p></article>'
    )


def neurons_of(results: Results) -> str:
    """The best, median and worst neurons of every model, after a word on how to read them."""
    intro = (
        f"<p>Neurons of every layer, by their score on {escape(results.shown or 'no protocol')}. The stronger the "
        f"colour{scale('h')}of a token, the nearer its activation comes to the neuron's largest; point at it to read "
        "the value. A token without colour did not activate the neuron. "
        "↵ is a line break, ⇥ a tab, \\x.. a byte that is no whole character.</p>"
    )
    return "\n".join([intro, *(_model_neurons(model, results.shown) for model in results.models)])


def _model_neurons(model: RunResult, protocol: str) -> str:
    groups = []
    for rank, heading in RANKS.items():
        cards = [_card(one, model.token_strings) for one in model.examples if one.rank == rank]
        if cards:
            groups.append(f'<h4>{heading}</h4>\n<div class="cards">\n{chr(10).join(cards)}\n</div>')
    return f"<h3>{prose(model.title)}</h3>\n{paragraph(_census(model, protocol))}\n" + "\n".join(groups)


def _census(model: RunResult, protocol: str) -> str:
    """How many neurons have a score, and why the others have none."""
    if protocol not in model.scores:
        return f"Not scored on {protocol}."
    scores = model.scores[protocol]
    scored, total = (sum(getattr(layer, name) for layer in scores.layers) for name in ("scored", "total"))
    others = ", ".join(f"{reason} {count:,}" for reason, count in undefined_neurons(scores).items())
    without = f"; {total - scored:,} have no score ({others})" if others else ""
    return f"{scored:,} of {total:,} neurons are scored on {protocol}{without}."


def _head(layer: int, index: int, score: float) -> str:
    value = f"{points(100 * score)}<small> points</small>"
    return f'<header><h5>Layer {layer}, neuron {index}</h5><span class="score">{value}</span></header>'


def _card(one: NeuronExample, strings: Sequence[str]) -> str:
    share = 100 * one.density
    facts = (
        f"Scored over {one.tokens:,} tokens. Active on {share:{'.1f' if share >= 0.1 else '.1g'}} % of all tokens, "
        f"at most {one.maximum:.3g} (the model's own units)."
    )
    strongest, *others = one.scored or one.explained
    more = [("Also scored on", others), ("Explained from", one.explained if one.scored else ())]
    hidden = "".join(
        f'<p class="kind">{title}</p>{"".join(excerpt_html(excerpt, one.maximum, strings) for excerpt in excerpts)}'
        for title, excerpts in more
        if excerpts
    )
    return (
        f'<article class="neuron">{_head(one.layer, one.index, one.correlation)}'
        f'<p class="said">{escape(visible(one.explanation))}</p>{excerpt_html(strongest, one.maximum, strings)}'
        f"<details><summary>More excerpts</summary>{hidden}</details>"
        f'<p class="facts-line">{prose(facts)}</p></article>'
    )


def excerpt_html(
    excerpt: Excerpt, maximum: float, strings: Sequence[str], predicted: Prediction | None = None
) -> str:  # fmt: skip
    """The text with its heat, and where it is given, what was predicted as a line below each token."""
    tokens = list(zip(excerpt.tokens.tolist(), excerpt.activations.tolist(), strict=True))
    if predicted is None:
        shown = [_token(strings[token], activation, maximum) for token, activation in tokens]
    else:
        each = zip(tokens, *(one.tolist() for one in predicted), strict=True)
        shown = [
            _underlined(_token(strings[token], activation, maximum, share), share, relevant)
            for (token, activation), share, relevant in each
        ]
    return f'<div class="excerpt">{"".join(shown)}</div>'


def _token(text: str, activation: float, maximum: float, predicted: float = 0.0) -> str:
    """A token on the colour of its activation, with the value to point at; no markup where there is nothing to tell."""
    shown = marked(text)
    known = activation != 0 and math.isfinite(activation)
    if not known and predicted <= 0:
        return shown
    level = min(LEVELS, math.ceil(LEVELS * activation / maximum)) if known and maximum > 0 else 0
    kind = (f"h{level}" if level >= 1 else "below") if known else "silent"
    told = f"{activation:.3g}" + f", predicted {100 * predicted:.0f} % of the largest" * (predicted > 0)
    return f'<span class="{kind}" title="{told}">{shown}</span>'


def _underlined(shown: str, predicted: float, relevant: bool) -> str:
    if predicted <= 0:
        return shown
    level = min(LEVELS, math.ceil(LEVELS * predicted))
    return f'<u class="p{level}{"" if relevant else " faint"}">{shown}</u>'
