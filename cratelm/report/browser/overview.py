"""What a browser opens with: the models and their layers, and the report's sentences, tables and figures as values."""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib.figure import Figure

from cratelm.activations.records import Mode, read_collection
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store
from cratelm.report.browser.catalogue import Model
from cratelm.report.contents import ReportContents, standing_sentences
from cratelm.report.figures.form import inline_svg
from cratelm.report.results.gather import Results, gather
from cratelm.report.tables.form import Table, as_csv, written
from cratelm.rundir import origin


def public(text: str) -> str:
    """A text that names files, for others to read: absolute paths, which tell of one machine, by their last part."""
    quoted = re.sub(r"(['\"])/(?:[^'\"]*/)?([^'\"/]+)\1", r"\1\2\1", text)
    return re.sub(r"(?<![\w.~/-])(?:/[^\s/'\"]+)+/([^\s/'\"]+)", r"\1", quoted)


def manifest(models: Sequence[Model], mode: Mode) -> dict[str, Any]:
    """Which models, taps and layers there are, and where their chunks lie: what every page needs first.

    `capabilities` names what only a server can do; a folder can do none of it.
    """
    return {
        "mode": mode, "origin": (made := origin()) | {"command": public(made["command"])}, "capabilities": {},
        "models": [_model(model, mode) for model in models],
    }  # fmt: skip


def _model(model: Model, mode: Mode) -> dict[str, Any]:
    run, command = model.run, f"cratelm collect {model.run} --data DIR"
    collected = read_collection(run, mode=mode) if model.taps else {}
    return {
        "slug": model.slug, "title": model.title, "name": model.name, "run": public(str(run)),
        "arch": model.description["arch"],
        "control": model.description.get("control"), "layers": int(model.description["model"]["num_layers"]),
        "tokens": collected.get("tokens"), "documents": collected.get("documents"),
        "missing": "" if model.taps else public(f"Nothing was collected. Run: {command}"),
        "taps": [
            {
                "name": tap.name, "slug": tap.slug,
                "layers": [{"layer": layer.layer, "folder": layer.folder} for layer in tap.layers],
            }
            for tap in model.taps
        ],
    }  # fmt: skip


def overview(models: Sequence[Model], mode: Mode) -> dict[str, Any]:
    """The report on those runs that are scored, at every tap; for the others, what to run."""
    runs = [model.run for model in models]
    taps = tuple(dict.fromkeys(tap.name for model in models for tap in model.taps))
    ready = [run for run in runs if Store(run).path.exists()]
    option = " --mode compat" if mode == "compat" else ""
    missing = [f"{run.name} is not scored. Run: cratelm interpret {run}{option}" for run in runs if run not in ready]
    results, left_out = _gathered(ready, mode, taps)
    missing += left_out
    return (_report(ReportContents(results)) if results else {"sentences": [], "tables": [], "figures": []}) | {
        "missing": [public(one) for one in (*missing, *(results.missing if results else ()), *_not_looked_into(models))]
    }


def _gathered(runs: Sequence[Path], mode: Mode, taps: Sequence[str]) -> tuple[Results | None, list[str]]:
    """The results of those runs that have them, and why others have none: one such run hides no other."""
    why: dict[Path, str] = {}
    try:
        return (gather(runs, mode=mode, taps=taps) if runs else None), []
    except CrateError as error:
        together = str(error)
    for run in runs:
        try:
            gather([run], mode=mode, taps=taps)
        except CrateError as error:
            why[run] = str(error)
    rest = [run for run in runs if run not in why]
    if not why or not rest:
        return None, [together]
    results, more = _gathered(rest, mode, taps)
    return results, [*why.values(), *more]


def _not_looked_into(models: Sequence[Model]) -> list[str]:
    """What the weights and the codes could say and nobody has asked."""
    return [
        f"{model.title}: {what} are not measured. Run: cratelm {verb} {model.run}{option}"
        for model in models
        if model.description.get("control") is None and (model.run / "model").exists()
        for what, path, verb, option in (
            ("coding rates and sparsity", model.run / "whitebox.json", "whitebox", " --data DIR"),
            ("tokens in and out", model.run / "directions", "directions", ""),
        )
        if not path.exists()
    ]


def _report(contents: ReportContents) -> dict[str, Any]:
    """What `write_report` puts into its folder, as values."""
    folded = [*contents.firing_tables[1:], *chain.from_iterable(contents.folded_tables.values())]
    return {
        "sentences": [*contents.sentences, *contents.firing_sentences],
        "tables": [table_value(table) | {"folded": table in folded} for table in contents.every_table],
        "figures": [figure_value(name, figure) for name, figure in contents.every_figure.items()],
    }


def table_value(table: Table) -> dict[str, Any]:
    """A table as it is read, and as CSV for who takes it away."""
    return {
        "name": table.name, "caption": table.caption, "csv": as_csv(table),
        "notes": [public(note) for note in table.notes],
        "columns": [
            {"title": column.title, "unit": column.unit, "number": column.style != "text"} for column in table.columns
        ],
        "rows": [
            [written(cell, column.style) for cell, column in zip(row, table.columns, strict=True)] for row in table.rows
        ],
    }  # fmt: skip


def figure_value(name: str, figure: Figure) -> dict[str, Any]:
    """A figure as a tree of the few elements that a drawing needs, for the page to build anew."""
    sentences = standing_sentences()
    drawing = ElementTree.fromstring(inline_svg(figure, name, sentences["alternatives"].get(name, name)))
    return {"name": name, "caption": sentences["captions"].get(name, ""), "drawing": _tree(drawing)}


def _tree(element: ElementTree.Element) -> list[Any]:
    """`[tag, attributes, children and text...]`."""
    parts: list[Any] = [element.text] if element.text and element.text.strip() else []
    for child in element:
        parts.append(_tree(child))
        if child.tail and child.tail.strip():
            parts.append(child.tail)
    return [element.tag.rpartition("}")[2], dict(element.attrib), *parts]
