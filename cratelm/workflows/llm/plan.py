"""The estimate that is printed before a language model is called: what is missing, and its calls, tokens and price.

Each stage runs on up to `COUNTED` neurons of a set with a model that counts its prompts; the other neurons are taken to
cost the same.
"""

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any

from jaxtyping import Int64
from numpy import ndarray

from cratelm.interpretation.explainers.language_model import LLMExplainer
from cratelm.interpretation.llm import LLM, LLMError
from cratelm.interpretation.prompts.explainer import PromptTooLong
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.protocols import draw
from cratelm.interpretation.scorers.registry import SCORERS, judge
from cratelm.interpretation.simulators.contrastive import with_changes
from cratelm.interpretation.simulators.language_model import LLMSimulator
from cratelm.interpretation.simulators.self_test import puzzles
from cratelm.interpretation.stages.estimate import Cost, CountingLLM, estimated_seconds
from cratelm.interpretation.stages.judge import JudgeContext, items_source, scorer_settings
from cratelm.interpretation.stages.set_task import SetTask, explanation_from, failures, settings_hash
from cratelm.interpretation.store.database import Store, identity
from cratelm.interpretation.store.growing_sets import GrowingSet, begun
from cratelm.interpretation.store.schema import Stage
from cratelm.runtime import ProgressBar, console, duration, human
from cratelm.workflows.options.language_model import Spending

COUNTED = 8
"""Neurons of a set whose prompts are counted; in a smaller set the numbers are exact."""
TIMED_TOKENS = 64
"""Tokens of a timed excerpt: the longest of the protocols."""
TIMED_AT_ONCE = 8
"""Excerpts that are timed at once; fewer if fewer may be in flight, or if they would take too long."""
LONGEST_TRIAL = 20.0
"""Longest trial in seconds, after its first call."""
Ask = Callable[[CountingLLM, int], Awaitable[int]]
"""Runs a stage on one neuron with a counting model. Returns the number of few-shot excerpts that the prompt omits."""


@dataclass(slots=True)
class Line:
    """One stage of the plan."""

    stage: str
    neurons: int = 0
    """Neurons of the stage, counted once for every set."""
    done: int = 0
    """Neurons whose row is in the store."""
    exact: bool = True
    """Whether every prompt was counted."""
    dropped: int = 0
    """Largest number of few-shot excerpts that a prompt leaves out because the context is short."""
    too_long: str = ""
    """Why a prompt does not fit the context even without few-shot examples."""
    cost: Cost = field(default_factory=Cost)
    """The cost of what is missing."""


