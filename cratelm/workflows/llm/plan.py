"""The estimate that is printed before a language model is called: what is missing, and its calls, tokens and price.

The stages run on a few neurons with a model that counts prompts and answers nothing (`stages/estimate.py`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Int64

from cratelm.interpretation.explainers.language_model import LLMExplainer
from cratelm.interpretation.llm import LLM
from cratelm.interpretation.prompts.explainer import ExplainerPrompt, PromptTooLong
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.protocols import draw
from cratelm.interpretation.scorers.registry import SCORERS, judge
from cratelm.interpretation.simulators.language_model import LLMSimulator
from cratelm.interpretation.stages.estimate import COUNTED, Asked, CountingLLM, estimated
from cratelm.interpretation.stages.judge import JudgeContext
from cratelm.interpretation.stages.set_task import SetTask, explanation_from, failures, settings_hash
from cratelm.interpretation.store.database import Store, identity
from cratelm.interpretation.store.growing_sets import GrowingSet, begun
from cratelm.interpretation.store.schema import Stage
from cratelm.runtime import human
from cratelm.workflows.options.language_model import Spending

Ask = Callable[[CountingLLM, int], Awaitable[object]]
"""Asks about one neuron with a model that counts."""


@dataclass(slots=True)
class Line:
    """One stage of the plan."""

    stage: str
    neurons: int = 0
    """Neurons of the stage, counted once for every set."""
    done: int = 0
    """Those of them that are done."""
    exact: bool = True
    """Whether every prompt was counted."""
    dropped: int = 0
    """Largest number of few-shot excerpts that a prompt leaves out because the context is short."""
    each_its_own: bool = False
    """Whether each prompt leaves out its own number, as in the released code."""
    too_long: str = ""
    """Why a prompt does not fit the context even without few-shot examples."""
    asked: Asked = field(default_factory=Asked)
    """The cost of what is missing."""


@dataclass(slots=True)
class Plan:
    """The plan of one run."""

    store: Store
    spending: Spending
    lines: list[Line] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    """Hashes of the calls in the plan: a duplicate is not counted."""

    async def explain(self, tasks: Iterable[SetTask], explainer: LLMExplainer) -> None:
        """Add sets of explanations."""
        line = self._line("explain")
        line.each_its_own = explainer.settings.mode == "compat"
        for task in tasks:
            settings = explainer.set_settings(task)
            missing, left_out = _missing(line, task, "explain", task.explainable, settings), settings.get("left_out", 0)

            async def ask(llm: CountingLLM, neuron: int, task: SetTask = task, left_out: int = left_out) -> None:
                counting = replace(explainer, llm=llm)
                for _, prompt in counting.prompts(task.records, task.protocol, [neuron], left_out=left_out):
                    if isinstance(prompt, ExplainerPrompt):
                        line.dropped = max(line.dropped, prompt.dropped)
                    else:
                        line.too_long = str(prompt)
                    await counting.ask(prompt, task.key.sample)

            await self._add(line, explainer.llm, missing, ask)

    async def simulate(
        self, stage: str, tasks: Iterable[SetTask], simulator: LLMSimulator, explainer: LLMExplainer | None
    ) -> None:
        """Add sets of simulations. An explanation that is missing counts as a sentence of typical length."""
        line = self._line(stage)
        for task in tasks:
            fitted = simulator.fitted(task)
            settings = {**fitted.cache_settings(), "calibrate": simulator.calibrate}
            if explainer is not None:
                explained = explainer.set_settings(replace(task, key=task.key.explained))
                settings["explained"] = settings_hash(json.dumps(explained, sort_keys=True))
            missing = _missing(line, task, "simulate", task.explainable, settings)
            excerpts_of, explanation_of = simulator.excerpts(task), _explanations(task)

            async def ask(
                llm: CountingLLM, neuron: int, fitted: Any = fitted, excerpts_of: Any = excerpts_of,
                explanation_of: Any = explanation_of,
            ) -> None:  # fmt: skip
                counts = Counter[str]()
                text, llm.about = explanation_of(neuron)
                try:
                    await replace(fitted, llm=llm, counts=counts).simulate(text, excerpts_of(neuron))
                except PromptTooLong as error:
                    line.too_long = str(error)
                    raise
                finally:
                    line.dropped = max(line.dropped, counts["left out"])

            await self._add(line, simulator.simulator.llm, missing, ask)  # type: ignore[attr-defined]

    async def judge(self, scorer: str, tasks: Iterable[SetTask], context: JudgeContext) -> None:
        """Add sets of a scorer's results."""
        line = self.lines[-1] if self.lines and self.lines[-1].stage == scorer else self._line(scorer)
        explained = SCORERS[scorer].explained
        for task in tasks:
            wanted = task.explainable if explained else task.neurons
            missing = _missing(line, task, scorer, wanted, context.told(scorer))
            explanation_of = _explanations(task) if explained else lambda _: ("", "")

            async def ask(
                llm: CountingLLM, neuron: int, task: SetTask = task, explanation_of: Any = explanation_of
            ) -> None:
                text, llm.about = explanation_of(neuron)
                await judge(scorer, task.records[neuron], text, context.pieces, context.questions, llm=llm)

            if context.llm is not None and SCORERS[scorer].needs != "encoder":
                await self._add(line, context.llm, missing, ask)

    @property
    def total(self) -> Asked:
        """The cost of all lines."""
        total = Asked()
        for line in self.lines:
            total.add(line.asked)
        return total

    @property
    def error(self) -> str:
        """Why nothing can be done: no prompt of any stage fits the context."""
        fits = any(line.asked.calls or line.asked.kept or not line.too_long for line in self.lines)
        return "" if fits else self.lines[0].too_long

    def table(self, pace: str = "") -> list[str]:
        """The plan in lines of 80 columns; `pace` is a line about the time that it takes."""
        total = Line("in all", sum(line.neurons for line in self.lines), sum(line.done for line in self.lines))
        total.asked = self.total
        priced = bool(self.spending.price_in or self.spending.price_out)
        heads = ("neurons", "there", "calls", "read", "shared", "written", *(("price",) if priced else ()))
        table = [f"{'stage':<17}" + "".join(f"{head:>9}" for head in heads)]
        for line in (*self.lines, total) if len(self.lines) > 1 else self.lines:
            table.append(f"{line.stage:<17}" + "".join(f"{cell:>9}" for cell in self._cells(line, priced)))
        counted = "" if all(line.exact for line in self.lines) else f", counted from {COUNTED} neurons of each set"
        most = "written and price: of the longest answers" if priced else "written: the longest answers"
        table += [f"tokens{counted}; shared: read once for many prompts", most]
        table += [pace] if pace else []
        if dropped := max(line.dropped for line in self.lines):
            records = sum(len(neuron.records) for neuron in few_shot_neurons())
            own = any(line.each_its_own and line.dropped for line in self.lines)
            which = "each explaining prompt its own, as released; of a set all simulating ones alike"
            table += [
                f"the context is short: prompts leave out up to {dropped} of {records} few-shot excerpts",
                f"({which if own else 'all prompts of a layer and protocol the same ones'})",
            ]
        if too_long := next((line.too_long for line in self.lines if line.too_long), ""):
            table.append(f"neurons with longer prompts than the context cannot be asked: {too_long}")
        if total.asked.again:
            table.append(f"{human(total.asked.again)} duplicate calls skipped")
        return table + ([f"{human(total.asked.kept)} more answers are in the cache"] if total.asked.kept else [])

    def _cells(self, line: Line, priced: bool) -> list[str]:
        asked, spending = line.asked, self.spending
        cells = [f"{line.neurons:,}", f"{line.done:,}", human(asked.calls), human(asked.read)]
        cells += [human(asked.read - asked.computed), human(asked.written)]
        price = (spending.price_in * asked.read + spending.price_out * asked.written) / 1e6
        return cells + ([f"{price:.2f}"] if priced else [])

    def _line(self, stage: str) -> Line:
        self.lines.append(Line(stage))
        return self.lines[-1]

    async def _add(self, line: Line, llm: LLM, missing: Sequence[int], ask: Ask) -> None:
        line.asked.add(await estimated(llm, missing, ask, self.store, seen=self.seen))
        line.exact &= len(missing) <= COUNTED


