"""Write tables, figures and an HTML page of the scores of one or more runs; with --site the neuron browser.

    cratelm report runs/demo/crate-2l runs/demo/gpt2-2l runs/demo/crate-2l-random runs/demo/gpt2-2l-random
    cratelm report runs/mine --mode compat --out mine-report
    cratelm report runs/demo/crate-2l runs/demo/gpt2-2l --site

Give control runs (random weights) along with their models. The folder gets report.html, which works offline; the
tables performance, interpretability and layers as .md, .csv and .tex; the figures loss and scores as .svg and .png.
If runs have autoencoders that are evaluated and scored (docs/sae.md), the table faithfulness compares their latents
with the neurons of the same layers.

--site writes the neuron browser instead: a folder with a page for every neuron of every run, scored or not, which opens
from disk or from any static host. The same command updates pages that have changed. The browser shows every tap,
explainer and simulator, so it takes no --tap, --explainer or --simulator.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from cratelm.errors import CrateError
from cratelm.report.tables.form import Table, written
from cratelm.workflows.naming import report_folder, shown_path
from cratelm.workflows.options.arguments import RunPaths


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of `cratelm report`."""

    runs: RunPaths
    """Run directories, scored by `cratelm interpret`."""
    out: Path | None = None
    """Folder to write. Default: `report` (`site` with --site) in the folder of the runs; in the run if there is one."""
    site: bool = False
    """Write the neuron browser: every neuron of every tap, at most 20 KB each."""
    mode: Literal["fixed", "compat"] = "fixed"
    """Mode of the records and scores."""
    tap: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ("neurons",)
    """Taps to report: neurons, sae-NAME, ...; each tap gets separate rows."""
    explainer: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Explainer of the main tables: lookup (default), or the name of a language model. One table compares all."""
    simulator: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Simulator, by its name in the tables, such as all-at-once:MODEL; by default the explainer's first."""


def run(options: Options) -> None:
    """Write the report or the browser, and print the path of its first page."""
    if options.site:
        from cratelm.report.browser.site import write_site

        _refuse_ignored(options)
        print(
            shown_path(write_site(options.runs, options.out or report_folder(options.runs, "site"), mode=options.mode))
        )
    else:
        _report(options)


def _refuse_ignored(options: Options) -> None:
    """Refuse options that select results: the browser shows all results."""
    selecting = {
        "--tap": options.tap != ("neurons",),
        "--explainer": options.explainer,
        "--simulator": options.simulator,
    }
    if ignored := [name for name, value in selecting.items() if value]:
        raise CrateError(
            f"--site must be given without {' and '.join(ignored)}: it shows every tap, explainer and simulator"
        )


def _report(options: Options) -> None:
    """Write the report, then print its summary and the path of the page."""
    # Reading the options must stay quick; the work needs numpy and matplotlib.
    from cratelm.report.contents import ReportContents
    from cratelm.report.page.html import write_report
    from cratelm.report.results.gather import gather

    contents = ReportContents(
        gather(
            options.runs, mode=options.mode, taps=options.tap, explainer=options.explainer, simulator=options.simulator
        )
    )
    page = write_report(contents, options.out or report_folder(options.runs))
    console = Console(highlight=False, markup=False)
    console.print(_printed(contents.summary, "loss in nats per token, scores in points with 95 % intervals"))
    for note in contents.summary.notes:
        console.print(f"\n{note}")
    if (latents := contents.latents_summary) is not None:
        console.print()
        console.print(_printed(latents, latents.caption))
    for sentence in contents.sentences:
        console.print(f"\n{sentence}")
    print()
    print(shown_path(page))


def _printed(table: Table, caption: str) -> RichTable:
    """A table of the report for a terminal."""
    grid = RichTable(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left", caption_style="")
    grid.caption = Text(caption)
    for column in table.columns:
        grid.add_column(Text(column.title), justify="left" if column.style == "text" else "right", overflow="fold")
    for row in table.rows:
        texts = [written(cell, column.style) for cell, column in zip(row, table.columns, strict=True)]
        grid.add_row(*(Text(text.replace(" [", "\n[")) for text in texts))
    return grid
