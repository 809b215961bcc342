"""The data of a report, gathered once from the files of each run: tables, figures and the page only format it.

Reads `run.json`, `metrics.jsonl`, the evaluation, `interpretation.sqlite` and the records. A control run (the same
architecture with random weights) is attached to its model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cratelm.activations.records import Mode, read_collection, recorded_layers, records_strings
from cratelm.activations.row_beginning import earlier_beginning
from cratelm.errors import CrateError
from cratelm.interpretation.protocols import PROTOCOLS
from cratelm.interpretation.scoring.correlation import LayerScores, ModelAggregate, aggregate
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey, asking
from cratelm.report.results.descriptions import described_runs, distinct
from cratelm.report.results.examples import NeuronExample, examples_of
from cratelm.report.results.explainer_choice import choose_explainer, described, scored_taps
from cratelm.report.results.loss import Loss, read_loss
from cratelm.report.shown_text import visible
from cratelm.rundir import read_jsonl
from cratelm.runtime import progress_bar

RESAMPLES, SEED = 2000, 0
"""Of the bootstrap behind every interval."""

Outcome = Literal["higher", "lower", "no clear difference"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A loss along the training of a model."""

    tokens: tuple[float, ...] = ()
    """Tokens seen so far."""
    loss: tuple[float, ...] = ()
    """Nats per token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """One model: its cost, its loss, and how interpretable its neurons are."""

    path: Path
    name: str
    title: str
    """The name as tables and figures show it, unique in a report."""
    arch: str
    num_layers: int
    control: str | None
    """`random-init` for a model that was never trained, None for a model."""
    of: str | None
    """For a control, the name of its model."""
    tap: str = "neurons"
    """The tap that the scores belong to: `neurons`, or another recorded tap."""
    parameters: int
    """Trainable numbers, position embeddings left out and the tied head counted once."""
    flops_per_token: int
    """Floating-point operations of a forward pass per token, at full context."""
    training: Mapping[str, Any]
    """The training settings; empty for a model that was not trained."""
    loss: Loss | None
    train_curve: Curve
    held_out_curve: Curve
    scores: Mapping[str, ModelAggregate]
    """By protocol, in points (100 times the correlation)."""
    shuffled: Mapping[str, ModelAggregate]
    """By protocol, the scores of explanations swapped among the neurons of a layer, if of the same neurons."""
    shuffled_elsewhere: tuple[str, ...] = ()
    """Protocols whose swapped explanations were scored on other neurons; these are not compared."""
    random_init: "RunResult | None"
    """The random-init control of this model, if the report includes it."""
    examples: tuple[NeuronExample, ...] = field(repr=False)
    token_strings: Sequence[str] = field(repr=False)
    collection: Mapping[str, Any] = field(repr=False)
    """The contents of `records.json`."""
    origin: Mapping[str, Any] = field(repr=False)
    """Date, versions and machine of the training."""

    @property
    def identity(self) -> str:
        """Identifies the model and tap, independent of the folder and of the other runs of a report."""
        return f"{self.name}, {self.control}, {self.tap}, {self.collection.get('model_hash')}"

    @property
    def training_tokens(self) -> int | None:
        """Number of training tokens; None for a model that was not trained."""
        return None if self.training.get("tokens") is None else int(self.training["tokens"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """The runs of one report."""

    mode: Mode
    explainer: str
    simulator: str = ""
    """Empty for the lookup simulator."""
    taps: tuple[str, ...] = ("neurons",)
    """The scored taps."""
    protocols: tuple[str, ...]
    """Protocols that any run was scored on, in the paper's order."""
    models: tuple[RunResult, ...]
    """In the given order, controls attached to their models; a control without its model is its own entry."""
    missing: tuple[str, ...]
    """A sentence for each measurement that the runs lack, with the command to run."""

    @property
    def asked(self) -> SetKey:
        """The sets that are shown; the tap, layer and protocol of the key are placeholders."""
        return SetKey(mode=self.mode, layer=0, protocol="", explainer=self.explainer, simulator=self.simulator)

    @property
    def shown(self) -> str:
        """The protocol whose neurons and firing are shown."""
        return shown_protocol(self.models)

    @property
    def described(self) -> str:
        """Explainer and simulator in words."""
        return described(self.explainer, self.simulator)

    @property
    def of_other_neurons(self) -> tuple[str, ...]:
        """A sentence for each control that is not compared because it is of other neurons, with what to run."""
        more = f"{' --mode compat' * (self.mode == 'compat')} --controls shuffled"
        return tuple(
            other_neurons("shuffled", f"{run.title} on {listed(run.shuffled_elsewhere)}", f"{run.path} --llm URL{more}")
            for run in self.rows if run.shuffled_elsewhere
        )  # fmt: skip

    @property
    def rows(self) -> tuple[RunResult, ...]:
        """Every run, each model followed by its control."""
        return tuple(run for model in self.models for run in (model, model.random_init) if run is not None)


