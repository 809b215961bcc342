"""The work on one run: opens its explainer, simulator and judges, plans, and yields the sets to make."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cratelm.activations.records import records_tokenizer
from cratelm.data.tokenizer import load_tokenizer, token_bytes, token_strings
from cratelm.errors import CrateError
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.explainers.best_of import BestOf
from cratelm.interpretation.explainers.language_model import LLMExplainer
from cratelm.interpretation.lookup.explain import LookupExplainer
from cratelm.interpretation.lookup.simulate import LookupSimulator
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.prompts.escaping import prompt_strings
from cratelm.interpretation.protocols import PROTOCOLS, protocol
from cratelm.interpretation.scorers.promoted import promoting_directions
from cratelm.interpretation.simulators.language_model import LLMSimulator
from cratelm.interpretation.stages.judge import judge_set
from cratelm.interpretation.stages.pipeline import Simulator, score_set
from cratelm.interpretation.stages.set_task import SetTask
from cratelm.interpretation.store.answer_cache import spent
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.listing import explainers_of
from cratelm.interpretation.store.schema import MADE, SetKey, Stage
from cratelm.runtime import ProgressBar, console, progress_bar
from cratelm.workflows.llm.batches import RunBatches
from cratelm.workflows.llm.judges import Judges, find_best_of, find_judges
from cratelm.workflows.llm.opening import (
    LLMs,
    cached,
    calibrate_counts,
    choose_simulator,
    examine,
    examine_explainer,
    explainer_name,
    many_calls_cost_little,
    metered,
    needs_compact,
)
from cratelm.workflows.llm.plan import CostPlan, time_trial
from cratelm.workflows.llm.request import InterpretRequest, records_for
from cratelm.workflows.options.selection import chosen_layers, chosen_protocols

Make = Callable[[SetTask], Awaitable[object]]
"""Makes one set."""


@dataclass(kw_only=True)
class RunWork:
    """The work on one run."""

    request: InterpretRequest
    run: Path
    llms: LLMs
    usage: Usage
    quiet: bool = False
    """Whether to print nothing about sets that exist already."""
    simulator: Simulator | None = None
    """Set by `prepare`; None if nothing is simulated."""
    judges: Judges | None = None
    """Set by `prepare`; None if no other scorer was requested."""
    best_of: BestOf | None = None
    """Set by `prepare`; None if each neuron gets a single explanation."""
    _strings: dict[str, list[str]] = field(default_factory=dict)
    _models: dict[str, Any] = field(default_factory=dict)
    """The models with cache and budget, by identity."""

    async def prepare(self) -> bool:
        """Open the simulator and the judges and print the plan. Returns whether to continue: not after a dry run."""
        request, llms = self.request, self.llms
        self.batches.forget()
        await self.batches.collect(llms.explainer, llms.simulator, llms.judge)
        self.spent_before  # noqa: B018 (read before the first call)
        for llm in (llms.explainer, llms.simulator, llms.judge):
            await calibrate_counts(llm, self.store, self.usage)
        self.request = request = await self.settle_prompt()
        if llms.explainer is not None and "explain" in request.stages:
            chat, reader = self._cached(llms.explainer), self._cached(llms.simulator or llms.explainer)
            self.best_of = await find_best_of(request, chat, reader, lambda: self._pieces)
        if request.by_lookup and "simulate" in request.stages:
            self.simulator = LookupSimulator()
        elif llms.simulator is not None and request.simulating is not None:
            self.simulator = await self._open_simulator()
        chat, reader = self._cached(llms.judge), self._cached(llms.simulator or llms.judge)
        self.judges = await find_judges(request, chat, reader, lambda: self._pieces)
        tested = self.explainer_name in self._stored_explainers() or request.settings.source == "outputs"
        if isinstance(self.explainer, LLMExplainer) and not (tested or request.spending.dry_run):
            await examine_explainer(self.explainer, skip=request.explaining.skip_self_test)
        await self._print_estimate()
        return not request.spending.dry_run

    async def settle(self) -> None:
        """Wait until the answers to calls in flight are stored: they are paid for."""
        await asyncio.gather(*(llm.settle() for llm in self._models.values()))

    async def settle_prompt(self) -> InterpretRequest:
        """The request with the prompt of the explainer settled; see `--explainer-prompt auto`.

        The prompt of the model's explanations in the store, so that they are resumed. Without any: see `needs_compact`.
        """
        request, llm = self.request, self.llms.explainer
        model = llm.name if llm is not None else explainer_name(request.explaining)
        of_table = request.selection.mode == "fixed" and request.settings.source == "excerpts"
        if request.explaining.explainer_prompt != "auto" or not of_table or model == EXPLAINER:
            return request
        stored = self._stored_explainers()
        as_table, as_compact = (request.with_prompt(form) for form in ("table", "compact"))
        if as_table.named(model) in stored or as_compact.named(model) in stored:
            return as_table if as_table.named(model) in stored else as_compact
        if llm is None or "explain" not in request.stages:
            return as_table
        table = LLMExplainer(llm=self._cached(llm), settings=as_table.settings, strings=())
        return as_compact if await needs_compact(table, ask=not request.spending.dry_run) else as_table

    def _stored_explainers(self) -> set[str]:
        """The explainers that this run has explanations of, finished or not; they were tested before the first one."""
        mode = self.request.selection.mode
        return {name for store in (self.store, Store(self.run)) for name in explainers_of(store, mode=mode)}

    async def _open_simulator(self) -> LLMSimulator:
        request, llm, simulating = self.request, self.llms.simulator, self.request.simulating
        assert llm is not None
        assert simulating is not None
        meter = partial(metered, usage=self.usage, spending=request.spending, spent_before=self.spent_before)
        temperature, limit = request.settings.temperature, request.explaining.max_answer_tokens or 0
        can = await self.llms.ask_what_it_can(llm, self.store, simulating.simulator, meter, temperature)
        where = simulating.simulator_llm or request.explaining.llm
        many, dry = many_calls_cost_little(where, llm, request.spending), request.spending.dry_run
        simulator = await choose_simulator(
            self._cached(llm), simulating, request.selection.mode, can, answer_tokens=limit, many_calls=many,
            only_stored=self.store if dry else None,
        )  # fmt: skip
        if not dry:
            await examine(simulator, skip=request.explaining.skip_self_test)
        calibrate = None if simulating.calibrate == "none" else simulating.calibrate
        strings = self._text(simulator.strings_mode)
        return LLMSimulator(simulator=simulator, strings=strings, calibrate=calibrate)

    async def _print_estimate(self) -> None:
        """Print calls, tokens and price of what is missing. Raises `CrateError` in a dry run if no prompt fits."""
        plan, request = CostPlan(store=self.store, spending=self.request.spending), self.request
        explainer = self.explainer if isinstance(self.explainer, LLMExplainer) else None
        simulator = self.simulator if isinstance(self.simulator, LLMSimulator) else None
        explained, simulated = self.explained_keys if explainer else [], self.simulated_keys if simulator else []
        sets = len(explained) + len(simulated) + len(self.judged_sets)
        with progress_bar(f"plan {self.run.name}", total=sets, unit="sets") as plan.bar:
            if explainer is not None:
                await plan.explain(self.tasks(explained), explainer)
            for control in ("", *self.controls) if simulator is not None else ():
                assert simulator is not None
                keys = [key for key in simulated if key.control == control]
                await plan.simulate(f"simulate {control}".strip(), self.tasks(keys), simulator, explainer)
            for scorer, key in self.judged_sets:
                assert self.judges is not None
                await plan.judge(scorer, self.tasks([key]), self.judges.context_for(scorer))
        if not plan.lines or self.quiet:
            return
        time_line = ""
        if request.spending.dry_run and isinstance(self.simulator, LLMSimulator):
            in_flight = request.spending.in_flight
            time_line = await time_trial(self.simulator.simulator, self.store, in_flight, plan.total)
        print("\n".join([f"\n{self.run.name}: {self.request.subject(self.run)}", *plan.table(time_line)]))
        if request.spending.dry_run and plan.error:
            raise CrateError(plan.error)

    async def sets(self) -> AsyncGenerator[tuple[SetTask, Make], None]:
        """Yield every set to make, and again those that waited for a batch. `batches.postponed` is known afterwards."""
        self.batches.start()
        while True:
            for task, make in self.steps():
                yield task, make
            if not await self.batches.submit():
                return
            self.batches.start()

    def steps(self) -> Generator[tuple[SetTask, Make]]:
        """Yield every set to make with the function that makes it, in order; the bar advances with each."""
        stages = self.request.stages
        if self.explainer is not None:
            yield from self._stage("explain", "explain", self.explained_keys, self.explainer.explain)
            if self.batches.postponed:  # the other stages need all explanations
                return
        if self.simulator is not None:
            yield from self._stage("simulate", "simulate", self.simulated_keys, self.simulator.simulate)
        if waiting := set(self.request.controls) - set(self.controls):
            console.print(
                f"{self.run.name}: the controls {', '.join(sorted(waiting))} need the explanations of all parts. Once "
                f"they are done, merge first (cratelm interpret {self.run} --merge), then run the same command",
                soft_wrap=True,
            )  # fmt: skip
        for scorer in self.judges.scorers if self.judges else ():
            keys = [key for name, key in self.judged_sets if name == scorer]
            assert self.judges is not None
            make = partial(judge_set, scorer=scorer, context=self.judges.context_for(scorer))
            yield from self._stage(scorer, None, keys, make)
        if self.batches.postponed:
            return
        if "score" in stages and not self.request.spending.part and (self.simulator or self.request.by_lookup):
            yield from self._stage("score", "score", self.simulated_keys, score_set)

    def _stage(
        self, what: str, stage: Stage | None, keys: Sequence[SetKey], make: Make
    ) -> Iterator[tuple[SetTask, Make]]:
        """Yield the sets of one stage. Sets by lookup depend on the records alone and are made once."""
        lookup = bool(keys) and all(key.by_lookup for key in keys)
        todo = [key for key in keys if not (stage and key.by_lookup and self.store.is_done(key, stage))]
        if not todo and stage:
            if not self.quiet:
                console.print(f"{self.run}: the requested {MADE[stage]} exist already")
            return
        sets = lookup or stage == "score"
        total = len(keys) if sets else sum(len(task.share) for task in self.tasks(todo))
        done, unit = len(keys) - len(todo), "sets" if sets else "neurons"
        with progress_bar(f"{what} {self.run.name}", total=total, done=done, unit=unit) as bar:
            for task in self.tasks(todo, bar):
                yield task, make
                if sets:
                    key, neurons = task.key, task.records.num_neurons
                    bar.advance(1, note=f"layer {key.layer}, {key.what}, {neurons} neurons")

    def tasks(self, keys: Sequence[SetKey], bar: ProgressBar | None = None) -> Iterator[SetTask]:
        """The task of each set; consecutive sets of a layer share its records."""
        request = self.request
        for key in keys:
            yield SetTask(
                store=self.store, key=key, records=records_for(self.run, key),
                protocol=protocol(key.protocol or PROTOCOLS[0], key.mode),
                chosen=None if key.by_lookup else request.chosen, part=request.spending.share,
                in_flight=request.spending.in_flight, bar=bar, note=self.usage.line,
            )  # fmt: skip

    @cached_property
    def store(self) -> Store:
        """Where rows and answers go: the run's store, or this process's part of it."""
        part, parts = self.request.spending.share
        number = part if parts > 1 else 0
        return Store(self.run, number) if self.request.spending.dry_run else Store.create(self.run, number)

    @cached_property
    def explainer(self) -> LLMExplainer | LookupExplainer | None:
        """The explainer; None if it is not requested, or if the explanations of another command are used."""
        request = self.request
        if "explain" in request.stages and self.llms.explainer is not None:
            llm, strings = self._cached(self.llms.explainer), self._text(request.selection.mode)
            of_layer = partial(promoting_directions, self.run, request.selection.tap)
            return LLMExplainer(
                llm=llm, settings=request.settings, strings=strings, best=self.best_of, directions=of_layer
            )
        if request.explains_by_lookup and not request.spending.dry_run:
            return LookupExplainer(strings=lambda: self._token_strings)
        return None

    @property
    def explainer_name(self) -> str:
        """The stored name of the explainer."""
        llm = self.llms.explainer
        return self.request.named(llm.name if llm is not None else explainer_name(self.request.explaining))

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """The controls that can be made: in a part, none before the run has the explanations of all parts."""
        run = Store(self.run)
        if not self.store.part or (
            run.path.exists() and all(run.is_done(key, "explain") for key in self.explained_keys)
        ):
            return self.request.controls
        return ()

    @cached_property
    def explained_keys(self) -> list[SetKey]:
        """The sets of explanations."""
        selection, explainer = self.request.selection, self.explainer_name
        return [
            SetKey(mode=selection.mode, tap=selection.tap, layer=layer, protocol=name, explainer=explainer,
                   sample=sample)
            for layer in chosen_layers(self.run, selection)
            for name in chosen_protocols(selection)
            for sample in range(self.request.explaining.samples if explainer != EXPLAINER else 1)
        ]  # fmt: skip

    @cached_property
    def simulated_keys(self) -> list[SetKey]:
        """The sets of simulations."""
        name = self.simulator.stored_name if self.simulator is not None else ""
        return [
            replace(key, simulator=name, control=control)
            for key in self.explained_keys
            for control in ("", *self.controls)
        ]

    @cached_property
    def simulated_kinds(self) -> list[SetKey]:
        """The kinds of simulations of this command, for any layer and protocol; empty if it only scores stored ones."""
        if self.simulator is None and not self.request.by_lookup:
            return []
        return list(dict.fromkeys(replace(key, layer=0, protocol="") for key in self.simulated_keys))

    @cached_property
    def judged_sets(self) -> list[tuple[str, SetKey]]:
        """The other scorers with the sets of their results."""
        return list(self.judges.sets(self.explained_keys, self.controls)) if self.judges else []

    def _text(self, mode: Any) -> list[str]:
        """Text of each token id in prompts."""
        if mode not in self._strings:
            self._strings[mode] = prompt_strings(self._tokenizer, mode)
        return self._strings[mode]

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(records_tokenizer(self.run, self.request.selection.mode))

    @cached_property
    def _token_strings(self) -> list[str]:
        return token_strings(self._tokenizer)

    @property
    def _pieces(self) -> list[bytes]:
        """The bytes of each token id."""
        return token_bytes(self._tokenizer)

    def _cached(self, llm: Any) -> Any:
        """The model with cache and budget, always the same object, so that concurrent duplicate calls are merged."""
        if llm is None or self.request.spending.dry_run:
            return llm
        if llm.identity not in self._models:
            batched = self.batches.wrapped(llm)
            model = cached(batched, self.store, self.usage, self.request.spending, self.spent_before)
            self._models[llm.identity] = self.batches.add(batched, model)
        return self._models[llm.identity]

    @cached_property
    def spent_before(self) -> tuple[int, int]:
        """Tokens that earlier processes read and wrote, and the most that open batches do."""
        read, written = spent(self.store) if self.store.path.exists() else (0, 0)
        bound = self.batches.bound
        return read + bound[0], written + bound[1]

    @cached_property
    def batches(self) -> RunBatches:
        """The batches of the run."""
        return RunBatches(self.store, self.request.spending)
