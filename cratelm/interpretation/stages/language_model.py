"""The stages as a language model does them: set by set, neuron by neuron, each kept as it is ready.

    explain     excerpts of the explaining half  -> a sentence
    simulate    a sentence, text of the scoring half -> an expected activation on every token
    score       no language model any more: `score.py`, with the neurons counted that got no usable answer

A set is of the neurons that were chosen and can be explained. What depends on what is in the settings of a set: with
another temperature, model or prompt it is made anew, and so is what was simulated from it.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from cratelm.activations.records import LayerRecords
from cratelm.errors import CrateError
from cratelm.interpretation.explainers.explanation import unexplained
from cratelm.interpretation.explainers.language_model import Explainer
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.prompts.explainer import PromptTooLong
from cratelm.interpretation.protocols import Protocol, draw
from cratelm.interpretation.scoring.correlation import NO_EXPLANATION, NO_SIMULATION, LayerScores, score_layer
from cratelm.interpretation.simulators.calibration import calibration_excerpts, fit
from cratelm.interpretation.simulators.controls import CONSTANT_EXPLANATION, NO_NEURON, sources_of
from cratelm.interpretation.stages.concurrency import Tally, fill
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet, Simulated, begun
from cratelm.interpretation.store.identities import CalibrationMethod
from cratelm.interpretation.store.neuron_selection import Chosen, keep_chosen, kept_chosen
from cratelm.interpretation.store.schema import SetKey, Stage
from cratelm.runtime import ProgressBar

Simulate = Callable[[str, Sequence[Sequence[str]]], Awaitable[Sequence[Float[np.ndarray, " _"]]]]
"""(explanation, tokens of each excerpt) -> the expected activations of each excerpt. Raises `LLMError`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One set of one layer, and how the work on it is done."""

    store: Store
    key: SetKey
    records: LayerRecords
    protocol: Protocol
    chosen: Chosen
    part: tuple[int, int] = (1, 1)
    """Which share of the neurons this process asks about, of how many; (1, 1) for all."""
    in_flight: int = 32
    bar: ProgressBar | None = None
    note: Callable[[], str] = str
    """What the bar shows at its end."""

    @property
    def neurons(self) -> Int64[np.ndarray, " chosen"]:
        """The chosen neurons."""
        return self.chosen.of(self.records.num_neurons, layer=self.records.layer)

    @property
    def explainable(self) -> Int64[np.ndarray, " explainable"]:
        """Those of the chosen neurons that the protocol can explain and score."""
        possible = np.array(unexplained(self.records, self.protocol)) == ""
        return self.neurons[possible[self.neurons]]

    def sources(self, neurons: Int64[np.ndarray, " neurons"]) -> dict[int, int]:
        """Whose explanation each of these explained neurons is simulated from."""
        possible = np.flatnonzero(np.array(unexplained(self.records, self.protocol)) == "")
        return sources_of(self.key.control, neurons, possible, layer=self.key.layer, protocol=self.protocol.name)

    @property
    def share(self) -> set[int]:
        """This process's share of them: a stretch."""
        part, parts = self.part
        return set(np.array_split(self.explainable, parts)[part - 1].tolist())

    def begin(self, stage: Stage, neurons: Int64[np.ndarray, " neurons"], settings: Mapping[str, Any]) -> GrowingSet:
        """Begin a set or take it up again, and note which neurons it is about."""
        growing = GrowingSet.begin(self.store, self.key, stage, neurons.tolist(), settings=settings)
        if len(growing.neurons) == len(neurons) or kept_chosen(self.store, self.key) is None:
            keep_chosen(self.store, self.key, self.neurons)
        return growing

    async def fill(self, growing: GrowingSet, do: Callable[[int], Awaitable[Any]], neurons: Iterable[int]) -> Tally:
        """Make the rows of these neurons that are missing."""
        return await fill(growing, do, neurons=neurons, bar=self.bar, note=self.note, in_flight=self.in_flight)


async def explain(task: Task, explainer: Explainer) -> Tally:
    """Explain the chosen neurons of a set. Refused where no prompt fits the model's context."""
    sample, settings = task.key.sample, explain_settings(task, explainer)
    growing = task.begin("explain", task.explainable, settings)
    share = task.share if task.part != (1, 1) else set(growing.neurons.tolist())
    missing = sorted(share & set(growing.missing()))
    left_out = settings.get("left_out", 0)
    prompts = dict(explainer.prompts(task.records, task.protocol, missing, left_out=left_out))
    too_long = [prompt for prompt in prompts.values() if isinstance(prompt, PromptTooLong)]
    if too_long and len(too_long) == len(prompts):
        raise CrateError(str(too_long[0]))

    async def one(neuron: int) -> str:
        return await explainer.explain(prompts[neuron], sample)

    return await task.fill(growing, one, missing)


def explain_settings(task: Task, explainer: Explainer) -> dict[str, Any]:
    """All that tells a set of explanations from others; where the context is short, what its prompts leave out."""
    told = explainer.settings.told(explainer.llm, task.key.sample)
    needed = explainer.needs(task.records, task.protocol, task.explainable.tolist())
    left_out = _settled(task, "explain", needed, told)
    return told | ({"left_out": left_out} if left_out else {})


def fitted(task: Task, simulator: Any, strings: Sequence[str], calibrate: CalibrationMethod | None) -> Any:
    """The simulator with as many solved neurons as leave room for every excerpt of the set."""
    parts = [draw(task.records, task.protocol.score, "score")]
    parts += [calibration_excerpts(task.records, task.protocol)] if calibrate else []
    excerpts = (
        [strings[token] for token in excerpt.tokens.tolist()]
        for neuron in task.explainable.tolist() for part in parts for excerpt in part.of(neuron)
    )  # fmt: skip
    return replace(
        simulator, left_out=_settled(task, "simulate", simulator.needs(excerpts), simulator.cache_settings())
    )


