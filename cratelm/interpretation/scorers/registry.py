"""The registry of scorers other than the paper's correlation, and the mean of one over a layer.

A scorer gets the windows of a neuron (`windows.py`) and returns a `Judged`, whose `row()` is stored. Its number is

    detection, fuzzing, fuzzing-active         balanced accuracy, chance level 1/2
    intruder                                   accuracy, chance level 1 / options
    surprisal, embedding, example-embedding    AUC, chance level 1/2
    quick-detection, output                    AUC, chance level 1/2
    rating                                     correlation, chance level 0
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from cratelm.activations.records import NeuronRecord
from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLM
from cratelm.interpretation.scorers.classification import SCORER_PROMPTS, Questions, detection, fuzzing, intruder
from cratelm.interpretation.scorers.embedding import Encoder, embedding, example_embedding
from cratelm.interpretation.scorers.one_request import (
    ONE_REQUEST_PROMPTS,
    Form,
    output,
    quick_detection,
    rating,
    require_obvious,
)
from cratelm.interpretation.scorers.results import Judged, weighted_correlation
from cratelm.interpretation.scorers.surprisal import check_prompt_logprobs, surprisal
from cratelm.interpretation.scorers.windows import Contrast, contrast
from cratelm.interpretation.scoring.small_samples import freedom_of, rescaled
from cratelm.interpretation.scoring.statistics import interval, sets_each

SIMULATION = "simulation"
"""The paper's scorer, which has two stages: simulate, then score."""
ITEM_RESAMPLES = 64
"""Fewest bootstrap sets of items per neuron (`sets_each`); each draw of a neuron uses one."""
Need = Literal["chat", "prompt-logprobs", "encoder"]
Run = Callable[[str, Contrast, Sequence[bytes], Any, Questions], Awaitable[Judged] | Judged]
"""(explanation, windows, bytes of each token id, `LLM` or `Encoder`, questions) -> result for one neuron."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """A scorer: its function, and what the store, the tables and the command line need to know."""

    name: str
    """Name on the command line, in tables, and of its stage in the store."""
    needs: Need
    """What `run` gets: a model that answers chats, one that returns prompt logprobs, or a sentence encoder."""
    run: Run
    """Scores one neuron."""
    explained: bool = True
    """Whether it tests an explanation; otherwise it tests the neuron itself, and gets an empty explanation."""
    number: str
    """The number in `Judged.numbers` that stands for the result."""
    items: Literal["windows", "promoted tokens"] = "windows"
    """What is asked about: windows of text (`windows.py`), or tokens that the neuron promotes (`promoted.py`)."""
    tested: Form | None = None
    """Form of prompt in which the model is first asked about obvious texts (`one_request.require_obvious`)."""
    prompts: Path = SCORER_PROMPTS
    """File with its prompts; results depend on its hash."""

    def __post_init__(self) -> None:
        assert callable(self.run), f"scorer {self.name} has no function"
        assert self.needs in get_args(Need), f"scorer {self.name} needs {self.needs}"


def _unexplained(run: Callable[..., Awaitable[Judged] | Judged]) -> Run:
    """The function of a scorer that reads no explanation."""
    return lambda _, *rest: run(*rest)


SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer(name="detection", needs="chat", run=detection, number="balanced_accuracy"),
        Scorer(name="fuzzing", needs="chat", run=fuzzing, number="balanced_accuracy"),
        Scorer(name="fuzzing-active", needs="chat", run=partial(fuzzing, active=True), number="balanced_accuracy"),
        Scorer(name="intruder", needs="chat", run=_unexplained(intruder), explained=False, number="accuracy"),
        Scorer(name="surprisal", needs="prompt-logprobs", run=surprisal, number="auc"),
        Scorer(name="embedding", needs="encoder", run=embedding, number="auc"),
        Scorer(
            name="example-embedding",
            needs="encoder",
            run=_unexplained(example_embedding),
            explained=False,
            number="auc",
        ),
        Scorer(
            name="quick-detection",
            needs="prompt-logprobs",
            run=quick_detection,
            tested="detection",
            number="auc",
            prompts=ONE_REQUEST_PROMPTS,
        ),
        Scorer(
            name="rating",
            needs="prompt-logprobs",
            run=rating,
            tested="rating",
            number="correlation",
            prompts=ONE_REQUEST_PROMPTS,
        ),
        Scorer(
            name="output",
            needs="prompt-logprobs",
            run=output,
            number="auc",
            items="promoted tokens",
            prompts=ONE_REQUEST_PROMPTS,
        ),
    )
}
"""By name, in the order of tables. A new scorer needs one line here: all else is derived from the registry."""


def chosen_scorers(names: Iterable[str]) -> tuple[str, ...]:
    """The requested scorers in the registry's order; `all` is every scorer. Refuses an unknown name."""
    known = (SIMULATION, *SCORERS)
    requested = list(names)
    for name in requested:
        if name not in (*known, "all"):
            raise CrateError(f"--scorer must be one or more of: {', '.join(known)}; or all; got {name!r}")
    return tuple(name for name in known if name in requested or "all" in requested)


