"""The scorers on the neurons of a layer: set by set, neuron by neuron, each kept as it is ready.

    Task + scorer + (language model or encoder)  ->  rows of the table `answers`, which `judged` reads back

A scorer that tests explanations has a set for every set of explanations and every control of them; one that needs none
(`intruder`, `example-embedding`) has one set for the layer. A neuron with too few windows has a row that says so.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cratelm.interpretation.llm import LLM
from cratelm.interpretation.scorers.classification import Questions, enough_windows
from cratelm.interpretation.scorers.embedding import Encoder
from cratelm.interpretation.scorers.registry import SCORERS, ScorerAggregate, aggregate_scorer, judge
from cratelm.interpretation.scorers.results import Judged
from cratelm.interpretation.scorers.windows import TOO_FEW, contrast
from cratelm.interpretation.scoring.statistics import generator
from cratelm.interpretation.simulators.controls import CONSTANT_EXPLANATION, NO_NEURON
from cratelm.interpretation.stages.concurrency import Tally
from cratelm.interpretation.stages.language_model import (
    Task,
    explanations_of,
    failures,
)
from cratelm.interpretation.stages.language_model import made_with as explained_with
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet, begun
from cratelm.interpretation.store.schema import SetKey


@dataclass(frozen=True, kw_only=True, slots=True)
class Jury:
    """Who is asked, about what windows, in what text."""

    pieces: Sequence[bytes]
    """The bytes of each token id (`cratelm.data.tokenizer.token_bytes`)."""
    questions: Questions
    llm: LLM | None = None
    """For scorers that ask a language model."""
    encoder: Encoder | None = None
    """For scorers that compare vectors."""

    def name_for(self, scorer: str) -> str:
        """The name of whoever is asked."""
        asked = self.encoder if SCORERS[scorer].needs == "encoder" else self.llm
        assert asked is not None, f"nobody to ask for {scorer}"
        return asked.name

    def told(self, scorer: str) -> dict[str, Any]:
        """All that results depend on beside records and explanations."""
        who = self.llm.identity if SCORERS[scorer].needs != "encoder" and self.llm else self.name_for(scorer)
        words = hashlib.sha256(SCORERS[scorer].prompts.read_bytes()).hexdigest()[:16]
        return {**asdict(self.questions), "judge": who, "prompts": words}


def judged_key(key: SetKey, scorer: str, judge_name: str) -> SetKey:
    """The set of a scorer's results on these explanations; of one that needs none, the layer's own."""
    if SCORERS[scorer].explained:
        return replace(key, simulator=f"judge {judge_name}")
    return replace(key, simulator=f"judge {judge_name}", explainer="", protocol="", control="", sample=0)


async def judge_set(task: Task, scorer: str, jury: Jury) -> Tally:
    """Apply a scorer to the chosen neurons of a set; `task.key` is its `judged_key`.

    One that tests explanations is applied to the neurons that have one. Those with too few windows are noted first: as
    successes of nobody they would hide that a model gives no usable answer. Stopped and started again, it goes on.
    """
    settings = jury.told(scorer)
    texts: dict[int, str] = {}
    if SCORERS[scorer].explained:
        explained = explanations_of(task)
        neurons = np.array(sorted(set(explained) & set(task.explainable.tolist())), dtype=np.int64)
        sources = task.sources(neurons)
        texts = {
            neuron: explained[source] if source != NO_NEURON else CONSTANT_EXPLANATION
            for neuron, source in sources.items()
        }
        settings |= {"explained": explained_with(task.store, task.key.explained), "control": task.key.control}
        asked = np.array(list(sources), dtype=np.int64)
    else:
        asked = task.neurons
    growing = task.begin(scorer, asked, settings)
    part, parts = task.part
    # A part knows the explanations of its own share alone, so the share is one of the neurons that can be explained.
    explained_here = set(asked.tolist()) & task.share if SCORERS[scorer].explained else None
    share = set(np.array_split(asked, parts)[part - 1].tolist()) if explained_here is None else explained_here

    few = {}
    for neuron in sorted(share & set(growing.missing())):
        windows = contrast(task.records[neuron], jury.questions)
        if not enough_windows(scorer, windows, jury.questions):
            few[neuron] = Judged(reason=TOO_FEW, active=windows.active, silent=windows.silent).row()
    growing.add(few)

    async def one(neuron: int) -> dict[str, Any]:
        found = await judge(
            scorer, task.records[neuron], texts.get(neuron, ""), jury.pieces, jury.questions, llm=jury.llm,
            encoder=jury.encoder,
        )  # fmt: skip
        return found.row()

    tally = await task.fill(growing, one, share)
    return Tally(done=tally.done + len(few), failed=tally.failed)


def judged(store: Store, key: SetKey, scorer: str) -> dict[int, Judged]:
    """A scorer's results by neuron, those that are there; the neurons that failed are `llm_stages.failures`."""
    rows = GrowingSet(store=store, key=key, stage=scorer, neurons=np.empty(0, dtype=np.int64)).rows()
    return {neuron: Judged.of_row(row) for neuron, row in rows.items() if isinstance(row, dict)}


def aggregate_judged(
    store: Store, key: SetKey, scorer: str, *, seed: int = 0, resamples: int = 2000
) -> ScorerAggregate:
    """One scorer over the neurons of a layer, whole set or not."""
    failed = len(failures(store, key, scorer))
    rng, options = generator(seed, f"{scorer} {key.protocol}", key.layer), options_asked(store, key, scorer)
    return aggregate_scorer(
        scorer, judged(store, key, scorer), failed=failed, options=options, rng=rng, resamples=resamples
    )


def options_asked(store: Store, key: SetKey, scorer: str) -> int | None:
    """Among how many windows the questions of a set hide an intruder; None where the store does not know."""
    with store.transaction() as connection:
        started = begun(connection, key, scorer)
    return None if started is None else json.loads(started.settings).get("options")


def judged_sets(store: Store) -> list[tuple[SetKey, str]]:
    """Every whole set of a scorer's results there is, with the scorer."""
    return [(key, stage) for stage in SCORERS for key in store.sets(stage)]
