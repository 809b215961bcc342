"""The paper's tables: performance, interpretability, and one row per layer."""

from collections.abc import Mapping

from cratelm.interpretation.scoring.correlation import LayerAggregate, ModelAggregate
from cratelm.interpretation.scoring.small_samples import few_neurons
from cratelm.report.results.gather import Results, RunResult
from cratelm.report.tables.form import Cell, Column, Table, without_columns, written

LOSS = Column("Loss", "0.001", "nats/token")

PARAMETERS, FLOPS = Column("Parameters", "human"), Column("FLOPs", "human", "per token")

COST = (LOSS, PARAMETERS, FLOPS)
"""Columns next to every interpretability number."""

SCORED = Column("Scored", "share", "of those chosen")

_CONTROLS = (Column("Shuffled", "0.1", "points"), Column("Random-init", "0.1", "points"))

INTERVAL = Column("95 % interval", "interval", "points")

ORDER = (Column("Spearman", "0.1", "points"), Column("AUROC", "0.1", "%"))

COUNTING = (
    "Parameters leave out position embeddings and count the tied head once; FLOPs are of a forward pass per token at "
    "full context, 2 per multiply-add."
)

CONTROL_ROWS = ("random-init", "shuffled")
"""Names of the controls in `summary`, below their model."""


def summary(results: Results) -> Table:
    """The short table for a terminal and the top of the page: a row per model, its controls below it."""

    def row(name: str, scores: Mapping[str, ModelAggregate], cost: tuple[Cell, ...]) -> tuple[Cell, ...]:
        return (name, *(_with_interval(scores.get(protocol)) for protocol in results.protocols), *cost)

    rows = []
    for model in results.models:
        rows.append(row(model.title, model.scores, _cost_cells(model)))
        if (control := model.random_init) is not None:
            rows.append(row(CONTROL_ROWS[0], control.scores, _cost_cells(control)))
        if model.shuffled or model.shuffled_elsewhere:
            rows.append(row(CONTROL_ROWS[1], model.shuffled, (None, None, None)))
    return Table(
        name="summary", caption=f"Mean score over layers, with 95 % intervals ({results.mode} mode)",
        columns=(Column("Model"), *(Column(name, "0.1", "points") for name in results.protocols), *COST),
        rows=tuple(rows), notes=(*results.of_other_neurons, *_of_few_neurons(results)),
    )  # fmt: skip


def _of_few_neurons(results: Results) -> tuple[str, ...]:
    """A warning if a layer's mean is over few neurons."""
    scores = [run.scores[name] for run in results.rows for name in results.protocols if name in run.scores]
    return few_neurons(layer.scored for aggregate in scores for layer in aggregate.layers)


def _with_interval(scores: ModelAggregate | None) -> Cell:
    if scores is None or scores.interval is None:
        return None if scores is None else written(scores.mean, "0.1")
    return f"{written(scores.mean, '0.1')} {written(scores.interval, 'interval')}"


def performance(results: Results) -> Table:
    """The paper's performance table: cost and held-out loss of each model."""
    columns = (
        Column("Model"), Column("Layers", "count"), PARAMETERS, FLOPS, Column("Training tokens", "human"), LOSS,
        Column("Standard error", "0.001", "nats/token"), Column("Perplexity", "0.1"), Column("Bits per byte", "0.001"),
        Column("Held-out tokens", "human"),
    )  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for run in results.rows:
        numbers: tuple[Cell, ...] = ("not evaluated", None, None, None, None)
        if (loss := run.loss) is not None:
            numbers = (loss.nats_per_token, loss.standard_error, loss.perplexity, loss.bits_per_byte, loss.tokens)
        cost = (run.parameters, run.flops_per_token, run.training_tokens or 0)
        rows.append((run.title, run.num_layers, *cost, *numbers))
    splits = sorted({run.loss.split for run in results.rows if run.loss is not None})
    about_loss = [f"Loss on the {' and '.join(splits)} split; its standard error is over documents."] if splits else []
    return Table(
        name="performance", caption="Performance", columns=columns, rows=tuple(rows),
        notes=(*about_loss, COUNTING, *(line for line in results.missing if "not evaluated" in line)),
    )  # fmt: skip


