"""The first page of a browser: the models and their layers, and the report's sentences, tables and figures."""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib.figure import Figure

from cratelm.activations.records import Mode, read_collection
from cratelm.activations.row_beginning import earlier_beginning
from cratelm.errors import CrateError
from cratelm.interpretation.store.database import Store
from cratelm.report.browser.catalogue import Model
from cratelm.report.contents import ReportContents, standing_sentences
from cratelm.report.figures.form import inline_svg
from cratelm.report.results.gather import Results, gather
from cratelm.report.tables.form import Table, as_csv, texts
from cratelm.rundir import origin


def public(text: str) -> str:
    """A text for publication: absolute paths, which describe one machine, are reduced to their last part."""
    quoted = re.sub(r"(['\"])/(?:[^'\"]*/)?([^'\"/]+)\1", r"\1\2\1", text)
    return re.sub(r"(?<![\w.~/-])(?:/[^\s/'\"]+)+/([^\s/'\"]+)", r"\1", quoted)


def manifest(models: Sequence[Model], mode: Mode) -> dict[str, Any]:
    """The models, taps and layers with the folders of their chunks, which every page needs first.

    `capabilities`: the functions that only a server has; empty for a folder.
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
    """The report on the scored runs, at every tap; for the other runs, the command to run."""
    runs = [model.run for model in models]
    taps = tuple(dict.fromkeys(tap.name for model in models for tap in model.taps))
    ready = [run for run in runs if Store(run).path.exists()]
    option = " --mode compat" if mode == "compat" else ""
    missing = [f"{run.name} is not scored. Run: cratelm interpret {run}{option}" for run in runs if run not in ready]
    missing += [
        line for model in models if model.run not in ready and model.taps
        for line in earlier_beginning(model.run, mode, model.title)
    ]  # fmt: skip
    results, left_out = _gathered(ready, mode, taps)
    missing += [*left_out, *(results.missing if results else ()), *_unmeasured(models)]
    report = _report(ReportContents(results)) if results else {"sentences": [], "tables": [], "figures": []}
    return report | {"missing": [public(sentence) for sentence in missing]}


def _gathered(runs: Sequence[Path], mode: Mode, taps: Sequence[str]) -> tuple[Results | None, list[str]]:
    """The results of all runs that can be read, and an error for each other run."""
    errors: dict[Path, str] = {}
    try:
        return (gather(runs, mode=mode, taps=taps) if runs else None), []
    except CrateError as error:
        together = str(error)
    for run in runs:
        try:
            gather([run], mode=mode, taps=taps)
        except CrateError as error:
            errors[run] = str(error)
    rest = [run for run in runs if run not in errors]
    if not errors or not rest:
        return None, [together]
    results, more = _gathered(rest, mode, taps)
    return results, [*errors.values(), *more]


def _unmeasured(models: Sequence[Model]) -> list[str]:
    """A sentence for each command on weights and codes that was not run."""
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
    """The contents of a report as JSON values."""
    folded = [*contents.firing_tables[1:], *chain.from_iterable(contents.folded_tables.values())]
    return {
        "sentences": [*contents.sentences, *contents.firing_sentences],
        "tables": [table_value(table) | {"folded": table in folded} for table in contents.every_table],
        "figures": [figure_value(name, figure) for name, figure in contents.every_figure.items()],
    }


def table_value(table: Table) -> dict[str, Any]:
    """A table as shown, and as CSV for downloading."""
    return {
        "name": table.name, "caption": table.caption, "csv": as_csv(table),
        "notes": [public(note) for note in table.notes],
        "columns": [
            {"title": column.title, "unit": column.unit, "number": column.style != "text"} for column in table.columns
        ],
        "rows": list(texts(table)),
    }  # fmt: skip


def figure_value(name: str, figure: Figure) -> dict[str, Any]:
    """A figure as a tree of SVG elements, from which the page builds the drawing."""
    sentences = standing_sentences()
    drawing = ElementTree.fromstring(inline_svg(figure, name, sentences["alternatives"].get(name, name)))
    return {"name": name, "caption": sentences["captions"].get(name, ""), "drawing": _tree(drawing)}


def _tree(element: ElementTree.Element) -> list[Any]:
    """`[tag, attributes, children and text...]`."""
    parts: list[Any] = [element.text] if element.text and element.text.strip() else []
    for child in element:
        parts.append(_tree(child))
        parts += [child.tail] if child.tail and child.tail.strip() else []
    return [element.tag.rpartition("}")[2], dict(element.attrib), *parts]
