"""Turn the scores of one or more runs into the paper's tables, figures, and one page to look at.

    cratelm report runs/demo/crate-2l runs/demo/gpt2-2l runs/demo/crate-2l-random runs/demo/gpt2-2l-random
    cratelm report runs/mine --mode compat --out mine-report
    cratelm report runs/demo/crate-2l runs/demo/gpt2-2l --site

Name control runs (random weights) along with their models. The folder gets report.html, which opens from disk and
asks nothing of the network; performance, interpretability and layers as .md, .csv and .tex; loss and scores as .svg
and .png, and firing_examples, two models' best neurons side by side. Where runs have autoencoders that are evaluated
and scored (docs/sae.md), faithfulness compares their latents with the neurons of the same layers.

With --site it is a browser instead: a folder with a page for every neuron of every run, scored or not, that opens by
double click or from any static host. Run again, it renews what has changed. It shows every tap, explainer and
simulator, so --tap, --explainer and --simulator are refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cratelm.workflows.naming import report_folder

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from cratelm.report.tables.form import Table


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Which runs to report on, and where."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    """Run directories, scored by `cratelm interpret`."""
    out: Path | None = None
    """Folder of the report; left out, `report` (with --site `site`) in the folder that holds the runs, or in the run
    if it is one."""
    site: bool = False
    """Write the browser: every neuron of every tap, at most 20 KB each."""
    mode: Literal["fixed", "compat"] = "fixed"
    """Which records the scores are from."""
    tap: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = ("neurons",)
    """Which places of the models: neurons, sae-NAME, ...; several are shown as separate rows."""
    explainer: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Who explained: lookup, or the language model's name; left out, lookup. All are set side by side in any case."""
    simulator: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = ""
    """Who simulated, as tables name it: all-at-once:MODEL; left out, the first that the explainer has."""


def run(options: Options) -> None:
    """Write the report or the browser, and print where its first page is."""
    if options.site:
        from cratelm.report.browser.site import write_site

        _refuse_ignored(options)
        _print_path(write_site(options.runs, options.out or report_folder(options.runs, "site"), mode=options.mode))
    else:
        _report(options)


def _refuse_ignored(options: Options) -> None:
    """Refuse options that select results: the browser shows all results."""
    from cratelm.errors import CrateError

    selecting = {
        "--tap": options.tap != ("neurons",),
        "--explainer": options.explainer,
        "--simulator": options.simulator,
    }
    if ignored := [name for name, value in selecting.items() if value]:
        raise CrateError(
            f"--site shows every tap, explainer and simulator, so {' and '.join(ignored)} would choose nothing. "
            f"Leave {'it' if len(ignored) == 1 else 'them'} out"
        )


def _report(options: Options) -> None:
    """Write the report, then print the table and where the page is."""
    # Reading the options must stay quick; the work needs numpy and matplotlib.
    from rich.console import Console

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
    _print_path(page)


def _printed(table: "Table", caption: str) -> "RichTable":
    """A table of the report for a terminal."""
    from rich.table import Table as RichTable
    from rich.text import Text

    from cratelm.report.tables.form import written

    grid = RichTable(box=None, padding=(0, 1, 0, 0), pad_edge=False, caption_justify="left", caption_style="")
    grid.caption = Text(caption)
    for column in table.columns:
        grid.add_column(Text(column.title), justify="left" if column.style == "text" else "right", overflow="fold")
    for row in table.rows:
        texts = [written(cell, column.style) for cell, column in zip(row, table.columns, strict=True)]
        grid.add_row(*(Text(text.replace(" [", "\n[")) for text in texts))
    return grid


def _print_path(page: Path) -> None:
    print(page if not page.is_relative_to("..") else page.resolve())
