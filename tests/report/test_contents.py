"""One set of contents: every renderer of a report shows every table and every figure."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from report.tables.test_explainer_tables import ask
from report.tables.test_tables import scored_runs

from cratelm.report.browser import overview_cache
from cratelm.report.browser.chunks import read_script
from cratelm.report.browser.site import write_site
from cratelm.report.contents import ReportContents
from cratelm.report.page.html import page
from cratelm.report.results.gather import gather
from cratelm.report.server.chunk_cache import Chunks


def captions(source: str) -> list[str]:
    """The captions of the page's tables, with plain spaces and hyphens."""
    found = re.findall("<caption>(.*?)</caption>", source)
    return sorted(
        unescape(one).replace("\N{NON-BREAKING HYPHEN}", "-").replace("\N{NO-BREAK SPACE}", " ") for one in found
    )


@pytest.mark.usefixtures("quick_report")
def test_page_site_and_server_show_every_table_and_figure(tmp_path: Path, rng: np.random.Generator) -> None:
    runs = scored_runs(tmp_path, rng, "crate-2l", "gpt2-2l")
    for run in runs:
        ask(run, samples=2)
    contents = ReportContents(gather(runs))
    names = [table.name for table in contents.every_table]
    assert {"summary", "layers", "explainers", "samples", "paired", "firing", "firing_layers"} <= {*names}
    source = page(contents)
    assert captions(source) == sorted(table.caption for table in contents.every_table)
    figures = [*contents.every_figure]
    assert sorted(re.findall('class="figure-([a-z_]+)"', source)) == sorted(figures)
    site = read_script(write_site(runs, tmp_path / "site").parent / "data" / "overview.js")
    chunks = Chunks(runs, capabilities={})
    chunks.overview.wait()
    served = json.loads(chunks.chunk("overview") or b"")
    for shown in (site, served):
        assert [table["name"] for table in shown["tables"]] == names
        assert [figure["name"] for figure in shown["figures"]] == figures
        assert shown["sentences"] == [*contents.sentences, *contents.firing_sentences]


def test_a_change_of_any_module_of_the_report_makes_overviews_again() -> None:
    package = Path(overview_cache.__file__).parents[2]
    stamped = {name for name, *_ in overview_cache._code()}
    for folder in ("report", "interpretation"):
        assert {file.relative_to(package).as_posix() for file in (package / folder).rglob("*.py")} <= stamped
    assert {"report/contents.py", "report/tables/form.py", "report/prose.json"} <= stamped
