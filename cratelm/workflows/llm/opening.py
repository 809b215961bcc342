"""Open the language models of a command, and choose how they simulate."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.gguf_files import model_name
from cratelm.interpretation.clients.endpoint import Endpoint
from cratelm.interpretation.clients.probe import Capabilities, probe
from cratelm.interpretation.clients.usage import Budget, Metered, Price, Usage
from cratelm.interpretation.explainers.language_model import LLMExplainer
from cratelm.interpretation.explainers.self_test import (
    explainer_self_test,
    require_explainer_self_test,
    self_test_prompts,
)
from cratelm.interpretation.llm import LLM
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.prompts.explainer import PromptTooLong
from cratelm.interpretation.simulators.contrastive import Contrastive, better_in_self_test, with_changes
from cratelm.interpretation.simulators.opening import open_simulator
from cratelm.interpretation.simulators.self_test import CannotSimulate, require_self_test, self_test
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
    """Capabilities by identity of the model, once probed."""

    async def ask_what_it_can(
        self, llm: LLM, store: Store, method: str, meter: Callable[[LLM], Metered], temperature: float = 0.0
    ) -> Capabilities:  # fmt: skip
        """Probe what a model can do, and print it. The result is stored, so a model is probed once.

        It is probed again if the stored capabilities do not suffice for this method: the server may support it now.
        """
        if llm.identity in self.can:
            return self.can[llm.identity]
        name = f"capabilities of {llm.identity}"
        capabilities = _known(store, name, method)
        if capabilities is None:
            async with noted_cost(llm, store, meter(llm).usage):
                capabilities = await probe(llm, meter=meter, temperature=temperature)
            if store.path.exists():
                store.note(name, json.dumps(capabilities.row()))
        elif llm.logprobs_format is None and capabilities.most is not None:
            llm.set_logprobs_format(capabilities.style, capabilities.most)
        for line in (capabilities.reason, *capabilities.notes):
            console.print(line, soft_wrap=True)
        self.can[llm.identity] = capabilities
        return capabilities


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


async def calibrate_counts(llm: LLM | None, store: Store, usage: Usage) -> None:
    """Measure a server's tokens per byte, unless the tokenizer is known; stored, and not measured again.

    The number of few-shot examples that fit depends on it, so it must be the same whenever a set is resumed.
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


def priced(spending: Spending, llms: LLMs) -> Spending:
    """The spending with the prices that the servers list, unless the user gave prices; the highest of several models.

    Raises `CrateError` if a price is limited and not known.
    """
    if spending.price_in or spending.price_out:
        return spending
    remote = [llm for llm in (llms.explainer, llms.simulator, llms.judge) if llm is not None and llm.remote]
    listed = [llm.price for llm in remote if llm.price is not None]
    if not listed or len(listed) < len(remote):
        if spending.budget_price is not None:
            raise CrateError("--budget-price needs the price of tokens. Hint: use --price-in and --price-out")
        return spending
    prices = tuple(max(price) for price in zip(*listed, strict=True))
    console.print(f"price listed by the server: {prices[0]:g} for a million tokens read, {prices[1]:g} generated")
    return replace(spending, price_in=prices[0], price_out=prices[1])


def explains(explaining: Explaining) -> bool:
    """Whether a language model explains. Raises `CrateError` if `--explainer llm` has no model."""
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
    """Name of the explainer in the store; empty if only the server knows it."""
    if not explains(explaining):
        return EXPLAINER
    return (
        explaining.explainer_model or explaining.model or ("" if is_url(explaining.llm) else basename(explaining.llm))
    )


def is_url(where: str) -> bool:
    """Whether a model is on a server."""
    return "://" in where


def basename(where: str) -> str:
    """Name of a model in this process: the last part of its path, or the run's name for `RUN/model`."""
    parts = [part for part in where.split("/") if part]
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else model_name(parts[-1])


