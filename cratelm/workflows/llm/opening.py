"""Opening the language models that a command was given, and saying how they simulate before they are asked."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.probe import Capabilities, probe
from cratelm.interpretation.clients.usage import Budget, Metered, Price, Usage
from cratelm.interpretation.llm import LLM
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.simulators.opening import open_simulator
from cratelm.interpretation.simulators.self_test import require_self_test, self_test
from cratelm.interpretation.simulators.simulation import TextSimulator
from cratelm.interpretation.store.answer_cache import Cached, add_calls, lost_row, unsupported_note
from cratelm.interpretation.store.database import Store
from cratelm.runtime import console, human
from cratelm.workflows.options.language_model import Explaining, Simulating, Spending


@dataclass(frozen=True, slots=True)
class LLMs:
    """The models that explain, simulate and judge; None for lookup or if not needed."""

    explainer: LLM | None
    simulator: LLM | None
    judge: LLM | None
    can: dict[str, Capabilities] = field(default_factory=dict)
    """By identity, what each was found to give."""

    async def measure(self, store: Store, usage: Usage) -> None:
        """Ask servers how many tokens a text has, where nobody else can count them; once for a store."""
        for llm in (self.explainer, self.simulator, self.judge):
            await measure(llm, store, usage)

    async def ask_what_it_can(
        self, llm: LLM, store: Store, method: str, meter: Callable[[LLM], Metered], temperature: float = 0.0
    ) -> Capabilities:  # fmt: skip
        """What a model gives, found out by asking it, and said; kept in the store, so that it is asked once.

        It is asked again where what was found is not enough to simulate by this method: its server may have learnt it.
        """
        if llm.identity in self.can:
            return self.can[llm.identity]
        name = f"capabilities of {llm.identity}"
        found = _known(store, name, method)
        if found is None:
            async with noted_cost(llm, store, meter(llm).usage):
                found = await probe(llm, meter=meter, temperature=temperature)
            if store.path.exists():
                store.note(name, json.dumps(found.row()))
        elif llm.logprobs_format is None and found.most is not None:
            llm.set_logprobs_format(found.style, found.most)
        for line in (found.reason, *found.notes):
            console.print(line, soft_wrap=True)
        self.can[llm.identity] = found
        return found


@asynccontextmanager
async def noted_cost(llm: LLM, store: Store, usage: Usage) -> AsyncIterator[None]:
    """Print and store what test calls cost, whose answers are not cached: the budget of later processes includes it."""
    calls, read, written = usage.calls, usage.prompt_tokens, usage.new_tokens
    try:
        yield
    finally:
        cost = usage.prompt_tokens - read, usage.new_tokens - written
        if usage.calls > calls:
            number = usage.calls - calls
            console.print(
                f"probe of {llm.name}: {number} {'calls' if number > 1 else 'call'}, {human(sum(cost))} tokens"
            )
            if store.path.exists():
                add_calls(store, [lost_row(llm.name, *cost)])


async def measure(llm: LLM | None, store: Store, usage: Usage) -> None:
    """Ask a server how many tokens a text has, unless they are counted here; kept in the store, and not asked again.

    What prompts leave out where the context is short depends on it, so it has to be the same whenever a set is gone on
    with.
    """
    if llm is None:
        return
    llm.unsupported.update(json.loads(store.noted(unsupported_note(llm.identity)) or "[]"))
    if llm.counts_exactly:
        return
    name = f"tokens per byte of {llm.identity}"
    known = store.noted(name)
    async with noted_cost(llm, store, usage):
        tokens_per_byte = await llm.calibrate(None if known is None else float(known))
    if known is None and store.path.exists():
        store.note(name, repr(tokens_per_byte))


def explains(explaining: Explaining) -> bool:
    """Whether a language model explains. Refused where it is to, and none is named."""
    named = bool(explaining.llm or explaining.model or explaining.explainer_model)
    if explaining.explainer == "llm" and not named:
        raise CrateError(
            "--explainer llm needs a language model. Give --llm URL of a server, or a Hugging Face directory or name"
        )
    return named and explaining.explainer != "lookup"


def simulates(explaining: Explaining, simulating: Simulating) -> bool:
    """Whether a language model simulates."""
    return bool(explaining.llm or simulating.simulator_llm)


def explainer_name(explaining: Explaining) -> str:
    """What the explainer is called in the store; empty where only the server knows."""
    if not explains(explaining):
        return EXPLAINER
    return (
        explaining.explainer_model or explaining.model or ("" if is_url(explaining.llm) else basename(explaining.llm))
    )


def is_url(where: str) -> bool:
    """Whether this is a server."""
    return "://" in where


def basename(where: str) -> str:
    """What a model in this process is called: the last part of its path or name; of a run's `model`, the run's name."""
    parts = [part for part in where.split("/") if part]
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]


@asynccontextmanager
async def open_llms(
    explaining: Explaining, simulating: Simulating | None, spending: Spending, usage: Usage, *, judged: bool = False
) -> AsyncIterator[LLMs]:
    """Open what is needed; connections are given back at the end. The same model is opened once."""
    found: dict[tuple[str, str], LLM] = {}

    async def open_once(where: str, model: str) -> LLM:
        key = where, model if is_url(where) else ""
        if key not in found:
            found[key] = await _open(where, model, explaining, spending, usage)
        return found[key]

    try:
        explainer = simulator = judge = None
        own = explaining.explainer_model or explaining.model
        if explains(explaining) and explaining.llm:
            explainer = await open_once(explaining.llm, own)
        if judged and explaining.llm:
            judge = await open_once(explaining.llm, own)
        if simulating is not None and simulates(explaining, simulating):
            where = simulating.simulator_llm or explaining.llm
            simulator = await open_once(where, simulating.simulator_model or explaining.model)
        yield LLMs(explainer, simulator, judge)
    finally:
        for one in found.values():
            await one.close()


def _known(store: Store, name: str, method: str) -> Capabilities | None:
    """What an earlier process found, where that is enough to simulate by this method."""
    noted = store.noted(name)
    if noted is None:
        return None
    found = Capabilities.of_row(json.loads(noted))
    enough = {"auto": found.prompt_logprobs or found.chat, "structured": found.chat}.get(method, found.prompt_logprobs)
    return found if enough else None


async def _open(where: str, model: str, explaining: Explaining, spending: Spending, usage: Usage) -> LLM:
    if not is_url(where):
        from cratelm.local_llm import LocalLLM

        return LocalLLM.open(where, device=explaining.device)
    counter = _counter(explaining.llm_tokenizer) if explaining.llm_tokenizer else None
    endpoint = Endpoint(
        where, model, key_from=explaining.llm_key, in_flight=spending.in_flight, counter=counter, usage=usage,
        timeout=explaining.timeout, temperature=explaining.temperature or 0.0, extra=explaining.extra,
    )  # fmt: skip
    await endpoint.connect()
    if not model:
        await endpoint.close()
        if len(endpoint.served) != 1:
            found = ", ".join(endpoint.served[:20]) or "nothing that it lists"
            raise CrateError(f"{where} serves several models. Choose one with --model NAME: {found}")
        return await _open(where, endpoint.served[0], explaining, spending, usage)
    if counter is None:
        console.print("tokens are estimated from a text that the server counted; --llm-tokenizer counts them exactly")
    return endpoint


def _counter(source: str) -> Any:
    from cratelm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(source) if Path(source).exists() else source)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


async def choose_simulator(
    llm: LLM, simulating: Simulating, mode: Mode, can: Capabilities, *, answer_tokens: int = 0
) -> TextSimulator:
    """How a model simulates, and why. Refused where it cannot do what was asked for."""
    method, why = simulating.simulator, "as asked for"
    if method == "auto" and can.prompt_logprobs:
        method, why = "all-at-once", "it returns prompt logprobs"
    elif method == "auto" and can.chat:
        method, why = "structured", "it returns no prompt logprobs, but answers chats"
    if method == "auto":
        raise CrateError(f"{llm.name} cannot simulate: {'; '.join(can.notes)}. Give another --simulator-llm")
    if method != "structured" and not can.prompt_logprobs:
        raise CrateError(
            f"the simulator {method} needs the probabilities of a prompt, and {llm.name} does not give them. "
            "Use --simulator structured, or another --simulator-llm"
        )
    simulator = await open_simulator(method, llm, mode=mode, answer_tokens=answer_tokens)
    console.print(f"simulator: {simulator.name} ({why})", soft_wrap=True)
    return simulator


async def examine(simulator: TextSimulator, *, skip: bool) -> None:
    """Let a simulator predict obvious neurons; refuse one that cannot."""
    if skip:
        found = await self_test(simulator)
        note = "" if found.passed else ": its scores will mean nothing, and it is used because of --skip-self-test"
    else:
        found, note = await require_self_test(simulator), ""
    tested = len(found.correlations)
    console.print(f"self-test: mean correlation {found.mean:.2f} on {tested} obvious neurons{note}", soft_wrap=True)


def metered(llm: LLM, usage: Usage, spending: Spending, spent_before: tuple[int, int] = (0, 0)) -> Metered:
    """The model with its answers counted within the budget."""
    price = Price(prompt=spending.price_in, new=spending.price_out)
    budget = Budget(tokens=spending.budget_tokens, money=spending.budget_price, price=price)
    return Metered(llm, usage, budget, spent_before)


def kept(llm: LLM, store: Store, usage: Usage, spending: Spending, spent_before: tuple[int, int] = (0, 0)) -> LLM:
    """The model with its answers counted within the budget, and kept in the store.

    Of a server no more answers than are in flight wait to be written; a model in this process fills its batches from
    all that is asked at once.
    """
    in_flight = spending.in_flight if llm.remote else 0
    return Cached(metered(llm, usage, spending, spent_before), store, usage, in_flight=in_flight)