async def check_llm(names: Sequence[str], llm: LLM, questions: Questions, *, skip_self_test: bool = True) -> None:
    """Refuse a model that lacks what these scorers need, before any call about a neuron is paid for."""
    scorers = [SCORERS[name] for name in names if name in SCORERS]
    needs = {scorer.needs for scorer in scorers}
    if "prompt-logprobs" in needs or ("chat" in needs and questions.answers == "probabilities"):
        await check_prompt_logprobs(llm)
    for scorer in scorers:
        if scorer.tested is not None and not skip_self_test:
            await require_obvious(scorer.name, scorer.tested, llm)


async def judge(
    name: str, record: NeuronRecord | Contrast, explanation: str, pieces: Sequence[bytes], questions: Questions, *,
    llm: LLM | None = None, encoder: Encoder | None = None,
) -> Judged:  # fmt: skip
    """Apply one scorer to one neuron, given its record or the items that were drawn.

    `pieces` is the bytes of each token id. A neuron with too few windows is returned with that reason, without a call.
    Raises `LLMError` if no answer of the model can be parsed.
    """
    scorer = SCORERS[name]
    asked = encoder if scorer.needs == "encoder" else llm
    assert asked is not None, f"{name} needs {scorer.needs}"
    assert isinstance(record, Contrast) or scorer.items == "windows", f"{name} asks about {scorer.items}"
    items = record if isinstance(record, Contrast) else contrast(record, questions)
    result = scorer.run(explanation, items, pieces, asked, questions)
    return await result if isinstance(result, Awaitable) else result


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerAggregate:
    """One scorer averaged over the neurons of a layer."""

    scorer: str
    mean: float | None
    """Mean of the scorer's number over judged neurons, in per cent; None if no neuron is judged."""
    interval: tuple[float, float] | None
    """95 % interval of the mean: two-level bootstrap over neurons and their items."""
    others: dict[str, float]
    """Means of the other measures over the neurons that have them, in per cent: `f1`, `precision`, `recall`, `auc`."""
    chance: float
    """Chance level, in per cent."""
    judged: int
    """Neurons with a number."""
    total: int
    """Neurons that the scorer was applied to."""
    undefined: dict[str, int]
    """Reason -> neurons without a number; `failed` if no answer could be parsed."""
    items: int
    """Items in all prompts."""
    failed: int
    """Items without a usable answer."""


