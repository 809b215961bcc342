"""Consistency and distinctiveness of each run, and example neurons, read from the stores and records.

`docs/firing.md` defines the numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float32

from cratelm.activations.records import Excerpt, read_records
from cratelm.interpretation.firing.means import ModelFiring, mean_firing
from cratelm.interpretation.firing.measures import STATED, Counts, LayerFiring, count_sets, relevant_tokens
from cratelm.interpretation.protocols import OUT_OF_CONTEXT, draw, protocol
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.results.gather import Results, RunResult
from cratelm.runtime import progress_bar

EXAMPLES = 3
"""Example neurons per model."""

RELEVANT_NEEDED, RELEVANT_NEEDED_SHORT = 8, 4
"""Relevant tokens in random excerpts that an example needs, since consistency on one or two tokens is chance.

The second for short excerpts: the anthropic protocol has five of 8 tokens, the others five of 64.
"""

EXAMPLE_EXCERPTS = 3
"""Excerpts per example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FiringExample:
    """A neuron that fires consistently and distinctively on random text."""

    layer: int
    index: int
    score: float
    """Correlation of activation and simulation over the scored excerpts, in [-1, 1]."""
    explanation: str
    consistency: float
    """On random excerpts, in [0, 1]."""
    distinctiveness: float
    maximum: float
    """The neuron's largest activation in the collected text, in the model's own units."""
    excerpts: tuple[Excerpt, ...] = field(repr=False)
    relevant: tuple[Bool[np.ndarray, " _"], ...] = field(repr=False)
    """For each excerpt, whether the explanation predicts the neuron to fire on each token."""
    predicted: tuple[Float32[np.ndarray, " _"], ...] = field(repr=False)
    """The simulation on the tokens of each excerpt, as a share of its largest value in all excerpts, at least 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiring:
    """Firing measures of one run."""

    run: RunResult
    protocol: str
    """The protocol of the excerpts."""
    own: ModelFiring
    shuffled: ModelFiring | None
    """With the explanations of other neurons of the layer."""
    others: tuple[tuple[str, ModelFiring], ...]
    """(explainer and simulator in words, numbers) of other explanations and simulations of the same neurons."""
    examples: tuple[FiringExample, ...]


def gather_firing(results: Results) -> tuple[RunFiring, ...]:
    """Firing of every run that has simulations by the shown protocol; a model is followed by its control."""
    runs = [run for run in results.rows if results.shown in run.scores]
    entries = []
    with progress_bar("firing on relevant tokens", total=float(len(runs)), unit="runs") as bar:
        for run in runs:
            entries.append(_of_run(run, results))
            bar.advance(1.0, note=run.title)
    return tuple(entries)


def _of_run(run: RunResult, results: Results) -> RunFiring:
    asked = replace(results.asked, tap=run.tap, protocol=results.shown)
    keys = [replace(asked, layer=layer.layer) for layer in run.scores[results.shown].layers]

    def mean(keys: Sequence[SetKey]) -> ModelFiring:
        return mean_firing(count_sets(run.path, keys), model=run.identity)

    counted = count_sets(run.path, keys)
    shuffled = [replace(key, control="shuffled") for key in keys]
    return RunFiring(
        run=run, protocol=results.shown, own=mean_firing(counted, model=run.identity),
        shuffled=mean(shuffled) if results.shown in run.shuffled else None,
        others=tuple((title, mean(sets)) for title, sets in _others(run, keys)),
        examples=tuple(_examples(run, keys, counted)) if run.control is None else (),
    )  # fmt: skip


def _others(run: RunResult, shown: Sequence[SetKey]) -> Iterator[tuple[str, list[SetKey]]]:
    """Explainer and simulator in words, and simulations of all layers, by other explainers or simulators."""
    first, kinds = shown[0], dict[SetKey, list[SetKey]]()
    for key in Store.open(run.path).sets("simulate"):
        kind = replace(key, layer=first.layer)
        if replace(kind, explainer=first.explainer, simulator=first.simulator) == first != kind:
            kinds.setdefault(kind, []).append(key)
    for kind, keys in kinds.items():
        if len(keys) == len(shown):
            yield f"explained by {kind.explainer}" + f", simulated by {kind.simulator}" * bool(kind.simulator), keys


def _examples(run: RunResult, keys: Sequence[SetKey], counted: Sequence[LayerFiring]) -> Iterator[FiringExample]:
    """The scored neurons of all layers with the highest harmonic mean of consistency and distinctiveness.

    Measured on random text. A neuron without a score (for example a constant one) is left out: it would rank first.
    """
    store, ranked = Store.open(run.path), list[tuple[float, int, int, float]]()
    for place, (key, layer) in enumerate(zip(keys, counted, strict=True)):
        if "random" in layer.kinds:
            both = _harmonic(layer.kinds["random"], relevant_needed(key.protocol))
            scores = store.scores(key)
            points = dict(zip(scores.neuron.tolist(), scores.correlation.tolist(), strict=True))
            scored = [points.get(neuron, np.nan) for neuron in layer.neuron.tolist()]
            ranked += [
                (-value, place, row, score)
                for row, (value, score) in enumerate(zip(both.tolist(), scored, strict=True))
                if not np.isnan(value) and not np.isnan(score)
            ]
    for _, place, row, score in sorted(ranked)[:EXAMPLES]:
        yield _example(run, keys[place], counted[place], row, score)


def _example(run: RunResult, key: SetKey, layer: LayerFiring, row: int, score: float) -> FiringExample:
    """One neuron with the excerpts in which it fires most, without excerpts that are cut out of their context."""
    store, index = Store.open(run.path), int(layer.neuron[row])
    records = read_records(run.path, key.layer, mode=key.mode, tap=key.tap)
    neuron = records.rows(slice(index, index + 1))  # drawing the excerpts of a whole layer is slow
    excerpts = list(draw(neuron, protocol(key.protocol, key.mode).score, "score").of(0))
    parts = np.split(store.simulations(key).of(row), np.cumsum([len(excerpt.tokens) for excerpt in excerpts])[:-1])
    largest = max(float(part.max(initial=0)) for part in parts)
    whole = [place for place, excerpt in enumerate(excerpts) if len(excerpt.tokens) > OUT_OF_CONTEXT]
    shown = sorted(whole, key=lambda place: -float(excerpts[place].activations.max()))[:EXAMPLE_EXCERPTS]
    consistency, _, distinctiveness, _ = layer.kinds["random"].measures[row, STATED]
    return FiringExample(
        layer=key.layer, index=index, score=score, explanation=store.texts(key).get(index, ""),
        consistency=float(consistency), distinctiveness=float(distinctiveness),
        maximum=float(records.statistics["maximum"][index]), excerpts=tuple(excerpts[place] for place in shown),
        relevant=tuple(relevant_tokens(parts[place], largest) for place in shown),
        predicted=tuple(np.clip(parts[place] / (largest or 1), 0, 1).astype(np.float32) for place in shown),
    )  # fmt: skip


def relevant_needed(name: str) -> int:
    """Relevant tokens in random excerpts that an example needs by this protocol."""
    random = next(drawn for drawn in protocol(name).score if drawn.kind == "random")
    return RELEVANT_NEEDED if random.width >= 64 else RELEVANT_NEEDED_SHORT


def _harmonic(counts: Counts, needed: int) -> np.ndarray:
    """Harmonic mean of consistency and distinctiveness; NaN for neurons with fewer relevant tokens than needed."""
    consistency, distinctiveness = counts.measures[:, STATED, 0], counts.measures[:, STATED, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        both = 2 * consistency * distinctiveness / (consistency + distinctiveness)
    return np.where(counts.relevant[:, :, STATED, 0].sum(axis=1) >= needed, both, np.nan)
