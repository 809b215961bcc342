"""Vary sparsity at run time: the penalty, step size or number of ISTA steps of a trained model, nothing retrained.

    cratelm dial runs/crate-2l runs/gpt2-2l --data tokens
    cratelm dial runs/crate-2l --data tokens --penalty 1 2 4 8 --steps 1 2 3 --step-size --threshold

Penalty and step size are multiples of the model's values, so 1 is the unchanged model. A threshold, also for GPT-2,
sets activations to 0 that are below a multiple of the root mean square of their layer. Measured at every point: active
neurons per token, held-out loss, and the lookup score of some neurons of every layer. Points are added to dial.json in
each run one by one, so a stopped command resumes and earlier points stay; figures go to the report's folder.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cratelm.errors import CrateError
from cratelm.report.tables.form import write_tables
from cratelm.rundir import claim, origin, read_json, write_json
from cratelm.runtime import progress_bar
from cratelm.workflows.naming import report_folder, shown_path
from cratelm.workflows.opening import open_own
from cratelm.workflows.options.arguments import Device, RunPaths
from cratelm.workflows.printed_tables import print_tables
from cratelm.workflows.token_data import open_tokens, read_count

if TYPE_CHECKING:
    from cratelm.data.tokens import TokenDirectory
    from cratelm.model.language_model import LanguageModel
    from cratelm.training.train import Measurement
    from cratelm.whitebox.dial import Setting

_FILE = "dial.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm dial`."""

    runs: RunPaths
    """Run directories."""
    data: Path
    """Token directory to read."""
    penalty: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    """Multiples of the model's penalty."""
    step_size: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5)
    """Multiples of the model's step size."""
    steps: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of ISTA steps."""
    threshold: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    """Thresholds on the activations, in units of their root mean square."""
    tokens: str = "64k"
    """Held-out tokens for the loss; points with another number of tokens are kept."""
    loss_only: bool = False
    """Skip the lookup scores, which take most of the time."""
    out: Path | None = None
    """Folder of tables and figures; by default `report` in the folder that contains the runs, or in a single run."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Measure each run at every setting, then draw the curves and print them."""
    from cratelm.report.figures.dial import dial_figures
    from cratelm.report.figures.form import write_figures
    from cratelm.report.results.dial import open_dials
    from cratelm.report.tables.dial import dial_table

    settings = list(_settings(options))
    for folder in options.runs:
        dial_run(folder, settings, options)
    dials = open_dials(options.runs)
    table, out = dial_table(dials), options.out or report_folder(options.runs)
    write_tables((table,), out)
    write_figures(dial_figures(dials), out)
    print_tables((table,))
    print(shown_path(out / "dial.svg"))


def _settings(options: Options) -> "Iterator[tuple[str, Setting]]":
    """Pairs of a dial and its setting, all checked before anything is computed."""
    from cratelm.whitebox.dial import Setting

    for dial in ("penalty", "step_size", "steps", "threshold"):
        for value in getattr(options, dial):
            yield dial, Setting(**{dial: value})


def dial_run(folder: Path, settings: "list[tuple[str, Setting]]", options: Options) -> None:
    """Measure one run at the settings that apply to it and are not measured yet."""
    from cratelm.workflows.measurements import lookup

    opened, model = open_own(folder, options.device)
    data = open_tokens(opened, options.data)
    ista = model.config.arch == "crate"
    settings = [(dial, setting) for dial, setting in settings if ista or dial == "threshold"]
    if not settings:
        raise CrateError(f"{folder} has no ISTA block. Use --threshold, the only dial of a GPT-2")
    held_out = data.tokens("val")
    count = min(read_count(options.tokens) or len(held_out), len(held_out))
    identity = {"model_hash": opened.model_hash, "data_hash": data.splits["val"].sha256}
    points = _measured(folder, identity)
    measure = None if options.loss_only else lookup(data)
    with claim(folder), progress_bar(f"dial {folder.name}", total=len(settings), unit="points") as bar:
        for dial, setting in settings:
            same = [point for point in points if _same(point, dial, setting, count)]
            if not any(point["with_lookup"] or options.loss_only for point in same):
                points = [point for point in points if point not in same]  # those have the loss alone
                points.append({
                    "dial": dial, **asdict(setting), "tokens": count, "with_lookup": not options.loss_only,
                    **_point(model, data, setting, count, measure),
                })  # fmt: skip
                write_json(folder / _FILE, {**identity, "width": model.config.num_neurons,
                                           "points": points, "origin": origin()})  # fmt: skip
            bar.advance(1, dial)
    if not (folder / _FILE).exists():
        read_json(folder / _FILE, made_by=f"cratelm dial {folder} --data {options.data}")


def _same(point: Mapping[str, Any], dial: str, setting: "Setting", tokens: int) -> bool:
    """Whether a point has this setting and number of tokens."""
    expected = {"dial": dial, "tokens": tokens, **asdict(setting)}
    return all(point[name] == value for name, value in expected.items())


def _measured(folder: Path, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of earlier commands. Raises CrateError if they are of another model or text, to keep them."""
    if not (folder / _FILE).exists():
        return []
    measured = read_json(folder / _FILE, made_by=f"cratelm dial {folder} --data DIR")
    if different := [name for name, value in identity.items() if measured.get(name) != value]:
        raise CrateError(
            f"{folder / _FILE} is of another model or text ({', '.join(different)} differ). Move or remove it, then "
            "run the same command"
        )
    points: list[dict[str, Any]] = measured["points"]
    return points


def _point(
    model: "LanguageModel", data: "TokenDirectory", setting: "Setting", count: int, measure: "Measurement | None"
) -> dict[str, Any]:
    """Measure the model at one setting; if the loss is not finite, loss and lookup scores are null."""

    from cratelm.training.evaluate import held_out_loss
    from cratelm.whitebox.dial import activation_scales, active_neurons, dialled

    held_out = data.tokens("val")[: count + 1]
    sample = held_out[: 16 * model.config.context_length]
    scales = activation_scales(model, sample) if setting.threshold > 0 else None
    with dialled(model, setting, scales=scales):
        loss = held_out_loss(model, held_out, batch=8)
        finite = math.isfinite(loss)
        active = active_neurons(model, sample) if finite else None
        scores: Mapping[str, float] = measure(model, 0) if measure is not None and finite else {}
    return {"loss": loss if finite else None, "active": active, "lookup": dict(scores)}
