"""One self-contained page: sentences, tables, figures, neurons with their excerpts, the method.

It opens from disk and makes no requests. It has no script, and its content security policy allows none, so names and
text of the corpus are never executed.
"""

import base64
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from cratelm.report.contents import ReportContents, standing_sentences
from cratelm.report.figures.form import inline_svg, write_figures
from cratelm.report.page.cards import neurons_of, side_by_side
from cratelm.report.results.firing import relevant_needed
from cratelm.report.results.gather import RESAMPLES, SEED, Results, RunResult, listed
from cratelm.report.shown_text import paragraph, prose
from cratelm.report.tables.form import Cell, Column, Table, write_tables, written
from cratelm.report.tables.paper import CONTROL_ROWS
from cratelm.rundir import write_text


def write_report(contents: ReportContents, out: Path) -> Path:
    """Write tables, figures and the page; return the page's path."""
    write_tables([table for table in contents.every_table if table is not contents.summary], out)
    write_figures(contents.every_figure, out)
    write_text(out / "report.html", page(contents))
    return out / "report.html"


def page(contents: ReportContents) -> str:
    """The page's HTML."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = Template(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    shown = contents.shown
    title = listed([model.title for model in shown.models])
    return template.substitute(
        style=style, style_hash=digest, title=escape(title), heading=prose(title),
        verdict="\n".join(paragraph(text, "" if place else "lead") for place, text in enumerate(contents.sentences)),
        numbers=_numbers(contents),
        figures="\n".join(_figure(name, figure) for name, figure in contents.figures.items()),
        firing=_firing(contents), neurons=neurons_of(shown), method=_method(shown),
    )  # fmt: skip


def _numbers(contents: ReportContents) -> str:
    quiet = {*(run.title for run in contents.results.rows if run.control is not None), *CONTROL_ROWS}
    missing = "".join(f"<li>{escape(line)}</li>" for line in contents.results.missing)
    parts = [as_html(table, quiet=quiet) for table in contents.tables]
    parts += [_folded(title, tables, quiet) for title, tables in contents.folded_tables.items()]
    return "\n".join([*parts, f'<h3>Not in this report</h3>\n<ul class="missing">{missing}</ul>' if missing else ""])


def _folded(title: str, tables: Iterable[Table], quiet: Collection[str]) -> str:
    inside = "".join(as_html(table, quiet=quiet) for table in tables)
    return f"<details><summary>{title}</summary>{inside}</details>"


def as_html(table: Table, *, quiet: Collection[str] = ()) -> str:
    """The table as HTML with a scroll bar if it is too wide; rows of the names in `quiet` have a fainter colour."""
    head = "".join(
        f'<th scope="col"{_html_class(column)}>{prose(column.title)}'
        + (f"<small>{escape(column.unit)}</small></th>" if column.unit else "</th>")
        for column in table.columns
    )
    grouped = len(table.columns) > 1 and table.columns[1].style == "text"
    groups = [list(rows) for _, rows in groupby(table.rows, lambda row: row[0] if grouped else None)]
    bodies = "".join(_html_group(rows, table.columns, quiet, grouped) for rows in groups)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll" tabindex="0"><table><caption>{prose(table.caption)}</caption>'
        f"<thead><tr>{head}</tr></thead>{bodies}</table></div>{notes}"
    )


def _html_group(
    rows: Sequence[tuple[Cell, ...]], columns: Sequence[Column], quiet: Collection[str], grouped: bool
) -> str:
    """Rows with the same first cell, which spans them."""
    lines = []
    for place, row in enumerate(rows):
        cells = []
        for i, (cell, column) in enumerate(zip(row, columns, strict=True)):
            text = re.sub(r"^(\S+) (\[.*\])$", r"\1<small>\2</small>", prose(written(cell, column.style)))
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


def _figure(name: str, figure: Figure, more: str = "") -> str:
    """The drawing with its caption, followed by `more`."""
    wide = ' class="wide"' if figure.get_figwidth() > 7 else ""
    drawing = inline_svg(figure, name, standing_sentences()["alternatives"][name])
    return (
        f'<figure{wide}><div class="scroll" tabindex="0">{drawing}</div>'
        f"<figcaption>{prose(standing_sentences()['captions'][name] + more)}</figcaption></figure>"
    )


def _firing(contents: ReportContents) -> str:
    """Consistency and distinctiveness: sentences, curves, tables, and the best neurons of the models side by side."""
    if not contents.firing:
        return "<p>Not measured: no run has simulations.</p>"
    quiet = {f"{entry.run.title}, shuffled" for entry in contents.firing}
    quiet |= {entry.run.title for entry in contents.firing if entry.run.control is not None}
    protocol = contents.firing[0].protocol
    source = f" Excerpts scored by {protocol}."
    figures = "\n".join(_figure(name, figure, source) for name, figure in contents.firing_figures.items())
    whole, *layers = contents.firing_tables
    chosen = standing_sentences()["firing examples"].format(needed=relevant_needed(protocol), protocol=protocol)
    return "\n".join([
        *map(paragraph, contents.firing_sentences), figures, as_html(whole, quiet=quiet),
        _folded("Every layer", layers, quiet), side_by_side(contents.firing, chosen),
    ])  # fmt: skip


def _method(results: Results) -> str:
    text = standing_sentences()
    parts = {
        f"{results.mode} mode": text["modes"][results.mode],
        results.described: text["explainers"].get(results.explainer, text["explainers"]["llm"]),
        **{name: text["protocols"].get(name, "") for name in results.protocols},
        "score": text["score"], "controls": text["controls"],
        "intervals": f"95 %, by two-level bootstrap over neurons and excerpts: {RESAMPLES:,} resamples, seeded with "
        f"{SEED}, the protocol and the layer.",
    }  # fmt: skip
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{prose(part)}</dd>" for name, part in parts.items())
    return f"<dl>{terms}</dl>\n{_facts(results.rows)}"


def _facts(runs: Sequence[RunResult]) -> str:
    """Settings and origin of the runs side by side; a value that all runs share spans the columns."""
    columns = [dict(_flat({"run": str(run.path), "training": run.training or {"tokens": 0}, "model made": run.origin,
                           "records": run.collection})) for run in runs]  # fmt: skip
    head = "".join(f'<th scope="col">{prose(run.title)}</th>' for run in runs)
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
    for key, setting in value.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if key == "versions":
            yield name, ", ".join(f"{package} {version}" for package, version in setting.items())
        elif isinstance(setting, Mapping):
            yield from _flat(setting, f"{name}: ")
        elif isinstance(setting, list):
            yield name, ", ".join(map(str, setting))
        elif setting is not None and key != "format_version":
            yield name, f"{setting:,}" if isinstance(setting, int) and key != "seed" else str(setting)
