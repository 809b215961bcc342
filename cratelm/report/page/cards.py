"""Cards of the page as HTML: a neuron with its score, its explanation, and excerpts coloured by its activations."""

import math
from collections import Counter
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Bool, Float32

from cratelm.activations.records import Excerpt
from cratelm.report.results.examples import NeuronExample, Rank
from cratelm.report.results.firing import FiringExample, RunFiring
from cratelm.report.results.gather import Results, RunResult
from cratelm.report.shown_text import marked, paragraph, prose, visible
from cratelm.report.tables.form import points

LEVELS = 8
"""Shades of a token, by the activation relative to the neuron's maximum, or a prediction relative to the largest."""

RANKS: dict[Rank, str] = {"best": "Best explained", "median": "In the middle", "worst": "Worst explained"}

Prediction = tuple[Float32[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]
"""Predicted activation of each token, as a share of the largest prediction, and whether the token is relevant."""


def scale(kind: str) -> str:
    """All shades of activations (`h`) or of predictions (`p`), weakest first."""
    shades = "".join(f'<i class="{kind}{level}"></i>' for level in range(1, LEVELS + 1))
    return f'<span class="scale" aria-hidden="true">{shades}</span>'


def side_by_side(entries: Sequence[RunFiring], selection: str) -> str:
    """The best examples of the models, a column for each model; `selection` says how they were selected."""
    columns = "".join(
        f"<div><h4>{prose(entry.run.title)}</h4>"
        f"{''.join(firing_card(example, entry.run.token_strings) for example in entry.examples)}</div>"
        for entry in entries if entry.examples
    )  # fmt: skip
    if not columns:
        return paragraph("No neuron has enough relevant tokens in random excerpts to be an example.")
    key = (
        f"<p>Colour{scale('h')}: activation, relative to the neuron's largest activation. Line below a token"
        f"{scale('p')}: prediction of the simulation, relative to its largest prediction; dotted where it is too small "
        "for the token to count as relevant. Point at a token to read both.</p>"
    )
    return f'{paragraph(selection)}{key}<div class="side-by-side">{columns}</div>'


def firing_card(example: FiringExample, strings: Sequence[str]) -> str:
    """A neuron with activation and prediction of each token."""
    excerpts = "".join(
        excerpt_html(excerpt, example.maximum, strings, (predicted, relevant))
        for excerpt, predicted, relevant in zip(example.excerpts, example.predicted, example.relevant, strict=True)
    )
    facts = (
        f"On random text it fires on {100 * example.consistency:.0f} % of the relevant tokens (consistency), and "
        f"{100 * example.distinctiveness:.0f} % of the tokens on which it fires are relevant (distinctiveness)."
    )
    return _article(example.layer, example.index, example.score, example.explanation, excerpts, facts)


def neurons_of(results: Results) -> str:
    """The best, median and worst neurons of every model, after an introduction."""
    intro = (
        f"<p>Neurons of every layer, by their score on {escape(results.shown or 'no protocol')}. The colour"
        f"{scale('h')}of a token is its activation relative to the neuron's largest; point at a token to read the "
        "value. A token without colour did not activate the neuron. "
        "↵ is a line break, ⇥ a tab, \\x.. a byte of an incomplete character.</p>"
    )
    return "\n".join([intro, *(_model_neurons(model, results.shown) for model in results.models)])


def _model_neurons(model: RunResult, protocol: str) -> str:
    groups = []
    for rank, heading in RANKS.items():
        cards = [_card(example, model.token_strings) for example in model.examples if example.rank == rank]
        if cards:
            groups.append(f'<h4>{heading}</h4>\n<div class="cards">\n{chr(10).join(cards)}\n</div>')
    return f"<h3>{prose(model.title)}</h3>\n{paragraph(_census(model, protocol))}\n" + "\n".join(groups)


def _census(model: RunResult, protocol: str) -> str:
    """The number of neurons with a score, and the reasons of the others."""
    if protocol not in model.scores:
        return f"Not scored on {protocol}."
    scores = model.scores[protocol]
    scored, total = scores.scored
    reasons = sum((Counter(layer.undefined) for layer in scores.layers), Counter())
    others = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())
    without = f"; {total - scored:,} have no score ({others})" if others else ""
    return f"{scored:,} of {total:,} neurons are scored on {protocol}{without}."


def _article(layer: int, index: int, score: float, explanation: str, content: str, facts: str) -> str:
    return (
        f'<article class="neuron"><header><h5>Layer {layer}, neuron {index}</h5>'
        f'<span class="score">{points(100 * score)}<small> points</small></span></header>'
        f'<p class="said">{escape(visible(explanation))}</p>{content}<p class="facts-line">{prose(facts)}</p></article>'
    )


def _card(example: NeuronExample, strings: Sequence[str]) -> str:
    def shown(excerpts: Sequence[Excerpt]) -> str:
        return "".join(excerpt_html(excerpt, example.maximum, strings) for excerpt in excerpts)

    share = 100 * example.density
    facts = (
        f"Scored over {example.tokens:,} tokens. Active on {share:{'.1f' if share >= 0.1 else '.1g'}} % of all tokens, "
        f"at most {example.maximum:.3g} (in the model's units)."
    )
    strongest, *others = example.scored or example.explained
    more = [("Also scored on", others), ("Explained from", example.explained if example.scored else ())]
    hidden = "".join(f'<p class="kind">{title}</p>{shown(excerpts)}' for title, excerpts in more if excerpts)
    content = f"{shown([strongest])}<details><summary>More excerpts</summary>{hidden}</details>"
    return _article(example.layer, example.index, example.correlation, example.explanation, content, facts)


def excerpt_html(
    excerpt: Excerpt, maximum: float, strings: Sequence[str], predicted: Prediction | None = None
) -> str:  # fmt: skip
    """The text coloured by activation, and optionally with a line for the prediction below each token."""
    tokens = list(zip(excerpt.tokens.tolist(), excerpt.activations.tolist(), strict=True))
    if predicted is None:
        shown = [_token(strings[token], activation, maximum) for token, activation in tokens]
    else:
        each = zip(tokens, *(values.tolist() for values in predicted), strict=True)
        shown = [
            _underlined(_token(strings[token], activation, maximum, share), share, relevant)
            for (token, activation), share, relevant in each
        ]
    return f'<div class="excerpt">{"".join(shown)}</div>'


def _token(text: str, activation: float, maximum: float, predicted: float = 0.0) -> str:
    """A token on the colour of its activation, with its value as a tooltip; plain text without either number."""
    shown = marked(text)
    known = activation != 0 and math.isfinite(activation)
    if not known and predicted <= 0:
        return shown
    level = min(LEVELS, math.ceil(LEVELS * activation / maximum)) if known and maximum > 0 else 0
    kind = (f"h{level}" if level >= 1 else "below") if known else "silent"
    tooltip = f"{activation:.3g}" + f", predicted {100 * predicted:.0f} % of the largest" * (predicted > 0)
    return f'<span class="{kind}" title="{tooltip}">{shown}</span>'


def _underlined(shown: str, predicted: float, relevant: bool) -> str:
    if predicted <= 0:
        return shown
    level = min(LEVELS, math.ceil(LEVELS * predicted))
    return f'<u class="p{level}{"" if relevant else " faint"}">{shown}</u>'