def _explanations(task: SetTask) -> Callable[[int], tuple[str, str]]:
    """Neuron -> (its explanation in this set, ""), or (a typical sentence, a hash of what the missing one depends on).

    The hash is of the excerpts that the neuron is explained from: sets with the same excerpts get the same explanation.
    """
    texts, failed = dict[int, str](), dict[int, str]()
    if task.store.path.exists():
        explained = GrowingSet(store=task.store, key=task.key.explained, stage="explain", neurons=task.explainable)
        texts = {neuron: str(text) for neuron, text in explained.rows().items()}
        failed = failures(task.store, task.key.explained, "explain")
    sources = task.sources(neuron for neuron in task.explainable.tolist() if neuron in texts or neuron not in failed)
    excerpts = draw(task.records, task.protocol.explain, "explain")
    typical = max((neuron.explanation for neuron in few_shot_neurons()), key=len)

    def explanation_of(neuron: int) -> tuple[str, str]:
        source = sources.get(neuron, neuron)
        if source < 0 or source in texts:
            return explanation_from(texts, source), ""
        key = task.key
        made_from = hashlib.sha256(repr((key.layer, key.tap, key.explainer, key.sample, source)).encode())
        for excerpt in excerpts.of(source):
            made_from.update(excerpt.tokens.tobytes() + excerpt.activations.tobytes())
        return typical, made_from.hexdigest()

    return explanation_of


def _missing(
    line: Line, task: SetTask, stage: Stage, wanted: Int64[np.ndarray, " neurons"], settings: Mapping[str, Any]
) -> list[int]:
    """The neurons without a row made with these settings; counts them and the others."""
    missing = set(wanted.tolist())
    if task.store.path.exists() and not _is_outdated(task, stage, settings):
        missing = set(GrowingSet(store=task.store, key=task.key, stage=stage, neurons=wanted).missing())
    line.neurons += len(wanted)
    line.done += len(wanted) - len(missing)
    return sorted(missing & task.share if task.part != (1, 1) else missing)


def _is_outdated(task: SetTask, stage: Stage, settings: Mapping[str, Any]) -> bool:
    """Whether the stored rows come from other records or settings."""
    with task.store.transaction() as connection:
        had = begun(connection, task.key, stage)
    if had is None:
        return False
    stored, wanted = json.loads(had.settings), json.loads(json.dumps(settings))
    return had.records != identity(task.store.run, task.key.mode) or any(
        stored.get(name) != value for name, value in wanted.items()
    )