def aggregate_scorer(
    name: str, results: Mapping[int, Judged], *, failed: int = 0, options: int | None = None, rng: np.random.Generator,
    resamples: int = 2000,
) -> ScorerAggregate:  # fmt: skip
    """Summarise a scorer's results on the neurons of a layer.

    `failed`: neurons for which no answer could be parsed. `options`: windows of an intruder question; by default the
    number in the results, or the default of `Questions`.
    """
    scorer = SCORERS[name]
    numbers = [result.numbers() for result in results.values()]
    defined = [
        (result, measures)
        for result, measures in zip(results.values(), numbers, strict=True)
        if scorer.number in measures
    ]
    values = np.array([measures[scorer.number] for _, measures in defined])
    undefined = Counter(result.reason or "undefined" for result, measures in zip(results.values(), numbers, strict=True)
                        if scorer.number not in measures)  # fmt: skip
    others = {
        other: 100 * float(np.mean([measures[other] for _, measures in defined if other in measures]))
        for other in dict.fromkeys(other for _, measures in defined for other in measures)
        if other not in (scorer.number, "low", "high", "chance")
    }
    ends = None
    if defined:
        samples = 100 * _resampled([result for result, _ in defined], scorer.number, values, rng, resamples)
        ends = interval(samples, freedom_of(len(defined)))
    asked = max((result.options for result in results.values()), default=0)  # none where no neuron could be judged
    return ScorerAggregate(
        scorer=name, mean=100 * float(values.mean()) if defined else None, interval=ends, others=others,
        chance=100 * chance(name, asked or options), judged=len(defined), total=len(results) + failed,
        undefined=dict((undefined + Counter({"failed": failed})).most_common()),
        items=sum(len(result.truth) for result in results.values()),
        failed=sum(result.failed for result in results.values()),
    )  # fmt: skip


def chance(name: str, options: int | None = None) -> float:
    """Chance level as a share; `options`: windows of an intruder question, if not the default."""
    levels = {"accuracy": 1 / (options or Questions().options), "correlation": 0.0}
    return levels.get(SCORERS[name].number, 0.5)


def _resampled(
    results: Sequence[Judged], number: str, values: np.ndarray, rng: np.random.Generator, resamples: int
) -> np.ndarray:
    """Bootstrap means over neurons, each with resampled items, positives and negatives separately.

    Shifted to the observed mean, as the bootstrap of correlations is (`statistics.bootstrap_means`).
    """
    sets = sets_each(len(results), resamples, ITEM_RESAMPLES)
    table = np.stack([_resample_items(result, number, rng, sets) for result in results])
    table = np.where(np.isnan(table), values[:, None], table)
    table += (values - table.mean(axis=1))[:, None]
    drawn = rng.integers(len(results), size=(resamples, len(results)))
    return rescaled(table[drawn, rng.integers(table.shape[1], size=drawn.shape)].mean(axis=1), values)


def _resample_items(result: Judged, number: str, rng: np.random.Generator, sets: int) -> np.ndarray:
    """The number of one neuron on items drawn with replacement, `sets` times; NaN if undefined."""
    truth = np.array(result.truth)

    def times(count: int) -> np.ndarray:
        return rng.multinomial(count, np.full(count, 1 / count), size=sets).astype(np.float64)

    if number in ("auc", "correlation"):
        score = np.array([np.nan if value is None else value for value in result.score])
        known = [np.flatnonzero(kind & ~np.isnan(score)) for kind in (truth > 0, truth == 0)]
        if number == "correlation":
            drawn = np.concatenate([times(len(kind)) for kind in known], axis=1)
            return weighted_correlation(drawn, truth[np.concatenate(known)], score[np.concatenate(known)])
        positives, negatives = (score[kind] for kind in known)
        difference = positives[:, None] - negatives
        wins = (difference > 0) + 0.5 * (difference == 0)
        together = np.einsum("ri,ij,rj->r", times(len(positives)), wins, times(len(negatives)))
        return together / (len(positives) * len(negatives))
    answered = np.array([answer is not None for answer in result.answer], dtype=np.float64)
    right = np.array(
        [answer == true for answer, true in zip(result.answer, result.truth, strict=True)], dtype=np.float64
    )
    kinds = [np.arange(len(truth))] if result.options else [np.flatnonzero(truth == kind) for kind in (1, 0)]
    shares = []
    for kind in kinds:
        drawn = times(len(kind))
        with np.errstate(invalid="ignore"):
            shares.append(drawn @ right[kind] / (drawn @ answered[kind]))
    return np.asarray(np.mean(shares, axis=0))
