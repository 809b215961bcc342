"""One self-contained page: who wins where in plain words, tables, figures, neurons with their excerpts, the method.

It opens from disk and asks nothing of the network. There is no script in it, and its content security policy allows
none: names and text of the corpus are shown, never run.
"""

import base64
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from cratelm.activations.records import Excerpt
from cratelm.report.explainers import explainer_tables
from cratelm.report.faithfulness import Units, compared, faithfulness
from cratelm.report.firing import (
    FiringExample,
    RunFiring,
    firing_sentences,
    firing_tables,
    gather_firing,
    shown_examples,
)
from cratelm.report.firing_plots import firing_figures
from cratelm.report.judged import judged_tables
from cratelm.report.plots import figures, inline_svg, write_figures
from cratelm.report.results import (
    RESAMPLES,
    SEED,
    SHOWN_PROTOCOL,
    NeuronExample,
    Rank,
    Results,
    RunResult,
    undefined_neurons,
)
from cratelm.report.study import Study, study_of, study_sentences, study_tables
from cratelm.report.study_plots import study_figures
from cratelm.report.tables import CONTROL_ROWS, Cell, Column, Table, summary, tables, write_tables, written
from cratelm.report.verdict import listed, points, verdict
from cratelm.report.whitebox import views_of, whitebox_tables
from cratelm.report.whitebox_plots import whitebox_figures
from cratelm.rundir import write_text

HEAT_LEVELS = 8
"""Shades of a token, by the activation in units of the neuron's maximum."""

MODEL_NAME = r"(?:CRATE|GPT-2)-(?:[123]L|S|B)"
"""The paper's models, as `display_name` writes them."""

RANKS: dict[Rank, str] = {"best": "Best explained", "median": "In the middle", "worst": "Worst explained"}


def write_report(results: Results, out: Path, units: Sequence[Units] | None = None) -> Path:
    """Write tables, figures and the page; return the page's path. `units` saves reading the autoencoders again."""
    study = study_of(results)
    drawn = figures(results) if study is None else study_figures(study)
    units = compared(results) if units is None else units
    more = (*explainer_tables(results), *judged_tables(results), *((faithfulness(results, units),) if units else ()))
    shown = results if study is None else study.first_seeds
    firing = gather_firing(shown)
    views = views_of(results.rows)
    drawn = {**drawn, **whitebox_figures(views)}
    write_tables((*tables(results), *study_tables(study), *more, *firing_tables(firing), *whitebox_tables(views)), out)
    write_figures({**drawn, **firing_figures(firing)}, out)
    write_text(out / "report.html", page(shown, drawn, study, more, firing))
    return out / "report.html"


