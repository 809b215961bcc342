"""The plan that is printed before a language model is asked: what is there, what is missing, what that costs."""

import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int64

from cratelm.interpretation.explainers.language_model import Explainer
from cratelm.interpretation.llm import LLM
from cratelm.interpretation.prompts.explainer import ExplainerPrompt, PromptTooLong
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.protocols import draw
from cratelm.interpretation.scorers.registry import SCORERS, judge
from cratelm.interpretation.simulators.calibration import calibration_excerpts
from cratelm.interpretation.simulators.controls import CONSTANT_EXPLANATION, NO_NEURON
from cratelm.interpretation.stages.estimate import COUNTED, Asked, CountingLLM, estimated
from cratelm.interpretation.stages.judge import Jury
from cratelm.interpretation.stages.language_model import (
    Task,
    explain_settings,
    failures,
)
from cratelm.interpretation.store.database import identity
from cratelm.interpretation.store.growing_sets import GrowingSet, begun
from cratelm.interpretation.store.schema import Stage
from cratelm.runtime import human
from cratelm.workflows.llm.pace import Pace
from cratelm.workflows.options.language_model import Spending


@dataclass(slots=True)
class Line:
    """One stage of the plan."""

    what: str
    neurons: int = 0
    """Neurons that the stage is to be done for, counted once for every set."""
    there: int = 0
    """Those of them that are done."""
    exact: bool = True
    """Whether every prompt was counted."""
    dropped: int = 0
    """Records of solved neurons that one of its prompts leaves out, because the context is short; the most."""
    apart: bool = False
    """Whether each prompt leaves out its own, as released."""
    too_long: str = ""
    """Why a prompt of it cannot be asked at all: it does not fit the context even without solved neurons."""
    asked: Asked = None  # type: ignore[assignment]
    """What is missing would cost."""

    def __post_init__(self) -> None:
        self.asked = self.asked or Asked()


async def plan_explain(line: Line, task: Task, explainer: Explainer, seen: set[str]) -> None:
    """Add one set of explanations to a line. `seen`: what the plan asks already."""
    line.apart |= explainer.settings.mode == "compat"
    settings = explain_settings(task, explainer)
    missing, left_out = _missing(line, task, "explain", told=settings), settings.get("left_out", 0)

    async def ask(llm: CountingLLM, neuron: int) -> None:
        counting = replace(explainer, llm=llm)
        for _, prompt in counting.prompts(task.records, task.protocol, [neuron], left_out=left_out):
            if isinstance(prompt, ExplainerPrompt):
                line.dropped = max(line.dropped, prompt.dropped)
            else:
                line.too_long = str(prompt)
            await counting.explain(prompt, task.key.sample)

    await _add(line, task, explainer.llm, missing, ask, seen)


async def plan_simulate(
    line: Line, task: Task, simulator: Any, strings: Sequence[str], told: Mapping[str, Any], seen: set[str]
) -> None:  # fmt: skip
    """Add one set of simulations to a line. What is not explained yet is taken to get a sentence of usual length.

    `told`: the settings of the set, as far as they are known before its neurons are explained.
    """
    missing = _missing(line, task, "simulate", told={**simulator.cache_settings(), **told})
    parts = [draw(task.records, task.protocol.score, "score")]
    parts += [calibration_excerpts(task.records, task.protocol)] if told["calibrate"] else []
    said = _said(task)

    async def ask(llm: CountingLLM, neuron: int) -> None:
        excerpts = [
            [strings[token] for token in excerpt.tokens.tolist()] for part in parts for excerpt in part.of(neuron)
        ]
        text, llm.about = said(neuron)
        counts = Counter[str]()
        try:
            await replace(simulator, llm=llm, counts=counts).simulate(text, excerpts)
        except PromptTooLong as error:
            line.too_long = str(error)
            raise
        finally:
            line.dropped = max(line.dropped, counts["left out"])

    await _add(line, task, simulator.llm, missing, ask, seen)


async def plan_judge(line: Line, task: Task, scorer: str, jury: Jury, seen: set[str]) -> None:
    """Add one set of a scorer's results to a line; what is not explained yet is taken to get a usual sentence."""
    asked = task.explainable if SCORERS[scorer].explained else task.neurons
    missing = _missing(line, task, scorer, asked, told=jury.told(scorer))
    said = _said(task) if SCORERS[scorer].explained else lambda _: ("", "")

    async def ask(llm: CountingLLM, neuron: int) -> None:
        text, llm.about = said(neuron)
        await judge(scorer, task.records[neuron], text, jury.pieces, jury.questions, llm=llm)

    if jury.llm is not None and SCORERS[scorer].needs != "encoder":
        await _add(line, task, jury.llm, missing, ask, seen)


