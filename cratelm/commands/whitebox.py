"""Look inside each layer: coding rates before and after attention, sparsity, the LASSO objective, the dictionary.

    cratelm whitebox runs/crate-2l runs/gpt2-2l runs/crate-2l-random --data tokens

CRATE is derived from an objective, sparse rate reduction; this command measures it. For every layer: the coding rate of
the tokens in nats, as a whole and in the heads' subspaces, before and after attention; the sparsity of the code after
each ISTA step; the progress of the steps on the LASSO objective, and whether their size is stable for the dictionary.
Of GPT-2, only rates and sparsity. Written to whitebox.json in each run, with tables and figures in the report's folder;
`cratelm report` shows them too. To follow them during training, use `cratelm train --measure whitebox`.
"""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import CrateError, check_least
from cratelm.report.tables.form import write_tables
from cratelm.rundir import claim, origin, write_json
from cratelm.runtime import progress_bar
from cratelm.workflows.naming import report_folder, shown_path
from cratelm.workflows.opening import open_own
from cratelm.workflows.options.arguments import Device, RunPaths, SplitName, TokensTokenizer
from cratelm.workflows.printed_tables import print_tables
from cratelm.workflows.token_data import open_tokens, read_count


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm whitebox`."""

    runs: RunPaths
    """Run directories; give random-init controls along with their models."""
    data: Path
    """Token directory to read."""
    tokenizer: TokensTokenizer = None
    split: SplitName = "val"
    tokens: str = "32k"
    """Number of tokens to read, such as 32k or 1M, in whole sets."""
    epsilon: float = 0.1
    """Precision of the coding rates, in units of the tokens."""
    tolerance: float = 1e-3
    """Codes up to this value count as zero in the share within tolerance."""
    out: Path | None = None
    """Folder of tables and figures; by default `report` in the folder that contains the runs, or in a single run."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Measure each run, then write and print the tables of all runs."""
    from cratelm.report.figures.form import write_figures
    from cratelm.report.figures.whitebox import whitebox_figures
    from cratelm.report.results.whitebox import open_views
    from cratelm.report.tables.whitebox import whitebox_tables
    from cratelm.whitebox.coding_rate import EPSILON_RANGE

    least, most = EPSILON_RANGE
    if not least <= options.epsilon <= most:
        raise CrateError(f"--epsilon must be {least:g} to {most:g}, got {options.epsilon:g}")
    check_least(options, 0, "tolerance")
    count = read_count(options.tokens)
    for folder in options.runs:
        whitebox_run(folder, options, count)
    views = open_views(options.runs)
    tables = whitebox_tables(views)
    out = options.out or report_folder(options.runs)
    write_tables(tables, out)
    write_figures(whitebox_figures(views), out)
    print_tables(tables)
    print(f"\n{shown_path(out / 'whitebox.svg')}")


def whitebox_run(folder: Path, options: Options, count: int | None) -> None:
    """Measure one run and write its whitebox.json."""
    from cratelm.report.results.whitebox import WHITEBOX_FILE
    from cratelm.whitebox.measure import MeasureConfig, measure

    opened, model = open_own(folder, options.device)
    data = open_tokens(opened, options.data, options.tokenizer)
    tokens = data.tokens(options.split)
    config = MeasureConfig(
        tokens=len(tokens) if count is None else count, epsilon=options.epsilon, tolerance=options.tolerance
    )
    with claim(folder), progress_bar(f"whitebox {folder.name}", total=min(config.tokens, len(tokens))) as bar:
        measurements = measure(model, tokens, config, bar=bar)
        identity = {"model_hash": opened.model_hash, "data_hash": data.splits[options.split].sha256}
        write_json(folder / WHITEBOX_FILE, {"split": options.split, **identity, **measurements, "origin": origin()})