@asynccontextmanager
async def open_llms(
    explaining: Explaining, simulating: Simulating | None, spending: Spending, usage: Usage, *, judged: bool = False
) -> AsyncIterator[LLMs]:
    """Open the models that are needed, each once, and close their connections at the end."""
    opened: dict[tuple[str, str], LLM] = {}

    async def open_once(where: str, model: str) -> LLM:
        key = where, model if is_url(where) else ""
        if key not in opened:
            opened[key] = await _open(where, model, explaining, spending, usage)
        return opened[key]

    try:
        explainer = simulator = judge = None
        model_name = explaining.explainer_model or explaining.model
        if explains(explaining) and explaining.llm:
            explainer = await open_once(explaining.llm, model_name)
        if judged and explaining.llm:
            judge = await open_once(explaining.llm, model_name)
        if simulating is not None and simulates(explaining, simulating):
            where = simulating.simulator_llm or explaining.llm
            simulator = await open_once(where, simulating.simulator_model or explaining.model)
        yield LLMs(explainer, simulator, judge)
    finally:
        for llm in opened.values():
            await llm.close()


def _known(store: Store, name: str, method: str) -> Capabilities | None:
    """Stored capabilities if they suffice for this method."""
    noted = store.noted(name)
    if noted is None:
        return None
    capabilities = Capabilities.of_row(json.loads(noted))
    logprobs, next_token = capabilities.prompt_logprobs, capabilities.prompt_logprobs or capabilities.next_token
    enough = {
        "auto": next_token or capabilities.chat, "structured": capabilities.chat, "next-token": next_token
    }.get(method, logprobs)  # fmt: skip
    return capabilities if enough else None


async def _open(where: str, model: str, explaining: Explaining, spending: Spending, usage: Usage) -> LLM:
    if not is_url(where):
        try:
            from cratelm.local_llm import LocalLLM
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in ("transformers", "torch"):
                raise
            raise CrateError(
                f"--llm {where} opens a language model in this process, which needs {error.name}. "
                "Hint: pip install 'cratelm[llm]', or give the URL of a server"
            ) from None

        return LocalLLM.open(where, device=explaining.device, dtype=explaining.llm_dtype)
    counter = _counter(explaining.llm_tokenizer) if explaining.llm_tokenizer else None
    endpoint = Endpoint(
        where, model, key_from=explaining.llm_key, in_flight=spending.in_flight, counter=counter, usage=usage,
        timeout=explaining.timeout, temperature=explaining.temperature or 0.0, extra=explaining.extra,
    )  # fmt: skip
    await endpoint.connect()
    if (slots := endpoint.transport.in_flight) < spending.in_flight and model:
        console.print(f"the server has {slots} {'slot' if slots == 1 else 'slots'}: as many requests in flight")
    if not model:
        await endpoint.close()
        if len(endpoint.served) != 1:
            listed = ", ".join(endpoint.served[:20]) or "no models listed"
            raise CrateError(f"{where} serves several models. Choose one with --model NAME: {listed}")
        if not endpoint.served[0].isprintable():
            raise CrateError(f"the name of the model at {where} must be printable, got {endpoint.served[0]!r}")
        return await _open(where, endpoint.served[0], explaining, spending, usage)
    if counter is None:
        console.print("tokens are estimated from a text that the server counted; --llm-tokenizer counts them exactly")
    return endpoint


def _counter(source: str) -> Any:
    from cratelm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(source) if Path(source).exists() else source)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def many_calls_cost_little(where: str, llm: LLM, spending: Spending) -> bool:
    """Whether a request per token is acceptable: the server keeps prompts in slots or is on this machine, unpaid."""
    nearby = urlsplit(where).hostname in ("localhost", "127.0.0.1", "::1")
    return not spending.price_in and (llm.slots is not None or nearby or not llm.remote)