def _settled(task: Task, stage: Stage, needed: int, told: Mapping[str, Any]) -> int:
    """How much the prompts of a set leave out: what it was begun with, where that is enough.

    So a set that is taken up again for fewer neurons, or with a better count of tokens, stays what it is.
    """
    wanted = json.loads(json.dumps(told))
    for store in (task.store, Store(task.store.run)):
        if store.path.exists():
            with store.transaction() as connection:
                had = begun(connection, task.key, stage)
            settings = json.loads(had.settings) if had is not None else {}
            alike = had is not None and all(settings.get(name) == value for name, value in wanted.items())
            if alike and settings.get("left_out", 0) >= needed:
                return settings.get("left_out", 0)
    return needed


async def simulate(
    task: Task, simulate: Simulate, settings: Mapping[str, Any], strings: Sequence[str], *,
    calibrate: CalibrationMethod | None = None,
) -> Tally:  # fmt: skip
    """Simulate the explained neurons among the chosen ones. `settings` is all that tells the simulator from others.

    `calibrate` brings activations into the neuron's own units, learnt on excerpts that are neither shown nor scored.

    A part does not know which neurons the others could explain, so its set is of all: merged, the set is cut to those
    that have an explanation.
    """
    texts = explanations_of(task)
    neurons = np.array(sorted(set(texts) & set(task.explainable.tolist())), dtype=np.int64)
    sources = task.sources(neurons)
    made = made_with(task.store, task.key.explained)
    settings = {**settings, "calibrate": calibrate, "explained": made, "sources": _digest(sources)}
    alone = task.store.part and not task.key.control
    growing = task.begin("simulate", task.explainable if alone else np.array(list(sources), dtype=np.int64), settings)
    share = set(sources) & task.share if task.part != (1, 1) else set(sources)
    scored = draw(task.records, task.protocol.score, "score")
    learning = calibration_excerpts(task.records, task.protocol) if calibrate else None

    async def one(neuron: int) -> Simulated:
        text = texts[sources[neuron]] if sources[neuron] != NO_NEURON else CONSTANT_EXPLANATION
        own, learnt = list(scored.of(neuron)), list(learning.of(neuron)) if learning else []
        tokens = [[strings[token] for token in excerpt.tokens.tolist()] for excerpt in (*own, *learnt)]
        predicted = await simulate(text, tokens)
        values = np.concatenate(predicted[: len(own)])
        if calibrate:
            fitted = fit(calibrate, _together(predicted[len(own) :]), _together([one.activations for one in learnt]))
            values = fitted.apply(values)
        return Simulated(source=sources[neuron], activations=values.astype(np.float32))

    return await task.fill(growing, one, share)


def _together(parts: Sequence[Float[np.ndarray, " _"]]) -> Float[np.ndarray, " tokens"]:
    return np.concatenate([np.empty(0), *parts])


def explanations_of(task: Task) -> dict[int, str]:
    """The explanations that a set is simulated from. In a part, those of other parts are there once they are merged."""
    key = task.key.explained
    if key.explainer == EXPLAINER:
        return Store.open(task.store.run).texts(key)
    with task.store.transaction() as connection:
        started = begun(connection, key, "explain")
    if task.store.part and started is not None and not task.key.control:
        growing = GrowingSet(store=task.store, key=key, stage="explain", neurons=started.neurons)
        return {neuron: str(text) for neuron, text in growing.rows().items()}
    return Store.open(task.store.run).texts(key)


def score(store: Store, key: SetKey, records: LayerRecords, protocol: Protocol) -> LayerScores:
    """Score a whole set of simulations; neurons that got no usable answer are counted as that."""
    simulations = store.simulations(key)
    failed = dict.fromkeys(failures(store, key.explained, "explain"), NO_EXPLANATION)
    failed |= dict.fromkeys(failures(store, key, "simulate"), NO_SIMULATION)
    return score_layer(records, protocol, simulations, chosen=kept_chosen(store, key), failed=failed)


def failures(store: Store, key: SetKey, stage: Stage) -> dict[int, str]:
    """What a language model said where it gave no usable answer, by neuron."""
    return GrowingSet(store=store, key=key, stage=stage, neurons=np.empty(0, dtype=np.int64)).failures()


def all_failures(store: Store) -> list[tuple[str, str]]:
    """Every failure there is, as (stage, what was said)."""
    with store.transaction() as connection:
        return connection.execute("SELECT stage, message FROM failures").fetchall()


def made_with(store: Store, key: SetKey) -> str:
    """What explanations were made with, as a hash; that of a lookup follows from the records."""
    if key.explainer == EXPLAINER:
        return EXPLAINER
    for one in (store, Store(store.run)):
        if one.path.exists():
            with one.transaction() as connection:
                found = begun(connection, key, "explain")
            if found is not None:
                return settings_hash(found.settings)
    raise AssertionError("simulated before it was explained")


def settings_hash(settings: str) -> str:
    """Of the settings of a set, written as JSON: 16 hexadecimal digits."""
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _digest(sources: Mapping[int, int]) -> str:
    """Of who is simulated from whom; the same for a set that is no control, however many neurons it holds."""
    if all(neuron == source for neuron, source in sources.items()):
        return "own"
    return hashlib.sha256(json.dumps(list(sources.items())).encode()).hexdigest()[:16]
