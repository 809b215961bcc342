"""The work with language models on one run: the plan, then explanations, simulations and the other scorers."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cratelm.activations.records import records_tokenizer
from cratelm.data.tokenizer import load_tokenizer, token_bytes
from cratelm.errors import CrateError
from cratelm.interpretation.clients.usage import Metered, Usage
from cratelm.interpretation.explainers.language_model import Explainer
from cratelm.interpretation.llm import LLM
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.prompts.escaping import prompt_strings
from cratelm.interpretation.protocols import PROTOCOLS, protocol
from cratelm.interpretation.simulators.simulation import TextSimulator
from cratelm.interpretation.stages import language_model as llm_stages
from cratelm.interpretation.stages.judge import judge_set
from cratelm.interpretation.stages.language_model import Task
from cratelm.interpretation.store.answer_cache import spent
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.runtime import ProgressBar, console, progress_bar
from cratelm.workflows.llm.judges import Judges, find_judges
from cratelm.workflows.llm.opening import (
    Cast,
    choose_simulator,
    examine,
    explainer_name,
    kept,
    metered,
)
from cratelm.workflows.llm.order import Order, records_for
from cratelm.workflows.llm.pace import tried
from cratelm.workflows.llm.plan import Line, lines, plan_explain, plan_judge, plan_simulate
from cratelm.workflows.options.selection import chosen_layers, chosen_protocols


@dataclass(frozen=True, slots=True)
class Made:
    """What was made of one run."""

    explainer: str
    """Name of who explained."""
    kinds: list[SetKey] = field(default_factory=list)
    """Kinds of simulations, layer and protocol open."""
    judged: list[tuple[str, SetKey]] = field(default_factory=list)
    """Scorers with the sets of their results."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work on one run."""

    order: Order
    run: Path
    cast: Cast
    usage: Usage
    strings: dict[str, list[str]] = field(default_factory=dict)
    models: dict[str, LLM] = field(default_factory=dict)
    """By identity, those that are asked through the cache."""

    @cached_property
    def store(self) -> Store:
        """Where answers go: the run's store, or this process's part of it."""
        part, parts = self.order.spending.share
        number = part if parts > 1 else 0
        return Store(self.run, number) if self.order.spending.dry_run else Store.create(self.run, number)

    async def do(self) -> Made:
        """Plan, and unless that is all that was asked for, ask."""
        order, simulator, _ = self.order, None, self.spent_before
        await self.cast.measure(self.store, self.usage)
        if self.cast.simulator is not None and order.simulating is not None:
            can = await self.cast.ask_what_it_can(
                self.cast.simulator, self.store, order.simulating.simulator, self._metered
            )  # fmt: skip
            asked = self._kept(self.cast.simulator)
            simulator = await choose_simulator(asked, order.simulating, order.selection.mode, can)
            if not order.spending.dry_run:
                await examine(simulator, skip=order.simulating.skip_self_test)
        judges = await find_judges(
            order.scorers, chat=self._kept(self.cast.judge), encoder=order.encoder, pieces=self.pieces,
            reader=self._kept(self.cast.simulator or self.cast.judge),
        )  # fmt: skip
        pace = (
            await tried(simulator, self.store, order.spending.in_flight)
            if simulator is not None and order.spending.dry_run
            else ""
        )
        if plan := await self._plan(simulator, judges):
            print("\n".join([f"\n{self.run.name}: {self._subject()}", *lines(plan, order.spending, pace)]))
        if order.spending.dry_run:
            if plan and all(line.too_long and not (line.asked.calls or line.asked.kept) for line in plan):
                raise CrateError(plan[0].too_long)  # as the work itself would end
            return Made(self.explainer_name)
        if self.explainer is not None and "explain" in order.stages:
            with self._bar("explain", self.explained_keys) as bar:
                for task in self.tasks(self.explained_keys, bar):
                    await llm_stages.explain(task, self.explainer)
        kinds = [] if simulator is None else await self._simulate(simulator)
        if waiting := set(self.order.controls) - set(self.controls):
            console.print(
                f"{self.run.name}: the controls {', '.join(sorted(waiting))} need the explanations of all parts. Once "
                f"they are done, merge first (cratelm interpret {self.run} --merge), then run the same command",
                soft_wrap=True,
            )  # fmt: skip
        return Made(self.explainer_name, kinds, [] if judges is None else await self._judge(judges))

    async def _simulate(self, simulator: TextSimulator) -> list[SetKey]:
        keys = self.simulated_keys(simulator)
        with self._bar("simulate", keys) as bar:
            for task in self.tasks(keys, bar):
                strings = self.text(simulator.strings_mode)
                own = llm_stages.fitted(task, simulator, strings, self._calibrate)
                await llm_stages.simulate(task, own.simulate, own.cache_settings(), strings, calibrate=self._calibrate)
        return list(dict.fromkeys(replace(key, layer=0, protocol="") for key in keys))

    async def _judge(self, judges: Judges) -> list[tuple[str, SetKey]]:
        wanted = list(judges.sets(self.explained_keys, self.controls))
        for scorer in judges.scorers:
            keys = [key for name, key in wanted if name == scorer]
            with self._bar(scorer, keys) as bar:
                for task in self.tasks(keys, bar):
                    await judge_set(task, scorer, judges.jury_for(scorer))
        return wanted

    async def _plan(self, simulator: TextSimulator | None, judges: Judges | None) -> list[Line]:
        found, seen = list[Line](), set[str]()
        if self.explainer is not None and "explain" in self.order.stages:
            found.append(Line("explain"))
            for task in self.tasks(self.explained_keys):
                await plan_explain(found[-1], task, self.explainer, seen)
        if simulator is not None:
            for control in ("", *self.controls):
                found.append(Line(f"simulate {control}".strip()))
                strings = self.text(simulator.strings_mode)
                for task in self.tasks([key for key in self.simulated_keys(simulator) if key.control == control]):
                    own = llm_stages.fitted(task, simulator, strings, self._calibrate)
                    await plan_simulate(found[-1], task, own, strings, self._told(task), seen)
        if judges is not None:
            for scorer, key in judges.sets(self.explained_keys, self.controls):
                if not found or found[-1].what != scorer:
                    found.append(Line(scorer))
                for task in self.tasks([key]):
                    await plan_judge(found[-1], task, scorer, judges.jury_for(scorer), seen)
        return found

    def _told(self, task: Task) -> dict[str, Any]:
        """What a set of simulations will be made with, beside the simulator."""
        told: dict[str, Any] = {"calibrate": self._calibrate}
        if self.explainer is not None and "explain" in self.order.stages:
            settings = llm_stages.explain_settings(replace(task, key=task.key.explained), self.explainer)
            told["explained"] = llm_stages.settings_hash(json.dumps(settings, sort_keys=True))
        return told

    def _subject(self) -> str:
        layers = chosen_layers(self.run, self.order.selection)
        first = records_for(self.run, self.explained_keys[0])
        asked, total = len(self.order.chosen.of(first.num_neurons, layer=layers[0])), first.num_neurons
        some = f"all {total:,} neurons" if asked == total else f"{asked:,} of {total:,} neurons"
        return f"{some} of {f'each of {len(layers)} layers' if len(layers) > 1 else f'layer {layers[0]}'}"

    @property
    def _calibrate(self) -> Any:
        method = self.order.simulating.calibrate if self.order.simulating else "none"
        return None if method == "none" else method

    @cached_property
    def explainer(self) -> Explainer | None:
        """Who explains; None where that is lookup."""
        if self.cast.explainer is None:
            return None
        strings = self.text(self.order.selection.mode)
        return Explainer(llm=self._kept(self.cast.explainer), settings=self.order.settings, strings=strings)

    @property
    def explainer_name(self) -> str:
        """What the explainer is called in the store."""
        asked = self.cast.explainer
        return self.order.named(asked.name if asked is not None else explainer_name(self.order.explaining))

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """The controls that can be made: in a part, none before the run has the explanations of all parts."""
        run = Store(self.run)
        if not self.store.part or (
            run.path.exists() and all(run.is_done(key, "explain") for key in self.explained_keys)
        ):
            return self.order.controls
        return ()

    @cached_property
    def explained_keys(self) -> list[SetKey]:
        """The sets of explanations."""
        selection, name = self.order.selection, self.explainer_name
        return [
            SetKey(mode=selection.mode, tap=selection.tap, layer=layer, protocol=name_, explainer=name, sample=sample)
            for layer in chosen_layers(self.run, selection)
            for name_ in chosen_protocols(selection)
            for sample in range(self.order.explaining.samples if name != EXPLAINER else 1)
        ]

    def simulated_keys(self, simulator: TextSimulator) -> list[SetKey]:
        """The sets of simulations."""
        name = str(replace(simulator.name, calibration=self._calibrate))
        return [
            replace(key, simulator=name, control=control)
            for key in self.explained_keys
            for control in ("", *self.controls)
        ]

    def tasks(self, keys: Sequence[SetKey], bar: ProgressBar | None = None) -> Iterator[Task]:
        """The work on each set; a layer's records are read once where its sets follow each other."""
        for key in keys:
            yield Task(
                store=self.store, key=key, records=records_for(self.run, key),
                protocol=protocol(key.protocol or PROTOCOLS[0], key.mode),
                chosen=self.order.chosen, part=self.order.spending.share, in_flight=self.order.spending.in_flight,
                bar=bar, note=self.usage.line,
            )  # fmt: skip

    def text(self, mode: Any) -> list[str]:
        """What prompts show for each token id."""
        if mode not in self.strings:
            tokenizer = load_tokenizer(records_tokenizer(self.run, self.order.selection.mode))
            self.strings[mode] = prompt_strings(tokenizer, mode)
        return self.strings[mode]

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each token id."""
        return token_bytes(load_tokenizer(records_tokenizer(self.run, self.order.selection.mode)))

    def _kept(self, llm: Any) -> Any:
        """The model through the cache, always the same one: what it is asked twice at once it is asked once."""
        if llm is None or self.order.spending.dry_run:
            return llm
        if llm.identity not in self.models:
            self.models[llm.identity] = kept(llm, self.store, self.usage, self.order.spending, self.spent_before)
        return self.models[llm.identity]

    def _metered(self, llm: LLM) -> Metered:
        return metered(llm, self.usage, self.order.spending, self.spent_before)

    @cached_property
    def spent_before(self) -> tuple[int, int]:
        """Tokens that earlier processes read and wrote: looked up before the first model is asked, and then kept."""
        return spent(self.store) if self.store.path.exists() else (0, 0)

    @contextlib.contextmanager
    def _bar(self, what: str, keys: Sequence[SetKey]) -> Iterator[ProgressBar]:
        total = sum(len(task.share) for task in self.tasks(keys))
        with progress_bar(f"{what} {self.run.name}", total=total, unit="neurons") as bar:
            yield bar
