"""What the interpreting commands do where a language model explains or simulates: open it, plan, ask, score, account.

open       the model behind a URL or in this process; how it simulates, and whether it can (self-test)
plan       calls, tokens and price of what is not there yet, counted from the prompts
ask        explain and simulate, each neuron kept as it is ready
account    the scores; what was asked, what came from the cache, what failed and how
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cratelm.errors import CrateError
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.firing.measures import firing_layer, write_firing
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.scorers.registry import SIMULATION
from cratelm.interpretation.stages import language_model as llm_stages
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.parts import merge
from cratelm.interpretation.store.schema import SetKey
from cratelm.rundir import claim
from cratelm.runtime import human
from cratelm.workflows.llm.judges import print_judged
from cratelm.workflows.llm.opening import (
    explainer_name,
    opened,
)
from cratelm.workflows.llm.order import Order
from cratelm.workflows.llm.run_work import Made, Work, records_for
from cratelm.workflows.options.selection import Selection, check_runs, chosen_layers, chosen_protocols
from cratelm.workflows.score_table import print_scores


def ask(order: Order) -> None:
    """Do it, for every run."""
    runs = check_runs(order.selection)
    order.check(runs)
    usage, (part, parts) = Usage(), order.spending.share
    if order.spending.merge:
        merge_parts(runs)
    with contextlib.ExitStack() as held:
        for run in runs:
            held.enter_context(claim(run, part=part if parts > 1 else 0))
        made = asyncio.run(_ask(order, runs, usage))
    if order.spending.dry_run:
        return
    for run in runs:
        if "score" in order.stages and not order.spending.part:
            if kinds := made[run].kinds:
                _score(order.selection, run, kinds)
                print_scores(run, order.selection, kinds)
            else:
                _score_whole(order, run, _kinds(order, run, made[run].explainer))
        if made[run].judged and not order.spending.part:
            print_judged(run, made[run].judged)
    if usage.calls or usage.cached or "score" not in order.stages:
        _account(order, runs, usage)


async def _ask(order: Order, runs: Sequence[Path], usage: Usage) -> dict[Path, Made]:
    """Ask what is to be asked."""
    judges = any(scorer != SIMULATION for scorer in order.scorers)
    if not judges and order.stages == ("score",) and explainer_name(order.explaining):
        return {run: Made(order.named(explainer_name(order.explaining))) for run in runs}
    simulating = order.simulating if "simulate" in order.stages else None
    async with opened(order.explaining, simulating, order.spending, usage, judged=judges) as cast:
        return {run: await Work(order=order, run=run, cast=cast, usage=usage).do() for run in runs}


def merge_parts(runs: Sequence[Path]) -> None:
    """Join what the parts of each run made, and say what that was."""
    for run in runs:
        with claim(run):
            found = merge(run)
        numbers = ", ".join(map(str, found.parts))
        missing = f"; {found.missing} neurons are missing in the others" if found.missing else ""
        print(
            f"{run.name}: merged part{'s' * (len(found.parts) > 1)} {numbers}: {found.rows:,} new rows, "
            f"{found.failures:,} failures, {found.calls:,} answers; {found.whole} sets are whole{missing}"
        )


def merge_alone(selection: Selection) -> dict[Path, tuple[str, ...]]:
    """Join the parts of every run, and score what is whole then; returns the protocols by which that is, by run."""
    runs = check_runs(selection)
    merge_parts(runs)
    layers = {run: chosen_layers(run, selection) for run in runs}
    scored: dict[Path, tuple[str, ...]] = {}
    for run in runs:
        whole: dict[SetKey, list[SetKey]] = {}
        for key in Store.open(run).sets("simulate"):
            asked = (key.explainer, key.simulator) != (EXPLAINER, "")
            if asked and (key.mode, key.tap) == (selection.mode, selection.tap):
                whole.setdefault(replace(key, layer=0, protocol=""), []).append(key)
        found = list[str]()
        for kind, keys in whole.items():
            for name in chosen_protocols(selection):
                if {key.layer for key in keys if key.protocol == name} >= set(layers[run]):
                    one = replace(selection, protocol=(name,))
                    _score(one, run, [kind])
                    print_scores(run, one, [kind])
                    found.append(name)
        scored[run] = tuple(dict.fromkeys(found))
    return scored


def _kinds(order: Order, run: Path, name: str) -> list[SetKey]:
    """The kinds of simulations there are of an explainer, layer and protocol open."""
    selection = order.selection
    found = [
        replace(key, layer=0, protocol="")
        for key in Store.open(run).sets("simulate")
        if (key.mode, key.tap, key.explainer) == (selection.mode, selection.tap, name)
        and (key.explainer, key.simulator) != (EXPLAINER, "")
    ]
    if not found:
        raise CrateError(f"{run} holds no simulations of what {name} explained. Run: cratelm interpret {run} --llm URL")
    return list(dict.fromkeys(found))


def _score_whole(order: Order, run: Path, kinds: Sequence[SetKey]) -> None:
    """Score of these kinds what is whole, by the protocols by which it is, and say what is not."""
    selection, there = order.selection, set(Store.open(run).sets("simulate"))
    names, lacking = chosen_protocols(selection), list[str]()
    chosen = [kind for kind in kinds if not order.controls or kind.control in ("", *order.controls)]
    whole = {
        kind: tuple(
            name for name in names
            if all(replace(kind, layer=layer, protocol=name) in there for layer in chosen_layers(run, selection))
        )
        for kind in chosen
    }  # fmt: skip
    if not any(whole.values()):
        _score(selection, run, chosen)  # which says what is missing, and what to run
    for kind, by in whole.items():
        if by:
            one = replace(selection, protocol=by)
            _score(one, run, [kind])
            print_scores(run, one, [kind])
        lacking += [f"{kind.control or 'own explanations'} by {name}" for name in names if name not in by]
    if lacking:
        print(f"\nnot whole, so not scored: {'; '.join(lacking)}")


def _score(selection: Selection, run: Path, kinds: Sequence[SetKey]) -> None:
    """Score every set of these kinds that was selected, anew each time: that takes milliseconds."""
    store = Store.open(run)
    for layer in chosen_layers(run, selection):
        for name in chosen_protocols(selection):
            for kind in kinds:
                key = replace(kind, layer=layer, protocol=name)
                store.check(key, "simulate")
                records, by = records_for(run, key), protocol(name, key.mode)
                write_firing(store, key, firing_layer(records, by, store.simulations(key)))
                store.write_scores(key, llm_stages.score(store, key, records, by))


def _account(order: Order, runs: Sequence[Path], usage: Usage) -> None:
    """What was asked, and what failed and how."""
    spending = order.spending
    price = spending.price_in * usage.prompt_tokens + spending.price_out * usage.new_tokens
    said = f"asked: {usage.line()} ({human(usage.prompt_tokens)} read, {human(usage.new_tokens)} written)"
    print("\n" + said + (f", price {price / 1e6:.2f}" if price else ""))
    failed: Counter[str] = Counter()
    for run in runs:
        store = Store(run) if not spending.part else Store(run, spending.share[0])
        for stage, message in llm_stages.all_failures(store):
            failed[f"{stage}: {failure_kind(message)}"] += 1
    if failed:
        print("failed: " + "; ".join(f"{kind} ({count})" for kind, count in failed.most_common()))


def failure_kind(message: str) -> str:
    """What kind of failure a message tells of: its beginning, without what the model said."""
    return message.split(":", 1)[0].split('"', 1)[0].strip()[:60]
