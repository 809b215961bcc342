"""Run a scorer on the neurons of a layer, and store each result when it is ready.

    Task + scorer + (language model or encoder)  ->  rows of the table `answers`, which `judged` reads back

A scorer that tests explanations has a set of results for every set of explanations and every control; a scorer that
needs no explanations (`intruder`, `example-embedding`) has one set for the layer. A neuron with too few windows has a
row with that reason.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cratelm.interpretation.llm import LLM
from cratelm.interpretation.scorers.classification import Questions, enough_windows, too_few
from cratelm.interpretation.scorers.embedding import Encoder
from cratelm.interpretation.scorers.promoted import directions_identity, promoted_tokens, promoting_directions
from cratelm.interpretation.scorers.registry import SCORERS, ScorerAggregate, aggregate_scorer, judge
from cratelm.interpretation.scorers.results import Judged
from cratelm.interpretation.scorers.windows import Contrast, contrast
from cratelm.interpretation.scoring.statistics import generator
from cratelm.interpretation.stages.concurrency import Tally
from cratelm.interpretation.stages.set_task import SetTask, explanation_from, failures
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet, begun
from cratelm.interpretation.store.schema import SetKey


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeContext:
    """The model of a scorer, and the settings of its prompts."""

    pieces: Sequence[bytes]
    """The bytes of each token id (`cratelm.data.tokenizer.token_bytes`)."""
    questions: Questions
    llm: LLM | None = None
    """For scorers that ask a language model."""
    encoder: Encoder | None = None
    """For scorers that compare vectors."""

    def name_for(self, scorer: str) -> str:
        """The name of the model or encoder that a scorer uses."""
        asked = self.encoder if SCORERS[scorer].needs == "encoder" else self.llm
        assert asked is not None, f"no model for {scorer}"
        return asked.name

    def cache_settings(self, scorer: str) -> dict[str, Any]:
        """Every setting that the results depend on, apart from records and explanations."""
        who = self.llm.identity if SCORERS[scorer].needs != "encoder" and self.llm else self.name_for(scorer)
        words = hashlib.sha256(SCORERS[scorer].prompts.read_bytes()).hexdigest()[:16]
        return {**asdict(self.questions), "judge": who, "prompts": words}


def judged_key(key: SetKey, scorer: str, judge_name: str) -> SetKey:
    """The set of a scorer's results on these explanations, or on the layer if it needs no explanations."""
    if SCORERS[scorer].explained:
        return replace(key, simulator=f"judge {judge_name}")
    return replace(key, simulator=f"judge {judge_name}", explainer="", protocol="", control="", sample=0)


def items_source(task: SetTask, scorer: str, questions: Questions) -> Callable[[int], Contrast]:
    """Neuron -> the items that a scorer asks about. Raises `CrateError` if the run has no directions for it."""
    if SCORERS[scorer].items == "promoted tokens":
        directions = promoting_directions(task.store.run, task.key.tap, task.key.layer)
        return lambda neuron: promoted_tokens(directions, neuron, questions)
    return lambda neuron: contrast(task.records[neuron], questions)


def scorer_settings(task: SetTask, scorer: str, context: JudgeContext) -> dict[str, Any]:
    """Every setting that the results depend on, apart from records and explanations."""
    settings = context.cache_settings(scorer)
    if SCORERS[scorer].items == "promoted tokens":
        settings["directions"] = directions_identity(task.store.run, task.key.tap)
    return settings


async def judge_set(task: SetTask, scorer: str, context: JudgeContext) -> Tally:
    """Apply a scorer to the chosen neurons of a set; `task.key` is its `judged_key`.

    A scorer that tests explanations is applied to the explained neurons. Neurons with too few windows are written first
    and not counted as successes, which would hide that a model gives no usable answer. Can be interrupted and resumed.
    """
    items_of, settings = items_source(task, scorer, context.questions), scorer_settings(task, scorer, context)
    texts, sources = dict[int, str](), dict[int, int]()
    asked = task.neurons
    share = set(np.array_split(asked, task.part[1])[task.part[0] - 1].tolist())
    if SCORERS[scorer].explained:
        texts = task.explanations()
        sources = task.sources(texts)
        settings |= {"explained": task.explanations_hash(), "control": task.key.control}
        asked = np.array(list(sources), dtype=np.int64)
        # A part has only the explanations of its share of the explainable neurons.
        share = set(sources) & task.share
    growing = task.begin(scorer, asked, settings)

    few = {}
    for neuron in sorted(share & set(growing.missing())):
        windows = items_of(neuron)
        if not enough_windows(scorer, windows, context.questions):
            few[neuron] = too_few(windows).row()
    growing.add(few)

    async def judge_neuron(neuron: int) -> dict[str, Any]:
        text = explanation_from(texts, sources[neuron]) if sources else ""
        judged = await judge(
            scorer, items_of(neuron), text, context.pieces, context.questions, llm=context.llm,
            encoder=context.encoder,
        )  # fmt: skip
        return judged.row()

    tally = await task.fill(growing, judge_neuron, share)
    growing.finish()
    return Tally(done=tally.done + len(few), failed=tally.failed)


def judged(store: Store, key: SetKey, scorer: str) -> dict[int, Judged]:
    """A scorer's stored results by neuron; neurons that failed are in `failures`."""
    rows = GrowingSet(store=store, key=key, stage=scorer, neurons=np.empty(0, dtype=np.int64)).rows()
    return {neuron: Judged.of_row(row) for neuron, row in rows.items() if isinstance(row, dict)}


def aggregate_judged(
    store: Store, key: SetKey, scorer: str, *, seed: int = 0, resamples: int = 2000
) -> ScorerAggregate:
    """Average a scorer's results over the neurons of a layer, also if the set is not whole."""
    failed = len(failures(store, key, scorer))
    rng, options = generator(seed, f"{scorer} {key.protocol}", key.layer), options_asked(store, key, scorer)
    return aggregate_scorer(
        scorer, judged(store, key, scorer), failed=failed, options=options, rng=rng, resamples=resamples
    )


def options_asked(store: Store, key: SetKey, scorer: str) -> int | None:
    """Windows of an intruder question in a set; None if the store has no settings for it."""
    started = begun(store, key, scorer)
    return None if started is None else json.loads(started.settings).get("options")


def judged_sets(store: Store) -> list[tuple[SetKey, str]]:
    """Every whole set of a scorer's results in the store, with the scorer."""
    return [(key, stage) for stage in SCORERS for key in store.sets(stage)]
