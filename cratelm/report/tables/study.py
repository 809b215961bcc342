"""The tables of a study: means over seeds, and differences between variants."""

from cratelm.report.results.study import Study, display_variant, over_seeds
from cratelm.report.tables.form import Column, Table


def study_tables(study: Study | None) -> tuple[Table, ...]:
    """One row per group and quantity, and one per difference; nothing where there is no study."""
    return () if study is None else (_groups_table(study), _differences_table(study))


def _groups_table(study: Study) -> Table:
    columns = (
        Column("Model"), Column("Quantity"), Column("Mean over seeds", "0.001"), Column("Low", "0.001"),
        Column("High", "0.001"), Column("Seeds", "count"), Column("Layers", "count"), Column("Parameters", "human"),
        Column("FLOPs", "human", "per token"),
    )  # fmt: skip
    rows = []
    for group in study.groups:
        cost = (group.num_layers, group.parameters, group.flops_per_token)
        for name, of in study.quantities.items():
            if (found := over_seeds(group, of)) is not None:
                rows.append((group.title, name, found.mean, found.low, found.high, found.seeds, *cost))
    return Table(
        name="seeds", caption="Means over seeds", columns=columns, rows=tuple(rows),
        notes=(
            "Scores in points, variance over layers in points², loss in nats per token. Low and High are the 95 % "
            "interval of the mean over seeds (Student's t): what another training of the same model would change.",
        ),
    )  # fmt: skip


def _differences_table(study: Study) -> Table:
    columns = (
        Column("Model"), Column("Minus"), Column("At equal"), Column("Quantity"), Column("Difference", "0.001"),
        Column("Low", "0.001"), Column("High", "0.001"), Column("Seeds", "count"),
    )  # fmt: skip
    rows = []
    for one in study.differences:
        numbers = (None, None, None, 0)
        if one.found is not None:
            numbers = (one.found.mean, one.found.low, one.found.high, one.found.seeds)  # type: ignore[assignment]
        rows.append((one.group.title, display_variant(one.other), one.basis, one.quantity, *numbers))
    return Table(
        name="differences", caption="Differences, seed by seed", columns=columns, rows=tuple(rows),
        notes=(
            "Seeds are paired: the same seed means the same order of the data. At equal parameters or FLOPs the other "
            "side is interpolated between its sizes; a dash says that none of its sizes reaches that cost, and where "
            "no size has an answer there is no row. Low and High are the 95 % interval over seeds (Student's t); one "
            "seed has none.",
        ),
    )  # fmt: skip
