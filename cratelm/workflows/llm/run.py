"""Run the requested stages on every run, by lookup or with language models.

open     the models, how they simulate, and their self-test
plan     calls, tokens and price of what is missing (`plan.py`)
make     explanations, simulations, answers of the other scorers, and scores, set by set
print    the scores, the usage, and the failures
"""

import asyncio
import contextlib
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cratelm.errors import CrateError
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.explainers.language_model import LLMExplainer
from cratelm.interpretation.explainers.self_test import COPIED_WORDS, copied
from cratelm.interpretation.scorers.registry import SIMULATION
from cratelm.interpretation.stages.pipeline import score_set
from cratelm.interpretation.stages.set_task import all_failures
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.growing_sets import GrowingSet
from cratelm.interpretation.store.parts import merge
from cratelm.interpretation.store.schema import SetKey
from cratelm.rundir import claim
from cratelm.runtime import human, printable
from cratelm.workflows.llm.judges import print_judged
from cratelm.workflows.llm.opening import LLMs, explainer_name, open_llms, priced
from cratelm.workflows.llm.request import InterpretRequest
from cratelm.workflows.llm.run_work import RunWork
from cratelm.workflows.options.selection import Selection, check_runs, chosen_layers, chosen_protocols
from cratelm.workflows.score_table import print_scores


async def interpret(request: InterpretRequest, *, quiet: bool = False) -> bool:
    """Run the stages of a request on every run and print the results; `quiet` prints nothing.

    Returns whether the work is done: not if requests wait in batches.
    """
    runs = check_runs(request.selection)
    request.check(runs)
    usage, (part, parts) = Usage(), request.spending.share
    if request.spending.merge:
        merge_parts(runs)
    works, complete = list[RunWork](), dict[Path, bool]()
    async with contextlib.AsyncExitStack() as opened:
        for run in runs:
            opened.enter_context(claim(run, part=part if parts > 1 else 0))
        llms = await opened.enter_async_context(_open(request, usage))
        request = replace(request, spending=priced(request.spending, llms))
        for run in runs:
            works.append(work := RunWork(request=request, run=run, llms=llms, usage=usage, quiet=quiet))
            opened.push_async_callback(work.settle)
            if await work.prepare():
                async with contextlib.aclosing(work.sets()) as sets:
                    async for task, make in sets:
                        await make(task)
                complete[run] = not work.batches.postponed
    if not (quiet or request.spending.dry_run):
        for work in works:
            if complete[work.run]:
                await _print_run(work)
        if usage.calls or usage.cached or not (request.by_lookup or "score" in request.stages):
            _print_usage(request, runs, usage)
    return all(complete.values())


def interpret_by_lookup(selection: Selection, *, controls: tuple[str, ...] = ()) -> None:
    """Explain, simulate and score by lookup the sets that are missing, and print nothing."""
    asyncio.run(interpret(InterpretRequest.lookup(selection, controls=controls), quiet=True))


def _open(request: InterpretRequest, usage: Usage) -> contextlib.AbstractAsyncContextManager[LLMs]:
    """Open the models that the stages need; scores of a named model need none."""
    judged = any(scorer != SIMULATION for scorer in request.scorers)
    if not judged and request.stages == ("score",) and explainer_name(request.explaining):
        return contextlib.nullcontext(LLMs(None, None, None))
    simulating = request.simulating if "simulate" in request.stages else None
    return open_llms(request.explaining, simulating, request.spending, usage, judged=judged)


async def _print_run(work: RunWork) -> None:
    """Print the scores of one run; those of simulations that were made earlier are computed now."""
    request, run = work.request, work.run
    if isinstance(work.explainer, LLMExplainer):
        print_copied(work)
    if request.spending.part:
        return
    if "score" in request.stages:
        if kinds := work.simulated_kinds:
            print_scores(run, request.selection, kinds)
        else:
            await _score_stored(work)
    if work.judged_sets:
        print_judged(run, work.judged_sets)


def print_copied(work: RunWork) -> None:
    """Print how many explanations are copies, set by set: sets of other protocols have the same explanations."""
    texts = [
        [str(text) for text in growing.rows().values()]
        for key in work.explained_keys
        for growing in [GrowingSet(store=work.store, key=key, stage="explain", neurons=np.empty(0, dtype=np.int64))]
    ]
    copies = sum(len(copied(of_set)) for of_set in texts)
    if copies:
        said = f"copied: {copies} of {sum(map(len, texts))} explanations of {work.run.name} share {COPIED_WORDS} "
        said += "consecutive words with a few-shot example or with each other"
        print("\n" + "\n".join(textwrap.wrap(said, 80)))


