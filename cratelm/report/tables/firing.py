"""Consistency and distinctiveness in a report: what is gathered from the runs, tables, sentences, examples.

`docs/firing.md` says what the numbers are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float32

from cratelm.activations.records import Excerpt, read_records
from cratelm.interpretation.firing.means import Mean, ModelFiring, mean_firing
from cratelm.interpretation.firing.measures import (
    KINDS,
    STATED,
    THRESHOLDS,
    Counts,
    LayerFiring,
    count_sets,
    relevant_tokens,
)
from cratelm.interpretation.protocols import OUT_OF_CONTEXT, draw, protocol
from cratelm.interpretation.scoring.statistics import interval
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.report.results.gather import Results, RunResult, matched_pairs
from cratelm.report.tables.paper import Cell, Column, Table
from cratelm.runtime import progress_bar

EXAMPLES = 3
"""Neurons shown of each model."""
RELEVANT_NEEDED, RELEVANT_NEEDED_SHORT = 8, 4
"""Relevant tokens of random excerpts that an example must have: on one or two anything can be consistent.

The second where these excerpts are the five of 8 tokens of the anthropic protocol, and not five of 64.
"""
EXAMPLE_EXCERPTS = 3
"""Excerpts shown of each of them."""


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
    """Which tokens of each excerpt its explanation predicts it to fire on."""
    predicted: tuple[Float32[np.ndarray, " _"], ...] = field(repr=False)
    """The simulation on the tokens of each excerpt, as a share of its largest anywhere; 0 where it predicts nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiring:
    """One run."""

    run: RunResult
    protocol: str
    """Whose excerpts these are."""
    own: ModelFiring
    shuffled: ModelFiring | None
    """With the explanations of other neurons of the layer."""
    others: tuple[tuple[str, ModelFiring], ...]
    """From other explanations and simulations of the same neurons: who made them, and the numbers."""
    examples: tuple[FiringExample, ...]


def gather_firing(results: Results) -> tuple[RunFiring, ...]:
    """Of every run that has simulations by the shown protocol; a model is followed by its control."""
    runs = [run for run in results.rows if results.shown in run.scores]
    found = []
    with progress_bar("firing on relevant tokens", total=float(len(runs)), unit="runs") as bar:
        for run in runs:
            found.append(_of_run(run, results))
            bar.advance(1.0, note=run.title)
    return tuple(found)


def _of_run(run: RunResult, results: Results) -> RunFiring:
    asked = replace(results.asked, tap=run.tap, protocol=results.shown)
    keys = [replace(asked, layer=one.layer) for one in run.scores[results.shown].layers]

    def mean(of: Sequence[LayerFiring]) -> ModelFiring:
        return mean_firing(of, model=run.identity)

    counted = count_sets(run.path, keys)
    shuffled = None
    if results.shown in run.shuffled:
        shuffled = mean(count_sets(run.path, [replace(key, control="shuffled") for key in keys]))
    examples = tuple(_examples(run, keys, counted)) if run.control is None else ()
    others = tuple((title, mean(count_sets(run.path, those))) for title, those in _others(run, keys))
    return RunFiring(
        run=run, protocol=results.shown, own=mean(counted), shuffled=shuffled, others=others, examples=examples
    )


def _others(run: RunResult, shown: Sequence[SetKey]) -> Iterator[tuple[str, list[SetKey]]]:
    """The other sets of simulations of all layers, first explanations alone, with who made them."""
    first, found = shown[0], dict[SetKey, list[SetKey]]()
    for key in Store.open(run.path).sets("simulate"):
        kind = replace(key, layer=first.layer)
        if replace(kind, explainer=first.explainer, simulator=first.simulator) == first != kind:
            found.setdefault(kind, []).append(key)
    for kind, keys in found.items():
        if len(keys) == len(shown):
            yield f"explained by {kind.explainer}" + f", simulated by {kind.simulator}" * bool(kind.simulator), keys


def _examples(run: RunResult, keys: Sequence[SetKey], counted: Sequence[LayerFiring]) -> Iterator[FiringExample]:
    """The scored neurons of all layers with the highest harmonic mean of consistency and distinctiveness.

    On random text. One without a score, such as a neuron that has one value everywhere, would win for nothing.
    """
    store, ranked = Store.open(run.path), list[tuple[float, int, int, float]]()
    for place, (key, layer) in enumerate(zip(keys, counted, strict=True)):
        if "random" in layer.kinds:
            both = _harmonic(layer.kinds["random"], relevant_needed(key.protocol))
            scores = store.scores(key)
            points = dict(zip(scores.neuron.tolist(), scores.correlation.tolist(), strict=True))
            of = [points.get(neuron, np.nan) for neuron in layer.neuron.tolist()]
            ranked += [
                (-value, place, row, score)
                for row, (value, score) in enumerate(zip(both.tolist(), of, strict=True))
                if not np.isnan(value) and not np.isnan(score)
            ]
    for _, place, row, score in sorted(ranked)[:EXAMPLES]:
        yield _example(run, keys[place], counted[place], row, score)


