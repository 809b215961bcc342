"""The contents of a report, computed once from the results of its runs.

`report.html`, the site, the live server, the terminal and the model card render these contents, so a new table or
figure appears on every page.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cratelm.report.figures.firing import firing_figures
from cratelm.report.figures.paper import figures
from cratelm.report.figures.study import study_figures
from cratelm.report.figures.whitebox import whitebox_figures
from cratelm.report.results.faithfulness import Units, compared
from cratelm.report.results.firing import RunFiring, gather_firing
from cratelm.report.results.gather import Results
from cratelm.report.results.study import Study, study_of
from cratelm.report.results.whitebox import View, views_of
from cratelm.report.sentences import firing_sentences, study_sentences, verdict
from cratelm.report.tables.agreement import agreement_tables
from cratelm.report.tables.explainers import explainer_tables
from cratelm.report.tables.faithfulness import faithfulness, faithfulness_summary
from cratelm.report.tables.firing import firing_tables
from cratelm.report.tables.form import Table
from cratelm.report.tables.paper import by_layer, interpretability, performance, summary
from cratelm.report.tables.scorers import judged_tables
from cratelm.report.tables.study import study_tables
from cratelm.report.tables.whitebox import whitebox_tables


@dataclass(frozen=True)
class ReportContents:
    """The contents of a report. Each part is computed at its first use and cached."""

    results: Results

    @cached_property
    def study(self) -> Study | None:
        """The runs grouped by seed; None if no two runs differ only in their seed."""
        return study_of(self.results)

    @cached_property
    def shown(self) -> Results:
        """The runs that are shown individually: in a study, one run of each group."""
        return self.results if self.study is None else self.study.first_seeds

    @cached_property
    def units(self) -> tuple[Units, ...]:
        """Neurons and autoencoder latents of the same layers."""
        return compared(self.results)

    @cached_property
    def firing(self) -> tuple[RunFiring, ...]:
        """Consistency and distinctiveness of the shown runs."""
        return gather_firing(self.shown)

    @cached_property
    def views(self) -> list[View]:
        """The white-box views of all runs."""
        return views_of(self.results.rows)

    @cached_property
    def sentences(self) -> list[str]:
        """Scores, losses and costs compared in sentences."""
        return verdict(self.results) if self.study is None else study_sentences(self.study)

    @cached_property
    def firing_sentences(self) -> list[str]:
        """Consistency and distinctiveness compared in sentences."""
        return firing_sentences(self.firing)

    @cached_property
    def summary(self) -> Table:
        """The short table at the top of every report; it is not written to files."""
        return summary(self.shown)

    @cached_property
    def latents_summary(self) -> Table | None:
        """The short table of neurons and autoencoder latents, for a terminal."""
        return faithfulness_summary(self.results, self.units) if self.units else None

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """The tables that are shown unfolded."""
        main = (self.summary, performance(self.results), interpretability(self.results))
        latents = (faithfulness(self.results, self.units),) if self.units else ()
        scorers = (*judged_tables(self.results), *agreement_tables(self.results))
        others = (*explainer_tables(self.results), *scorers, *latents)
        return (*study_tables(self.study), *main, *others)

    @cached_property
    def folded_tables(self) -> Mapping[str, tuple[Table, ...]]:
        """Title of a group -> its long tables, folded on a page."""
        groups = {
            "Every layer": (by_layer(self.results),),
            "White-box view of every layer": whitebox_tables(self.views),
        }
        return {title: tables for title, tables in groups.items() if tables}

    @cached_property
    def firing_tables(self) -> tuple[Table, ...]:
        """Firing by model, then by layer; empty if no run has simulations."""
        return firing_tables(self.firing)

    @property
    def every_table(self) -> tuple[Table, ...]:
        """All tables, including the firing tables."""
        return (*self.tables, *self.firing_tables, *chain.from_iterable(self.folded_tables.values()))

    @cached_property
    def figures(self) -> Mapping[str, Figure]:
        """Name -> figure, without the firing figures."""
        drawn = figures(self.results) if self.study is None else study_figures(self.study)
        return {**drawn, **whitebox_figures(self.views)}

    @cached_property
    def firing_figures(self) -> Mapping[str, Figure]:
        """Name -> figure of consistency and distinctiveness."""
        return firing_figures(self.firing)

    @property
    def every_figure(self) -> Mapping[str, Figure]:
        """Name -> figure, including the firing figures."""
        return {**self.figures, **self.firing_figures}


@cache
def standing_sentences() -> dict[str, Any]:
    """The captions of figures and the descriptions of methods."""
    return json.loads(Path(__file__).with_name("prose.json").read_text(encoding="utf-8"))