async def _score_stored(work: RunWork) -> None:
    """Score the whole sets of an explainer's stored simulations, and list the others."""
    selection, run, name = work.request.selection, work.run, work.explainer_name
    stored = [
        key for key in Store.open(run).sets("simulate")
        if (key.mode, key.tap, key.explainer) == (selection.mode, selection.tap, name) and not key.by_lookup
    ]  # fmt: skip
    if not stored:
        raise CrateError(f"{run} has no simulations of explanations by {name}. Run: cratelm interpret {run} --llm URL")
    controls = work.request.controls
    whole = {
        kind: names for kind, names in whole_protocols(work, stored).items()
        if not controls or kind.control in ("", *controls)
    }  # fmt: skip
    asked = chosen_protocols(selection)
    for kind, names in whole.items():
        # If nothing is whole, the first missing set raises the error that says what to run.
        await score_and_print(work, kind, names if any(whole.values()) else asked)
    missing = [
        f"{kind.control or 'own explanations'} by {name}"
        for kind, names in whole.items() for name in asked if name not in names
    ]  # fmt: skip
    if missing:
        print(f"\nnot whole, so not scored: {'; '.join(missing)}")


def whole_protocols(work: RunWork, stored: Sequence[SetKey]) -> dict[SetKey, tuple[str, ...]]:
    """Map each kind of stored sets (any layer and protocol) to the protocols with sets for all chosen layers."""
    layers = set(chosen_layers(work.run, work.request.selection))
    made: dict[SetKey, dict[str, set[int]]] = {}
    for key in stored:
        kind = replace(key, layer=0, protocol="")
        made.setdefault(kind, {}).setdefault(key.protocol, set()).add(key.layer)
    names = chosen_protocols(work.request.selection)
    return {
        kind: tuple(name for name in names if by_protocol.get(name, set()) >= layers)
        for kind, by_protocol in made.items()
    }  # fmt: skip


async def score_and_print(work: RunWork, kind: SetKey, protocols: Sequence[str]) -> None:
    """Score all sets of one kind by these protocols and print the table."""
    if protocols:
        selection = replace(work.request.selection, protocol=tuple(protocols))
        layers = chosen_layers(work.run, selection)
        keys = [replace(kind, layer=layer, protocol=name) for layer in layers for name in protocols]
        for task in work.tasks(keys):
            await score_set(task)
        print_scores(work.run, selection, [kind])


def merge_parts(runs: Sequence[Path]) -> None:
    """Merge the parts of each run and print the number of new rows."""
    for run in runs:
        with claim(run):
            merged = merge(run)
        numbers = ", ".join(map(str, merged.parts))
        missing = f"; {merged.missing} neurons are missing in the others" if merged.missing else ""
        print(
            f"{run.name}: merged part{'s' * (len(merged.parts) > 1)} {numbers}: {merged.rows:,} new rows, "
            f"{merged.failures:,} failures, {merged.calls:,} answers; {merged.whole} sets are whole{missing}"
        )


async def merge_and_score(request: InterpretRequest) -> Mapping[Path, tuple[str, ...]]:
    """Merge the parts of every run and score the whole sets; returns the scored protocols of each run."""
    runs, scored = check_runs(request.selection), dict[Path, tuple[str, ...]]()
    merge_parts(runs)
    selection = request.selection
    for run in runs:
        work = RunWork(request=request, run=run, llms=LLMs(None, None, None), usage=Usage())
        stored = [
            key for key in Store.open(run).sets("simulate")
            if (key.mode, key.tap) == (selection.mode, selection.tap) and not key.by_lookup
        ]  # fmt: skip
        whole = whole_protocols(work, stored)
        for kind, names in whole.items():
            for name in names:
                await score_and_print(work, kind, [name])
        scored[run] = tuple(dict.fromkeys(name for names in whole.values() for name in names))
    return scored


def _print_usage(request: InterpretRequest, runs: Sequence[Path], usage: Usage) -> None:
    """Print calls, tokens and price, and the failures by kind."""
    spending = request.spending
    price = spending.price_in * usage.prompt_tokens + spending.price_out * usage.new_tokens
    line = f"asked: {usage.line()} ({human(usage.prompt_tokens)} read, {human(usage.new_tokens)} written)"
    line += f", {human(usage.prompt_cached)} of those read from the server's cache" if usage.prompt_cached else ""
    print("\n" + line + (f", price {price / 1e6:.2f}" if price else ""))
    failed = Counter(
        f"{stage}: {printable(failure_kind(message))}"
        for run in runs
        for stage, message in all_failures(Store(run) if not spending.part else Store(run, spending.share[0]))
    )
    if failed:
        print("failed: " + "; ".join(f"{kind} ({count})" for kind, count in failed.most_common()))


def failure_kind(message: str) -> str:
    """The kind of a failure: the beginning of its message, without the answer."""
    return message.split(":", 1)[0].split('"', 1)[0].strip()[:58]