@dataclass(slots=True)
class CostPlan:
    """The plan of one run."""

    store: Store
    spending: Spending
    lines: list[Line] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    """Hashes of the calls in the plan, and beginnings that they share: a duplicate is not counted."""
    bar: ProgressBar | None = None
    """Advanced with each set that is counted."""

    async def explain(self, tasks: Iterable[SetTask], explainer: LLMExplainer) -> None:
        """Add sets of explanations."""
        for task in tasks:
            settings = explainer.set_settings(task)

            async def ask(
                llm: CountingLLM, neuron: int, task: SetTask = task, left_out: int = settings.get("left_out", 0)
            ) -> int:
                counting = explainer.with_llm(llm)
                [(_, prompt)] = counting.prompts(task.records, task.protocol, [neuron], left_out=left_out)
                await counting.answers(task)(neuron, prompt)
                return 0 if isinstance(prompt, PromptTooLong) else prompt.dropped

            await self._add("explain", task, "explain", task.explainable, settings, explainer.llm, ask)

    async def simulate(
        self, line: str, tasks: Iterable[SetTask], simulator: LLMSimulator, explainer: LLMExplainer | None
    ) -> None:
        """Add sets of simulations. An explanation that is missing counts as a sentence of typical length."""
        for task in tasks:
            fitted = simulator.fitted(task)
            settings = {**fitted.cache_settings(), "calibrate": simulator.calibrate}
            if explainer is not None:
                explained = explainer.set_settings(replace(task, key=task.key.explained))
                settings["explained"] = settings_hash(json.dumps(explained, sort_keys=True))
            excerpts_of, explanation_of = simulator.excerpts(task), _explanations(task)

            async def ask(
                llm: CountingLLM, neuron: int, fitted: Any = fitted, excerpts_of: Any = excerpts_of,
                explanation_of: Any = explanation_of,
            ) -> int:  # fmt: skip
                counts = Counter[str]()
                text, llm.depends_on = explanation_of(neuron)
                await with_changes(fitted, llm=llm, counts=counts).simulate(text, excerpts_of(neuron))
                return counts["left out"]

            llm = simulator.simulator.llm  # type: ignore[attr-defined]
            await self._add(line, task, "simulate", task.explainable, settings, llm, ask)

    async def judge(self, scorer: str, tasks: Iterable[SetTask], context: JudgeContext) -> None:
        """Add sets of a scorer's results. A scorer with an encoder makes no calls."""
        explained = SCORERS[scorer].explained
        for task in tasks:
            neurons = task.explainable if explained else task.neurons
            explanation_of = _explanations(task) if explained else lambda _: ("", "")
            items_of = items_source(task, scorer, context.questions)

            async def ask(
                llm: CountingLLM, neuron: int, items_of: Any = items_of, explanation_of: Any = explanation_of
            ) -> int:
                text, llm.depends_on = explanation_of(neuron)
                await judge(scorer, items_of(neuron), text, context.pieces, context.questions, llm=llm)
                return 0

            llm = None if SCORERS[scorer].needs == "encoder" else context.llm
            await self._add(scorer, task, scorer, neurons, scorer_settings(task, scorer, context), llm, ask)

    async def _add(
        self, name: str, task: SetTask, stage: Stage, neurons: Int64[ndarray, " neurons"], settings: Mapping[str, Any],
        llm: LLM | None, ask: Ask,
    ) -> None:  # fmt: skip
        """Add one set to the line of this name, which is begun for the first set."""
        if not self.lines or self.lines[-1].stage != name:
            self.lines.append(Line(name))
        line, missing = self.lines[-1], set(neurons.tolist())
        if task.store.path.exists() and not _is_outdated(task, stage, settings):
            missing = set(GrowingSet(store=task.store, key=task.key, stage=stage, neurons=neurons).missing())
        line.neurons += len(neurons)
        line.done += len(neurons) - len(missing)
        asked = sorted(missing & task.share if task.part != (1, 1) else missing)
        if self.bar:
            self.bar.advance(1, note=f"{name} {task.key.what}")
        if llm is None or not asked:
            return
        counted = asked if len(asked) <= COUNTED else [asked[i * len(asked) // COUNTED] for i in range(COUNTED)]
        line.exact &= len(asked) == len(counted)
        counting = CountingLLM(llm, self.store, self.seen)
        for neuron in counted:
            try:
                line.dropped = max(line.dropped, await ask(counting, neuron))
            except PromptTooLong as error:
                line.too_long = str(error)
            except LLMError:
                pass  # the counting model's answer is a placeholder
        line.cost.add(counting.cost, len(asked) / len(counted))

    @property
    def total(self) -> Cost:
        """The cost of all lines."""
        total = Cost()
        for line in self.lines:
            total.add(line.cost)
        return total

    @property
    def error(self) -> str:
        """Why nothing can be done: no prompt of any stage fits the context."""
        fits = any(line.cost.calls or line.cost.cached or not line.too_long for line in self.lines)
        return "" if fits else self.lines[0].too_long

    def table(self, time_line: str = "") -> list[str]:
        """The plan in lines of 80 columns."""
        total = Line("in all", sum(line.neurons for line in self.lines), sum(line.done for line in self.lines))
        total.cost = self.total
        priced = bool(self.spending.price_in or self.spending.price_out)
        heads = ("neurons", "there", "calls", "read", "shared", "written", *(("price",) if priced else ()))
        table = [f"{'stage':<17}" + "".join(f"{head:>9}" for head in heads)]
        for line in (*self.lines, total) if len(self.lines) > 1 else self.lines:
            table.append(f"{line.stage:<17}" + "".join(f"{cell:>9}" for cell in self._cells(line, priced)))
        counted = "" if all(line.exact for line in self.lines) else f", counted from {COUNTED} neurons of each set"
        most = "written and price: of the longest answers" if priced else "written: the longest answers"
        table += [f"tokens{counted}; shared: read once for many prompts", most]
        table += [time_line] if time_line else []
        if dropped := max(line.dropped for line in self.lines):
            excerpts = sum(len(neuron.records) for neuron in few_shot_neurons())
            table.append(f"the context is short: prompts leave out up to {dropped} of {excerpts} few-shot excerpts")
        if too_long := next((line.too_long for line in self.lines if line.too_long), ""):
            table.append(f"neurons with longer prompts than the context cannot be asked: {too_long}")
        if total.cost.duplicates:
            table.append(f"{human(total.cost.duplicates)} duplicate calls skipped")
        return table + ([f"{human(total.cost.cached)} more answers are in the cache"] if total.cost.cached else [])

    def _cells(self, line: Line, priced: bool) -> list[str]:
        cost, spending = line.cost, self.spending
        cells = [f"{line.neurons:,}", f"{line.done:,}", human(cost.calls), human(cost.read)]
        cells += [human(cost.read - cost.computed), human(cost.written)]
        price = (spending.price_in * cost.read + spending.price_out * cost.written) / 1e6
        return cells + ([f"{price:.2f}"] if priced else [])


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


def _is_outdated(task: SetTask, stage: Stage, settings: Mapping[str, Any]) -> bool:
    """Whether the stored rows come from other records or settings."""
    stored = begun(task.store, task.key, stage)
    if stored is None:
        return False
    before, now = json.loads(stored.settings), json.loads(json.dumps(settings))
    other_records = stored.records != identity(task.store.run, task.key.mode)
    return other_records or any(before.get(name) != value for name, value in now.items())


async def time_trial(simulator: Any, store: Store, in_flight: int, cost: Cost) -> str:
    """Time simulations of the self-test's neurons: one alone, then several at once. Returns the plan's line about time.

    The line is empty if no calls are missing. A server's token counts also calibrate the plan's estimates.
    """
    puzzle = puzzles()[0]
    words = [token for puzzle in puzzles() for token in puzzle.tokens]
    number, remote = min(TIMED_AT_ONCE, in_flight), simulator.llm.remote
    excerpts = [list(islice(cycle(words), 7 * i, 7 * i + TIMED_TOKENS)) for i in range(1 + number)]
    method = simulator.name.method
    one_by_one = method in ("token-by-token", "next-token")  # one call per token
    first = excerpts[0][: 1 if one_by_one else None]
    if not remote:  # the speed is the same without few-shot neurons, and a trial is short
        simulator = with_changes(simulator, left_out=len(few_shot_neurons()))
    console.print("timing a simulation")

    async def seconds(excerpts: Sequence[Sequence[str]], llm: LLM) -> float:
        started = time.perf_counter()
        await with_changes(simulator, llm=llm, counts=Counter()).simulate(puzzle.explanation, excerpts)
        return max(time.perf_counter() - started, 1e-6)

    try:
        if method == "next-token":  # the server reads the shared beginning of the prompts only once
            await seconds([words[1:2]], simulator.llm)
        alone = await seconds([first], simulator.llm)
        number = max(min(number, int(LONGEST_TRIAL / alone)), 0)
        others = [excerpts[1][:number]] if one_by_one and number else excerpts[1 : 1 + number]
        others = [[token] for token in others[0]] if method == "next-token" and others else others or [first]
        together = await seconds(others, simulator.llm) if number else alone
    except LLMError as error:
        return f"time: unknown, because a simulation that was tried failed: {error}"
    counting = CountingLLM(simulator.llm, store)
    with contextlib.suppress(LLMError):  # the counting model's answer is a placeholder
        await seconds(others, counting)
    trial = counting.cost
    estimate = estimated_seconds(
        cost, alone=alone, together=together, trial=trial, in_flight=in_flight, remote=remote
    )  # fmt: skip
    speed = (
        f"as one call took {alone:.2g} s now and {max(trial.calls, 1)} at once {together:.2g} s"
        if remote else f"at {human(trial.computed / together)} tokens a second"
    )  # fmt: skip
    return f"time: about {duration(estimate)}, {speed}" if cost.calls else ""