def interpretability(results: Results) -> Table:
    """The paper's interpretability table: mean and variance over layers, per protocol and model, with controls."""
    columns = (
        Column("Protocol"), Column("Model"), Column("Mean", "0.01", "points"), INTERVAL,
        Column("Variance", "0.01", "points²"), Column("Mean, all layers", "0.01", "points"),
        Column("Variance, all layers", "0.01", "points²"), Column("Undefined = 0", "0.01", "points"),
        *ORDER, SCORED, *_CONTROLS, *COST,
    )  # fmt: skip
    rows = [
        (name, run.title, *_aggregate_cells(run.scores[name]), *_control_cells(run, name), *_cost_cells(run))
        for name in results.protocols
        for run in results.rows
        if name in run.scores
    ]
    table = Table(
        name="interpretability", caption=f"Interpretability ({results.mode} mode, {results.described})",
        columns=columns, rows=tuple(rows), notes=(
            *_interpretability_notes(results), *results.of_other_neurons, *_of_few_neurons(results),
        ),
    )  # fmt: skip
    shallow = all(run.num_layers < 6 for run in results.rows)
    return without_columns(table, "Mean, all layers", "Variance, all layers") if shallow else table


def by_layer(results: Results) -> Table:
    """One row per protocol, model and layer."""
    columns = (
        Column("Protocol"), Column("Model"), Column("Layer", "count"), Column("Mean", "0.1", "points"), INTERVAL,
        Column("SD over neurons", "0.1", "points"), Column("Undefined = 0", "0.1", "points"), *ORDER, SCORED,
        Column("Dead", "count"), Column("Too rare", "count"), Column("Otherwise", "count"), *_CONTROLS, *COST,
    )  # fmt: skip
    rows = [
        (name, run.title, *_layer_cells(run, name, layer), *_cost_cells(run))
        for name in results.protocols
        for run in results.rows
        if name in run.scores
        for layer in run.scores[name].layers
    ]
    return Table(
        name="layers", caption="Interpretability by layer", columns=columns, rows=tuple(rows),
        notes=(*results.of_other_neurons, *_of_few_neurons(results)),
    )  # fmt: skip


def _aggregate_cells(scores: ModelAggregate) -> tuple[Cell, ...]:
    return (
        scores.mean, scores.interval, scores.variance, scores.mean_all_layers, scores.variance_all_layers,
        scores.mean_undefined_zero, scores.spearman, scores.auroc, scores.scored,
    )  # fmt: skip


def _control_cells(run: RunResult, name: str) -> tuple[Cell, Cell]:
    """Means of the shuffled explanations and of the random-init model, by the same rule as `mean`."""
    shuffled = run.shuffled.get(name)
    random_init = run.random_init.scores.get(name) if run.random_init is not None else None
    return (None if shuffled is None else shuffled.mean, None if random_init is None else random_init.mean)


def _cost_cells(run: RunResult) -> tuple[Cell, Cell, Cell]:
    loss = "not evaluated" if run.loss is None else run.loss.nats_per_token
    return loss, run.parameters, run.flops_per_token


def _layer_cells(run: RunResult, name: str, layer: LayerAggregate) -> tuple[Cell, ...]:
    dead, rare = layer.undefined.get("dead", 0), layer.undefined.get("too rare", 0)
    return (
        layer.layer, layer.points, layer.interval, layer.deviation, layer.points_undefined_zero,
        layer.spearman, layer.auroc, (layer.scored, layer.total), dead, rare,
        sum(layer.undefined.values()) - dead - rare,
        _points_of(run.shuffled.get(name), layer.layer),
        _points_of(run.random_init.scores.get(name) if run.random_init is not None else None, layer.layer),
    )  # fmt: skip


def _points_of(scores: ModelAggregate | None, layer: int) -> float | None:
    layers = scores.layers if scores is not None else ()
    return next((aggregate.points for aggregate in layers if aggregate.layer == layer), None)


def _interpretability_notes(results: Results) -> tuple[str, ...]:
    notes = [
        "Points are 100 times the Pearson correlation of a neuron's activations with those simulated from its "
        "explanation, averaged over the scored neurons of a layer; mean and population variance are over the layers' "
        "means, each rounded to 0.1 as in the paper. Intervals are by two-level bootstrap, over neurons and over the "
        "excerpts of each neuron.",
        "Spearman (100 x the correlation of ranks) and AUROC (how often an active token has a higher simulation than a "
        "silent one; 50 is chance) depend on the order of the simulated activations only.",
        "Undefined = 0 is the mean with every neuron without a score (dead, too rare, constant) counted as zero. "
        "Shuffled and random-init are the means of the controls: explanations of other neurons of the layer, and the "
        "same architecture with random weights.",
    ]
    if any(tap != "neurons" for tap in results.taps):
        notes.append(
            "Loss, parameters and FLOPs are the model's in all rows; they do not include a sparse autoencoder at "
            "another tap."
        )
    if any(run.num_layers >= 6 for run in results.rows):
        notes.append("From 6 layers on, mean and variance leave out the last layer, as in the paper.")
    return tuple(notes)