def gather(
    runs: Sequence[Path], *, mode: Mode = "fixed", taps: Sequence[str] = ("neurons",), explainer: str = "",
    simulator: str = "",
) -> Results:  # fmt: skip
    """Read all runs of a report, each once for every tap. Raises `CrateError` for a run without all its scores."""
    paths = distinct(runs)
    if not paths:
        raise CrateError("a report needs at least one run. Run: cratelm report RUN...")
    described_paths = list(described_runs(paths, "parameters", "flops_per_token", "model.num_layers"))
    explainer, simulator = choose_explainer(paths, mode, explainer, simulator)
    asked = SetKey(mode=mode, layer=0, protocol="", explainer=explainer, simulator=simulator)
    results = []
    with progress_bar("reading scores", total=float(len(paths)), unit="runs") as bar:
        for path, title, description in described_paths:
            for tap in scored_taps(path, taps, mode):
                results.append(_read_run(path, description, title, replace(asked, tap=tap)))
            bar.advance(1.0, note=title)
    shown = replace(asked, protocol=shown_protocol(results))
    models = _attach_controls([_with_examples(run, replace(shown, tap=run.tap)) for run in results])
    protocols = tuple(name for name in PROTOCOLS if any(name in run.scores for run in results))
    return Results(
        mode=mode, explainer=explainer, simulator=simulator, protocols=protocols, models=models,
        taps=tuple(dict.fromkeys(run.tap for run in results)), missing=tuple(_missing(models, protocols, mode)),
    )  # fmt: skip


def same_neurons(first: Sequence[LayerScores], second: Sequence[LayerScores]) -> bool:
    """Whether two sets of scores are of the same neurons in the same layers, including neurons without a score."""
    mine, other = ({scores.layer: scores.neuron for scores in layers} for layers in (first, second))
    return mine.keys() == other.keys() and all(np.array_equal(mine[layer], other[layer]) for layer in mine)


def other_neurons(control: str, scores: str, run: str) -> str:
    """Say that a control is not compared, and how to make one of the right neurons."""
    return (
        f"The {control} control of {scores} is of other neurons than the scores, so it is not compared. Run: "
        f"cratelm interpret {run}, with the --neurons and --neuron-seed of the scores"
    )


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def shown_protocol(runs: Sequence[RunResult]) -> str:
    """The first protocol, in the paper's order, of every model; else of any model; empty without scores."""
    models = [run.scores for run in runs if run.control is None] or [run.scores for run in runs]
    anywhere = [name for name in PROTOCOLS if any(name in scores for scores in models)]
    everywhere = [name for name in anywhere if all(name in scores for scores in models)]
    return next(iter(everywhere or anywhere), "")


def _with_examples(run: RunResult, shown: SetKey) -> RunResult:
    """The run with its examples; the layer of `shown` is a placeholder."""
    if shown.protocol not in run.scores:
        return run
    store = Store.open(run.path)
    layers = [store.scores(replace(shown, layer=line.layer)) for line in run.scores[shown.protocol].layers]
    return replace(run, examples=tuple(examples_of(run.path, layers, shown)))


def _read_run(path: Path, description: Mapping[str, Any], title: str, asked: SetKey) -> RunResult:
    """Read one run with the scores of `asked`, whose layer and protocol are placeholders."""
    num_layers, mode = int(description["model"]["num_layers"]), asked.mode
    if asked.tap != "neurons":
        title = visible(f"{title}, {asked.tap}")
    scores = _read_scores(path, num_layers, asked)
    aggregates = {
        (name, control): aggregate(layers, protocol=name, seed=SEED, resamples=RESAMPLES)
        for (name, control), layers in scores.items()
    }
    elsewhere = [
        name for (name, control), layers in scores.items()
        if control == "shuffled" and (name, "") in scores and not same_neurons(layers, scores[name, ""])
    ]  # fmt: skip
    metrics = read_jsonl(path / "metrics.jsonl")
    return RunResult(
        path=path, name=str(description["name"]), title=title, arch=str(description["arch"]), num_layers=num_layers,
        control=description.get("control"), of=description.get("of"), tap=asked.tap,
        parameters=int(description["parameters"]), flops_per_token=int(description["flops_per_token"]),
        training=description.get("training") or {}, loss=read_loss(path),
        train_curve=_curve(metrics, "loss"), held_out_curve=_curve(metrics, "held_out_loss"),
        scores={name: scores for (name, control), scores in aggregates.items() if not control},
        shuffled={
            name: scores for (name, control), scores in aggregates.items()
            if control == "shuffled" and name not in elsewhere
        },
        shuffled_elsewhere=tuple(name for name in PROTOCOLS if name in elsewhere), random_init=None, examples=(),
        token_strings=records_strings(path, mode),
        collection=read_collection(path, mode=mode), origin=description.get("origin") or {},
    )  # fmt: skip


