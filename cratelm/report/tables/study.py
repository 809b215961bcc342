"""The tables of a study: means over seeds, and differences between variants."""

from collections.abc import Iterator

from cratelm.report.results.study import Estimate, Study, display_variant, over_seeds
from cratelm.report.tables.form import Cell, Column, Table

GROUPS = (
    Column("Model"), Column("Quantity"), Column("Mean over seeds", "0.001"), Column("Low", "0.001"),
    Column("High", "0.001"), Column("Seeds", "count"), Column("Layers", "count"), Column("Parameters", "human"),
    Column("FLOPs", "human", "per token"),
)  # fmt: skip
DIFFERENCES = (
    Column("Model"), Column("Minus"), Column("At equal"), Column("Quantity"), Column("Difference", "0.001"),
    Column("Low", "0.001"), Column("High", "0.001"), Column("Seeds", "count"),
)  # fmt: skip


def study_tables(study: Study | None) -> tuple[Table, ...]:
    """Means by group and quantity, and differences; empty without a study."""
    if study is None:
        return ()
    seeds = Table(
        name="seeds", caption="Means over seeds", columns=GROUPS, rows=tuple(_group_rows(study)),
        notes=(
            "Scores in points, variance over layers in points², loss in nats per token. Low and High are the 95 % "
            "interval of the mean over seeds (Student's t): the variation between trainings of the same model.",
        ),
    )  # fmt: skip
    differences = Table(
        name="differences", caption="Differences, seed by seed", columns=DIFFERENCES,
        rows=tuple(_difference_rows(study)),
        notes=(
            "Seeds are paired: the same seed means the same order of the data. At equal parameters or FLOPs the other "
            "variant is interpolated between its sizes; a dash means that this cost is outside the range of its sizes, "
            "and a comparison without any value has no row. Low and High are the 95 % interval over seeds (Student's "
            "t); a single seed has no interval.",
        ),
    )  # fmt: skip
    return seeds, differences


def _group_rows(study: Study) -> Iterator[tuple[Cell, ...]]:
    for group in study.groups:
        cost = (group.num_layers, group.parameters, group.flops_per_token)
        for name, quantity in study.quantities.items():
            if (mean := over_seeds(group, quantity)) is not None:
                yield (group.title, name, *_cells(mean), *cost)


def _difference_rows(study: Study) -> Iterator[tuple[Cell, ...]]:
    for difference in study.differences:
        names = (difference.group.title, display_variant(difference.other), difference.basis, difference.quantity)
        yield (*names, *_cells(difference.estimate))


def _cells(mean: Estimate | None) -> tuple[Cell, ...]:
    return (None, None, None, 0) if mean is None else (mean.mean, *(mean.interval or (None, None)), mean.seeds)