async def choose_simulator(
    llm: LLM, simulating: Simulating, mode: Mode, can: Capabilities, *, answer_tokens: int = 0, many_calls: bool = True,
    only_stored: Store | None = None,
) -> TextSimulator:  # fmt: skip
    """Choose how a model simulates. Raises `CrateError` if it does not support the requested method.

    `many_calls`: whether a request per token is acceptable without being asked for. `only_stored`: the store of a dry
    run, whose cached answers alone decide about the contrast.
    """
    method, why = simulating.simulator, "as asked for"
    if method == "auto" and can.prompt_logprobs:
        method, why = "all-at-once", "it returns prompt logprobs"
    elif method == "auto" and can.next_token and (many_calls or not can.chat):
        method, why = "next-token", "it returns candidates of the next token, and no prompt logprobs"
    elif method == "auto" and can.chat:
        method, why = "structured", "it returns no prompt logprobs, but answers chats"
        why += "; --simulator next-token is closer to the paper and sends a request per token" if can.next_token else ""
    if method == "auto":
        raise CannotSimulate(f"{llm.name} cannot simulate: {'; '.join(can.notes)}. Give another --simulator-llm")
    if method != "structured" and not (can.prompt_logprobs or (can.next_token and method == "next-token")):
        needed = "candidates of the next token" if method == "next-token" else "the probabilities of a prompt"
        raise CrateError(
            f"the simulator {method} needs {needed}, and {llm.name} does not give them. "
            "Use --simulator structured, or another --simulator-llm"
        )
    simulator = await open_simulator(method, llm, mode=mode, answer_tokens=answer_tokens)
    if simulating.contrast == "neutral":
        simulator = Contrastive(inner=simulator)
    elif simulating.contrast == "auto" and mode == "fixed" and method != "structured":
        simulator = await (better_in_stored(simulator, only_stored) if only_stored else better_in_self_test(simulator))
    console.print(f"simulator: {simulator.name} ({why})", soft_wrap=True)
    return simulator


async def better_in_stored(simulator: TextSimulator, store: Store) -> TextSimulator:
    """`better_in_self_test` from cached answers. Without them the contrast, which costs more."""
    llm: LLM = simulator.llm  # type: ignore[attr-defined]
    stored = Cached(llm, store)
    await stored.settle()  # it makes no calls
    try:
        return with_changes(await better_in_self_test(with_changes(simulator, llm=stored)), llm=llm)
    except CrateError:
        console.print("the self-test decides about --contrast in the run; until then the costs are those of neutral")
        return Contrastive(inner=simulator)


async def examine(simulator: TextSimulator, *, skip: bool) -> None:
    """Run the self-test and print its result. Raises `CrateError` if the simulator fails, unless `skip`."""
    if skip:
        result = await self_test(simulator)
        note = "" if result.passed else ": its scores are not meaningful; used because of --skip-self-test"
    else:
        result, note = await require_self_test(simulator), ""
    tested = len(result.correlations)
    console.print(f"self-test: mean correlation {result.mean:.2f} on {tested} obvious neurons{note}", soft_wrap=True)


async def needs_compact(explainer: LLMExplainer, *, ask: bool) -> bool:
    """Whether a model copies the examples of the table in the self-test, or its context is too short for the table.

    `ask`: whether to run the self-test.
    """
    try:
        self_test_prompts(explainer)
        return ask and bool((await explainer_self_test(explainer)).copied)
    except PromptTooLong:
        return True


async def examine_explainer(explainer: LLMExplainer, *, skip: bool) -> None:
    """Let the model explain obvious neurons and print how many answers are copies.

    Raises `CrateError` if most are, unless `skip`.
    """
    result = await (explainer_self_test(explainer) if skip else require_explainer_self_test(explainer))
    note = "" if result.passed else ": used because of --skip-self-test"
    tested = len(result.explanations) + len(result.failures)
    console.print(
        f"explainer self-test: {len(result.copied)} copied and {len(result.failures)} failed of {tested} obvious "
        f"neurons{note}", soft_wrap=True,
    )  # fmt: skip


def metered(llm: LLM, usage: Usage, spending: Spending, spent_before: tuple[int, int] = (0, 0)) -> Metered:
    """The model with a meter and a budget."""
    price = Price(prompt=spending.price_in, new=spending.price_out)
    budget = Budget(tokens=spending.budget_tokens, money=spending.budget_price, price=price)
    return Metered(llm, usage, budget, spent_before)


def cached(llm: LLM, store: Store, usage: Usage, spending: Spending, spent_before: tuple[int, int] = (0, 0)) -> Cached:
    """The model with a meter, a budget and the store's answer cache.

    For a server the number of unwritten answers is limited; a model in this process batches all concurrent calls.
    """
    in_flight = spending.in_flight if llm.remote else 0
    return Cached(metered(llm, usage, spending, spent_before), store, usage, in_flight=in_flight)