def _said(task: Task) -> Callable[[int], tuple[str, str]]:
    """Neuron -> the explanation that a set gives it; and where that is not there yet, a usual one and what makes it.

    What makes it are the excerpts that it is explained from: by them it is known which sets get the same explanation.
    """
    texts, failed = _explained(task), failures(task.store, task.key.explained, "explain") if _is_there(task) else {}
    expected = [neuron for neuron in task.explainable.tolist() if neuron in texts or neuron not in failed]
    sources = task.sources(np.array(expected, dtype=np.int64))
    excerpts = draw(task.records, task.protocol.explain, "explain")

    def said(neuron: int) -> tuple[str, str]:
        source = sources.get(neuron, neuron)
        if source == NO_NEURON:
            return CONSTANT_EXPLANATION, ""
        if source in texts:
            return texts[source], ""
        key = task.key
        made_from = hashlib.sha256(repr((key.layer, key.tap, key.explainer, key.sample, source)).encode())
        for one in excerpts.of(source):
            made_from.update(one.tokens.tobytes() + one.activations.tobytes())
        return _usual(), made_from.hexdigest()

    return said


def _is_there(task: Task) -> bool:
    return task.store.path.exists()


def _explained(task: Task) -> dict[int, str]:
    """The explanations that are there already."""
    explained = GrowingSet(store=task.store, key=task.key.explained, stage="explain", neurons=task.explainable)
    return {neuron: str(text) for neuron, text in explained.rows().items()} if _is_there(task) else {}


def _usual() -> str:
    """A sentence of usual length, in the place of one that is not there yet."""
    return max((neuron.explanation for neuron in few_shot_neurons()), key=len)


def _missing(
    line: Line, task: Task, stage: Stage, wanted: Int64[np.ndarray, " neurons"] | None = None, *,
    told: Mapping[str, Any] | None = None,
) -> list[int]:  # fmt: skip
    """The neurons that have no row yet, or one of other settings; counts them and those that have one."""
    wanted = task.explainable if wanted is None else wanted
    missing = set(wanted.tolist())
    if task.store.path.exists() and not _is_of_others(task, stage, told or {}):
        missing = set(GrowingSet(store=task.store, key=task.key, stage=stage, neurons=wanted).missing())
    line.neurons += len(wanted)
    line.there += len(wanted) - len(missing)
    return sorted(missing & task.share if task.part != (1, 1) else missing)


def _is_of_others(task: Task, stage: Stage, told: Mapping[str, Any]) -> bool:
    """Whether what is there of a set comes from other records, or was made with other settings: it is made anew."""
    with task.store.transaction() as connection:
        had = begun(connection, task.key, stage)
    if had is None:
        return False
    settings = json.loads(had.settings)
    # Settings as they come back from JSON: lists for tuples.
    wanted = json.loads(json.dumps(told))
    return had.records != identity(task.store.run, task.key.mode) or any(
        settings.get(name) != value for name, value in wanted.items()
    )


async def _add(
    line: Line, task: Task, llm: LLM, missing: Sequence[int], ask: Callable[[CountingLLM, int], Awaitable[None]],
    seen: set[str],
) -> None:  # fmt: skip
    line.asked.add(await estimated(llm, missing, ask, task.store, seen=seen))
    line.exact &= len(missing) <= COUNTED


def lines(found: Sequence[Line], spending: Spending, pace: Pace | str = "") -> list[str]:
    """The plan as a table, 80 columns wide; with the time it takes, where it is known how fast the model is."""
    total = Line("in all", sum(line.neurons for line in found), sum(line.there for line in found))
    for line in found:
        total.asked.add(line.asked)
    priced = bool(spending.price_in or spending.price_out)
    heads = ("neurons", "there", "calls", "read", "shared", "written", *(("price",) if priced else ()))
    table = [f"{'stage':<17}" + "".join(f"{head:>9}" for head in heads)]
    for line in (*found, total) if len(found) > 1 else found:
        asked = line.asked
        cells = [f"{line.neurons:,}", f"{line.there:,}", human(asked.calls), human(asked.read)]
        cells += [human(asked.read - asked.computed), human(asked.written)]
        if priced:
            cells.append(f"{(spending.price_in * asked.read + spending.price_out * asked.written) / 1e6:.2f}")
        table.append(f"{line.what:<17}" + "".join(f"{cell:>9}" for cell in cells))
    counted = "" if all(line.exact for line in found) else f", counted from {COUNTED} neurons of each set"
    most = "written and price: of the longest answers" if priced else "written: the longest answers"
    table += [f"tokens{counted}; shared: read once for many prompts", most]
    if isinstance(pace, Pace) and total.asked.calls:
        table.append(pace.line(total.asked, spending.in_flight))
    elif isinstance(pace, str) and pace:
        table.append(pace)
    if dropped := max(line.dropped for line in found):
        records = sum(len(neuron.records) for neuron in few_shot_neurons())
        table.append(f"the context is short: prompts leave out up to {dropped} of {records} excerpts of solved neurons")
        apart = any(line.apart and line.dropped for line in found)
        which = "each explaining prompt its own, as released; of a set all simulating ones alike"
        table.append(f"({which if apart else 'all prompts of a layer and protocol the same ones'})")
    if too_long := next((line.too_long for line in found if line.too_long), ""):
        table.append(f"neurons with longer prompts than the context cannot be asked: {too_long}")
    if total.asked.again:
        table.append(f"{human(total.asked.again)} more calls would ask the same again, and are not made")
    return table + ([f"{human(total.asked.kept)} more answers are in the cache"] if total.asked.kept else [])