def _example(run: RunResult, key: SetKey, layer: LayerFiring, row: int, score: float) -> FiringExample:
    """One neuron with the excerpts in which it fires most, those cut out of their context left out."""
    store, index = Store.open(run.path), int(layer.neuron[row])
    records = read_records(run.path, key.layer, mode=key.mode, tap=key.tap)
    own = records.rows(slice(index, index + 1))  # the excerpts of a whole layer take a while to draw
    excerpts = list(draw(own, protocol(key.protocol, key.mode).score, "score").of(0))
    parts = np.split(store.simulations(key).of(row), np.cumsum([len(one.tokens) for one in excerpts])[:-1])
    largest = max(float(part.max(initial=0)) for part in parts)
    whole = [place for place, one in enumerate(excerpts) if len(one.tokens) > OUT_OF_CONTEXT]
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
    """Relevant tokens of random excerpts that an example by this protocol must have."""
    random = next(one for one in protocol(name).score if one.kind == "random")
    return RELEVANT_NEEDED if random.width >= 64 else RELEVANT_NEEDED_SHORT


def _harmonic(counts: Counts, needed: int) -> np.ndarray:
    """Of consistency and distinctiveness; NaN for neurons with too few relevant tokens to say so."""
    consistency, distinctiveness = counts.measures[:, STATED, 0], counts.measures[:, STATED, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        both = 2 * consistency * distinctiveness / (consistency + distinctiveness)
    return np.where(counts.relevant[:, :, STATED, 0].sum(axis=1) >= needed, both, np.nan)


SHARE, ENDS = "0.1", Column("95 % interval", "interval", "%")


def _columns(*more: Column) -> tuple[Column, ...]:
    return (
        Column("Excerpts"), Column("Model"), *more, Column("Consistency", "0.1", "%"), ENDS,
        Column("Fires on any token", "0.1", "%"), Column("Strength", "0.1", "% of maximum"),
        Column("Distinctiveness", "0.1", "%"), ENDS, Column("Of mass", "0.1", "%"), ENDS,
        Column("Any token is relevant", "0.1", "%"), Column("Neurons", "count"),
        Column("Nothing predicted", "count"), Column("Silent", "count"),
    )  # fmt: skip


def firing_tables(found: Sequence[RunFiring]) -> tuple[Table, ...]:
    """By model, and by layer; empty where no run has simulations."""
    if not found:
        return ()
    rows, layers = list[tuple[Cell, ...]](), list[tuple[Cell, ...]]()
    kinds = [kind for kind in KINDS if any(kind in one.own.overall for one in found)]
    for kind in kinds:
        for one in found:
            own, shuffled = (one.run.title, one.own), (f"{one.run.title}, shuffled", one.shuffled)
            for title, firing in (own, shuffled, *((f"{one.run.title}, {who}", made) for who, made in one.others)):
                if firing is not None and kind in firing.overall:
                    rows.append((kind, title, *_cells(firing.overall[kind])))
                    layers += [
                        (kind, title, layer, *_cells(mean))
                        for layer, mean in zip(firing.layers, firing.by_layer[kind], strict=True)
                    ]
    protocol = found[0].protocol
    return (
        Table(
            name="firing", caption=f"Firing on relevant tokens ({protocol})", columns=_columns(), rows=tuple(rows),
            notes=_notes(protocol, kinds),
        ),
        Table(
            name="firing_layers", caption=f"Firing on relevant tokens by layer ({protocol})", rows=tuple(layers),
            columns=_columns(Column("Layer", "count")),
        ),
    )  # fmt: skip


def _notes(protocol: str, kinds: Sequence[str]) -> tuple[str, ...]:
    apart = f", {' and '.join(kinds)} apart" if len(kinds) > 1 else f", all of them {kinds[0]}" if kinds else ""
    return (
        f"A token is relevant to a neuron where the simulation predicts at least {THRESHOLDS[STATED]} of its largest "
        "prediction for it. Consistency: share of the relevant tokens on which the neuron fires; by chance it is the "
        "share of any tokens on which it fires. Strength: its mean activation there. Distinctiveness: share of the "
        "tokens on which it fires, and of its activation (mass), that is on relevant tokens; by chance it is the share "
        "of any tokens that are relevant. Means over neurons, then over layers; intervals by two-level bootstrap, over "
        "neurons and over the excerpts of each.",
        f"Excerpts of {protocol}{apart}. Nothing predicted: neurons without a relevant token. Silent: neurons that "
        "fire nowhere in these excerpts. Shuffled: explanations of other neurons of the layer.",
    )


def _cells(mean: Mean) -> tuple[Cell, ...]:
    return (
        mean.of("consistency"), mean.interval("consistency"), mean.of("firing"), mean.of("strength"),
        mean.of("distinctiveness"), mean.interval("distinctiveness"), mean.of("distinctiveness_mass"),
        mean.interval("distinctiveness_mass"), mean.of("relevant"), mean.neurons, mean.unpredicted, mean.silent,
    )  # fmt: skip


def firing_sentences(found: Sequence[RunFiring]) -> list[str]:
    """Who fires more consistently and more distinctively on random text, in plain words, with differences."""
    by_title = {one.run.title: one for one in found}
    models = [one.run for one in found if one.run.control is None]
    sentences = []
    for first, second in matched_pairs(models):
        pair = (by_title[first.title].own.overall, by_title[second.title].own.overall)
        if not all("random" in overall for overall in pair):
            continue
        ours, theirs = (overall["random"] for overall in pair)
        if None in (ours.of("consistency"), theirs.of("consistency"), ours.of("distinctiveness")):
            continue
        names = first.title, second.title
        sentences += [_consistency(*names, ours, theirs), _distinctiveness(*names, ours, theirs)]
    return sentences


def _consistency(first: str, second: str, ours: Mean, theirs: Mean) -> str:
    apart, above = (_difference(ours, theirs, names) for names in (("consistency",), ("consistency", "firing")))
    return (
        f"On random text the neurons of {first} fire on {_percent(ours, 'consistency')} of the tokens that their "
        f"explanations call relevant, those of {second} on {_percent(theirs, 'consistency')}: a difference of {apart} "
        f"points. But they fire on {_percent(ours, 'firing')} and {_percent(theirs, 'firing')} of all tokens anyway; "
        f"how far consistency lies above that differs by {above} points."
    )


def _distinctiveness(first: str, second: str, ours: Mean, theirs: Mean) -> str:
    tokens, mass = (_difference(ours, theirs, (name,)) for name in ("distinctiveness", "distinctiveness_mass"))
    return (
        f"Of the tokens on which they fire, {_percent(ours, 'distinctiveness')} are relevant in {first} and "
        f"{_percent(theirs, 'distinctiveness')} in {second} (difference {tokens} points), and of their activation "
        f"{_percent(ours, 'distinctiveness_mass')} and {_percent(theirs, 'distinctiveness_mass')} ({mass} points)."
    )


def _percent(mean: Mean, name: str) -> str:
    value = mean.of(name)
    return "–" if value is None else f"{value:.1f} %"


def _difference(ours: Mean, theirs: Mean, names: Sequence[str]) -> str:
    """Of one measure, or of one less another, with its interval: models are resampled apart."""
    values, low, high = difference(ours, theirs, names)
    return f"{_signed(values)} [{_signed(low)}, {_signed(high)}]"


def difference(ours: Mean, theirs: Mean, names: Sequence[str]) -> tuple[float, float, float]:
    """Ours less theirs, in points, with the ends of its 95 % interval; of the first measure less the others."""

    def of(mean: Mean) -> tuple[float, np.ndarray]:
        columns = [(mean.of(name) or 0.0, mean.column(name)) for name in names]
        signs = [1.0, *(-1.0 for _ in names[1:])]
        return (
            sum(sign * value for sign, (value, _) in zip(signs, columns, strict=True)),
            np.sum([sign * samples for sign, (_, samples) in zip(signs, columns, strict=True)], axis=0),
        )

    (ours_value, ours_samples), (theirs_value, theirs_samples) = of(ours), of(theirs)
    return ours_value - theirs_value, *interval(ours_samples - theirs_samples)


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}").replace("+0.0", "0.0").replace("\N{MINUS SIGN}0.0", "0.0")


def shown_examples(found: Sequence[RunFiring]) -> Mapping[str, tuple[FiringExample, ...]]:
    """Title of a model -> its examples, of the models that have some."""
    return {one.run.title: one.examples for one in found if one.examples}