def _curve(metrics: Sequence[Mapping[str, Any]], quantity: str) -> Curve:
    rows = [
        row for row in metrics if None not in (row.get(quantity), row.get("tokens")) and math.isfinite(row[quantity])
    ]
    return Curve(tokens=tuple(float(row["tokens"]) for row in rows), loss=tuple(float(row[quantity]) for row in rows))


def _read_scores(path: Path, num_layers: int, asked: SetKey) -> dict[tuple[str, str], tuple[LayerScores, ...]]:
    """The scores of all layers by (protocol, control); for a tap other than the neurons, of its recorded layers."""
    command = f"cratelm interpret {path}" + " --mode compat" * (asked.mode == "compat")
    command += asking(asked.explainer) * bool(asked.simulator)
    if asked.tap != "neurons":
        command += f" --tap {asked.tap}"
        num_layers = len(recorded_layers(path, mode=asked.mode, tap=asked.tap))
    if not (path / "interpretation.sqlite").exists():
        raise CrateError(f"{path} is not scored. Run: {command}")
    store = Store.open(path)
    sets: dict[tuple[str, str], list[SetKey]] = {}
    for key in store.scored():
        if replace(key, layer=asked.layer, protocol=asked.protocol, control="") == asked:
            sets.setdefault((key.protocol, key.control), []).append(key)
    if not any(control == "" for _, control in sets):
        scores = f"{asked.mode} scores{asked.of_tap} ({described(asked.explainer, asked.simulator)})"
        raise CrateError(f"{path} has no {scores}. Run: {command}")
    for (name, control), keys in sets.items():
        if len(keys) < num_layers:
            which = f"{name}, {control}" if control else name
            layers = f"{len(keys)} of its {num_layers} layers ({which})"
            raise CrateError(f"{path} is scored on {layers}. Run: {command} --protocol {name}")
    return {name: tuple(map(store.scores, keys)) for name, keys in sets.items()}


def _attach_controls(runs: Sequence[RunResult]) -> tuple[RunResult, ...]:
    """Attach each control to its model; if several models share a name, to the model in the same folder."""
    models = [run for run in runs if run.control is None]
    alone = []
    for control in (run for run in runs if run.control is not None):
        candidates = [
            i for i, model in enumerate(models)
            if (model.name, model.tap) == (control.of, control.tap) and model.random_init is None
        ]  # fmt: skip
        same_folder = [i for i in candidates if models[i].path.resolve().parent == control.path.resolve().parent]
        if candidates:
            chosen = (same_folder or candidates)[0]
            models[chosen] = replace(models[chosen], random_init=control)
        else:
            alone.append(control)
    return (*models, *alone)


def _missing(models: Sequence[RunResult], protocols: Sequence[str], mode: Mode) -> Iterator[str]:
    for run in models:
        yield from earlier_beginning(run.path, mode, run.title)
        if run.loss is None and not run.training and run.control is None:
            yield f"The loss of {run.title} is not measured: cratelm evaluate reads models that cratelm trained."
        elif run.loss is None:
            yield f"The loss of {run.title} is not evaluated. Run: cratelm evaluate {run.path} --data DIR"
        for name in protocols:
            if name not in run.scores:
                yield f"{run.title} is not scored on {name}. Run: cratelm interpret {run.path} --protocol {name}"
            elif name not in run.shuffled and name not in run.shuffled_elsewhere:
                yield f"{run.title} has no control with shuffled explanations on {name}."
        if run.control is None and run.random_init is None:
            yield f"This report does not include a random-init control of {run.title}."
    for name in PROTOCOLS:
        if name not in protocols:
            yield f"No run is scored on {name}."


def outcome(first: ModelAggregate, second: ModelAggregate) -> Outcome | None:
    """How the first compares with the second: different if their 95 % intervals do not overlap. None without both."""
    if first.interval is None or second.interval is None:
        return None
    lower: Outcome = "lower" if first.interval[1] < second.interval[0] else "no clear difference"
    return "higher" if first.interval[0] > second.interval[1] else lower


def matched_pairs(models: Sequence[RunResult]) -> list[tuple[RunResult, RunResult]]:
    """The models to compare: different architectures of the same depth, or else the first with all others."""
    trained = [model for model in models if model.control is None]
    pairs = [(a, b) for a, b in combinations(trained, 2) if a.arch != b.arch and a.num_layers == b.num_layers]
    return pairs or [(trained[0], other) for other in trained[1:]]