def page(
    results: Results, drawn: Mapping[str, Figure], study: Study | None = None, more: Sequence[Table] = (),
    firing: Sequence[RunFiring] = (),
) -> str:  # fmt: skip
    """The page's HTML. Of a study the results hold one run of each group. `more` are tables after the usual ones."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    title = listed([model.title for model in results.models])
    sentences = verdict(results) if study is None else study_sentences(study)
    return template.substitute(
        style=style, style_hash=digest, title=escape(title), heading=_text(title),
        verdict="\n".join(_paragraph(text, "" if place else "lead") for place, text in enumerate(sentences)),
        numbers="".join(map(as_html, study_tables(study))) + _numbers(results) + "".join(map(as_html, more)),
        figures="\n".join(_figure(name, figure) for name, figure in drawn.items()),
        firing=_firing(firing), neurons=_neurons(results), method=_method(results),
    )  # fmt: skip


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{_text(text)}</p>' if kind else f"<p>{_text(text)}</p>"


def _text(text: str) -> str:
    """Text of ours as HTML, in which a narrow screen breaks no line inside GPT-2-2L or before a per cent sign.

    Not for what a reader may copy: commands and the corpus keep their characters.
    """
    whole = re.sub(rf"\b{MODEL_NAME}\b", lambda name: name[0].replace("-", "\N{NON-BREAKING HYPHEN}"), text)
    return escape(whole.replace(" %", "\N{NO-BREAK SPACE}%"))


def _numbers(results: Results) -> str:
    quiet = {run.title for run in results.rows if run.control is not None}
    short = as_html(summary(results), quiet={*quiet, *CONTROL_ROWS})
    costs, full, layers = (as_html(table, quiet=quiet) for table in tables(results))
    missing = "".join(f"<li>{escape(line)}</li>" for line in results.missing)
    absent = f'<h3>Not in this report</h3>\n<ul class="missing">{missing}</ul>' if missing else ""
    inside = "".join(as_html(table, quiet=quiet) for table in whitebox_tables(views_of(results.rows)))
    view = f"<details><summary>White-box view of every layer</summary>{inside}</details>" if inside else ""
    return f"{short}\n{costs}\n{full}\n<details><summary>Every layer</summary>{layers}</details>\n{view}\n{absent}"


def as_html(table: Table, *, quiet: Collection[str] = ()) -> str:
    """The table as HTML that may be wider than the screen; rows about one of `quiet` are set in a fainter colour."""
    head = "".join(
        f'<th scope="col"{_html_class(column)}>{_text(column.title)}'
        + (f"<small>{escape(column.unit)}</small></th>" if column.unit else "</th>")
        for column in table.columns
    )
    grouped = len(table.columns) > 1 and table.columns[1].style == "text"
    groups = [list(rows) for _, rows in groupby(table.rows, lambda row: row[0] if grouped else None)]
    bodies = "".join(_html_group(rows, table.columns, quiet, grouped) for rows in groups)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{_text(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>{bodies}</table></div>{notes}"
    )


def _html_group(
    rows: Sequence[tuple[Cell, ...]], columns: Sequence[Column], quiet: Collection[str], grouped: bool
) -> str:
    """Rows that share their first cell, which is written once."""
    lines = []
    for place, row in enumerate(rows):
        cells = []
        for i, (cell, column) in enumerate(zip(row, columns, strict=True)):
            text = re.sub(r"^(\S+) (\[.*\])$", r"\1<small>\2</small>", _text(written(cell, column.style)))
            if i == 0 and grouped and place == 0:
                cells.append(f'<th scope="rowgroup" rowspan="{len(rows)}">{text}</th>')
            elif i == 0 and not grouped:
                cells.append(f'<th scope="row">{text}</th>')
            elif i > 0:
                cells.append(f"<td{_html_class(column)}>{text}</td>")
        name = row[1] if grouped else row[0]
        lines.append(f"<tr{' class=' + chr(34) + 'control' + chr(34) if name in quiet else ''}>{''.join(cells)}</tr>")
    return f"<tbody>{''.join(lines)}</tbody>"


def _html_class(column: Column) -> str:
    return "" if column.style == "text" else ' class="n"'


def _figure(name: str, figure: Figure) -> str:
    wide = ' class="wide"' if figure.get_figwidth() > 7 else ""
    drawing = inline_svg(figure, name, standing_sentences()["alternatives"][name])
    return (
        f'<figure{wide}><div class="scroll" tabindex="0">{drawing}</div>'
        f"<figcaption>{_text(standing_sentences()['captions'][name])}</figcaption></figure>"
    )


def _firing(found: Sequence[RunFiring]) -> str:
    """Consistency and distinctiveness: who, curves, tables, and the best neurons of the models side by side."""
    if not found:
        return "<p>Not measured: no run has simulations by the shown protocol.</p>"
    quiet = {title for one in found for title in (f"{one.run.title}, shuffled", one.run.title)
             if one.run.control is not None or title != one.run.title}  # fmt: skip
    sentences = "".join(map(_paragraph, firing_sentences(found)))
    drawn = "\n".join(_figure(name, figure) for name, figure in firing_figures(found).items())
    whole, layers = (as_html(table, quiet=quiet) for table in firing_tables(found))
    columns = "".join(
        f"<div><h4>{_text(title)}</h4>{''.join(_firing_card(one, strings) for one in examples)}</div>"
        for title, examples in shown_examples(found).items()
        for strings in [next(one.run.token_strings for one in found if one.run.title == title)]
    )
    examples = (
        f'{_paragraph(standing_sentences()["firing examples"])}<div class="beside">{columns}</div>' if columns else ""
    )
    return f"{sentences}{drawn}{whole}<details><summary>Every layer</summary>{layers}</details>\n{examples}"


def _firing_card(one: FiringExample, strings: Sequence[str]) -> str:
    excerpts = "".join(
        _excerpt(excerpt, one.maximum, strings, relevant.tolist())
        for excerpt, relevant in zip(one.excerpts, one.relevant, strict=True)
    )
    facts = (
        f"On random text it fires on {100 * one.consistency:.0f} % of the relevant tokens, and "
        f"{100 * one.distinctiveness:.0f} % of the tokens on which it fires are relevant."
    )
    return (
        f'<article class="neuron"><header><h5>Layer {one.layer}, neuron {one.index}</h5></header>'
        f'<p class="said">{escape(_visible(one.explanation))}</p>{excerpts}'
        f'<p class="facts-line">{_text(facts)}</p></article>'
    )


def _neurons(results: Results) -> str:
    scale = "".join(f'<i class="h{level}"></i>' for level in range(1, HEAT_LEVELS + 1))
    intro = (
        f"<p>Neurons of every layer, by their score on {escape(SHOWN_PROTOCOL)}. The stronger the colour"
        f'<span class="scale" aria-hidden="true">{scale}</span>of a token, the nearer its activation comes to the '
        "neuron's largest; point at it to read the value. A token without colour did not activate the neuron. "
        "↵ is a line break, ⇥ a tab, \\x.. a byte that is no whole character.</p>"
    )
    return "\n".join([intro, *(_model_neurons(model) for model in results.models)])


def _model_neurons(model: RunResult) -> str:
    groups = []
    for rank, heading in RANKS.items():
        cards = [_card(one, model.token_strings) for one in model.examples if one.rank == rank]
        if cards:
            groups.append(f'<h4>{heading}</h4>\n<div class="cards">\n{chr(10).join(cards)}\n</div>')
    return f"<h3>{_text(model.title)}</h3>\n{_paragraph(_census(model))}\n" + "\n".join(groups)


def _census(model: RunResult) -> str:
    """How many neurons have a score, and why the others have none."""
    if SHOWN_PROTOCOL not in model.scores:
        return f"Not scored on {SHOWN_PROTOCOL}."
    scores = model.scores[SHOWN_PROTOCOL]
    scored, total = (sum(getattr(layer, name) for layer in scores.layers) for name in ("scored", "total"))
    others = ", ".join(f"{reason} {count:,}" for reason, count in undefined_neurons(scores).items())
    without = f"; {total - scored:,} have no score ({others})" if others else ""
    return f"{scored:,} of {total:,} neurons are scored on {SHOWN_PROTOCOL}{without}."


def _card(one: NeuronExample, strings: Sequence[str]) -> str:
    share = 100 * one.density
    facts = (
        f"Scored over {one.tokens:,} tokens. Active on {share:{'.1f' if share >= 0.1 else '.1g'}} % of all tokens, "
        f"at most {one.maximum:.3g} (the model's own units)."
    )
    strongest, *others = one.scored or one.explained
    more = [("Also scored on", others), ("Explained from", one.explained if one.scored else ())]
    hidden = "".join(
        f'<p class="kind">{title}</p>{"".join(_excerpt(excerpt, one.maximum, strings) for excerpt in excerpts)}'
        for title, excerpts in more
        if excerpts
    )
    return (
        f'<article class="neuron"><header><h5>Layer {one.layer}, neuron {one.index}</h5>'
        f'<span class="score">{points(100 * one.correlation)}<small> points</small></span></header>'
        f'<p class="said">{escape(_visible(one.explanation))}</p>{_excerpt(strongest, one.maximum, strings)}'
        f"<details><summary>More excerpts</summary>{hidden}</details>"
        f'<p class="facts-line">{_text(facts)}</p></article>'
    )


def _excerpt(excerpt: Excerpt, maximum: float, strings: Sequence[str], relevant: Sequence[bool] = ()) -> str:
    """The text with its heat; tokens that are relevant are underlined."""
    tokens = zip(excerpt.tokens.tolist(), excerpt.activations.tolist(), strict=True)
    shown = [_token(strings[token], activation, maximum) for token, activation in tokens]
    shown = [f"<u>{one}</u>" if place < len(relevant) and relevant[place] else one for place, one in enumerate(shown)]
    return f'<div class="excerpt">{"".join(shown)}</div>'


def _token(text: str, activation: float, maximum: float) -> str:
    """A token on the colour of its activation, with the value to point at; no markup where the neuron is silent."""
    shown = _marked(text)
    if activation == 0 or not math.isfinite(activation):
        return shown
    level = min(HEAT_LEVELS, math.ceil(HEAT_LEVELS * activation / maximum)) if maximum > 0 else 0
    kind = f"h{level}" if level >= 1 else "below"
    return f'<span class="{kind}" title="{activation:.3g}">{shown}</span>'


def _marked(text: str) -> str:
    """Text of the corpus as HTML: line breaks and tabs as signs, what is invisible or reorders the line by its code."""
    return "".join(f"<b>{_sign(letter)}</b>" if _sign(letter) else escape(letter) for letter in text)


def _visible(text: str) -> str:
    return "".join(_sign(letter) or letter for letter in text)


def _sign(letter: str) -> str:
    """What stands for a letter that cannot be seen; empty for one that can."""
    if letter in "\n\t\r":
        return {"\n": "↵", "\t": "⇥", "\r": "␍"}[letter]
    if letter.isprintable() or unicodedata.category(letter) == "Zs" or letter in "\u200c\u200d":
        return ""
    return f"U+{ord(letter):04X}"


def _method(results: Results) -> str:
    prose = standing_sentences()
    parts = {
        f"{results.mode} mode": prose["modes"][results.mode],
        results.described: prose["explainers"].get(results.explainer, prose["explainers"]["llm"]),
        **{name: prose["protocols"].get(name, "") for name in results.protocols},
        "score": prose["score"], "controls": prose["controls"],
        "intervals": f"95 %, by two-level bootstrap over neurons and excerpts: {RESAMPLES:,} resamples, seed {SEED} "
        "with the protocol and the layer.",
    }  # fmt: skip
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{_text(text)}</dd>" for name, text in parts.items())
    return f"<dl>{terms}</dl>\n{_facts(results.rows)}"


@cache
def standing_sentences() -> dict[str, Any]:
    """The page's standing sentences."""
    return json.loads(Path(__file__).with_name("prose.json").read_text(encoding="utf-8"))


def _facts(runs: Sequence[RunResult]) -> str:
    """Everything the runs record about how they came to be, side by side; what all share is said once."""
    columns = [dict(_flat({"run": str(run.path), "training": run.training or {"tokens": 0}, "model made": run.origin,
                           "records": run.collection})) for run in runs]  # fmt: skip
    head = "".join(f'<th scope="col">{_text(run.title)}</th>' for run in runs)
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name, "") for column in columns]
        cells = (
            f'<td colspan="{len(runs)}">{escape(values[0])}</td>' if len(set(values)) == 1
            else "".join(f"<td>{escape(value)}</td>" for value in values)
        )  # fmt: skip
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0"><table class="facts"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (path, text); versions and lists as one text."""
    for key, one in value.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if key == "versions":
            yield name, ", ".join(f"{package} {version}" for package, version in one.items())
        elif isinstance(one, Mapping):
            yield from _flat(one, f"{name}: ")
        elif isinstance(one, list):
            yield name, ", ".join(map(str, one))
        elif one is not None and key != "format_version":
            yield name, f"{one:,}" if isinstance(one, int) and key != "seed" else str(one)
