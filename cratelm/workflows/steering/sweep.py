"""`cratelm steer --sweep`: one change at many strengths, as a table, a figure and JSON."""

from typing import TYPE_CHECKING, Any

from cratelm.runtime import progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from cratelm.steering.effects import SweepPoint
    from cratelm.workflows.opening import OpenModel
    from cratelm.workflows.steering.changes import Changing


def sweep(
    console: "Console", chosen: "OpenModel", changing: "Changing", prompts: list[list[int]], options: Any
) -> None:
    """Try every strength that the options of `cratelm steer` name; the text is of the first prompt."""
    from cratelm.report.figures.form import write_figures
    from cratelm.report.figures.steering import sweep_figure
    from cratelm.rundir import origin, write_json
    from cratelm.steering.changes import parse_strengths
    from cratelm.steering.measure import steered_effect
    from cratelm.workflows.naming import steering_name

    assert options.sweep is not None
    strengths = parse_strengths(options.sweep)
    asked = [changing.changes(strength) for strength in strengths]  # all are refused before the first is tried
    points, rows = [], []
    with progress_bar("sweep", total=len(strengths), unit="strengths") as bar:
        for strength, changes in zip(strengths, asked, strict=True):
            steered = steered_effect(
                chosen.model, prompts, changes, changing.how, matched=changing.matched(strength), seed=options.seed
            )
            points.append(
                _point(chosen, changing, prompts[0], str(strength), strength.number, changes, steered, options)
            )
            rows.append(steered.as_dict(chosen.strings, 10))
            bar.advance(1, str(strength))
    _print(console, chosen, points)
    if (out := chosen.out(options.out)) is None:
        return
    names = ", ".join(f"{one.name}={one.how}" for one in changing.requests)
    unit = "multiples of the neuron's maximum" if strengths[0].of_maximum else "the model's own units"
    unit = "factor" if changing.requests[0].how == "scale" else unit
    figure = sweep_figure(points, chosen.strings, f"{chosen.name}: {names}", unit)
    name = steering_name("sweep", chosen, prompts, options)
    write_figures({name: figure}, out)
    found = [
        {"strength": point.strength, "text": point.text, "nats_per_token": point.nats_per_token, **row}
        for point, row in zip(points, rows, strict=True)
    ]  # fmt: skip
    prompt = chosen.tokenizer.decode(prompts[0])
    write_json(out / f"{name}.json", {"run": chosen.name, "prompt": prompt, "points": found, "origin": origin()})
    console.print(f"\n{out / name}.svg, .png, .json", soft_wrap=True)


def _point(
    chosen: "OpenModel", changing: "Changing", prompt: list[int], strength: str, value: float, changes: Any,
    steered: Any, options: Any,
) -> "SweepPoint":  # fmt: skip
    import torch

    from cratelm.steering.effects import SweepPoint
    from cratelm.steering.generate import generate
    from cratelm.steering.measure import continuation_loss

    device = next(chosen.model.parameters()).device
    how = changing.how
    tokens = generate(
        chosen.model, torch.tensor([prompt], device=device), options.tokens, changes=changes, positions=how.positions,
        coders=how.coders, keep_error=how.keep_error, temperature=options.temperature, top_k=options.top_k,
        seed=options.seed,
    )  # fmt: skip
    start = str(chosen.tokenizer.decode(prompt))
    read = tokens[:, : chosen.causal.context_length]
    return SweepPoint(
        strength=strength, value=float(value), effect=steered.effect,
        text=str(chosen.tokenizer.decode(tokens[0].tolist()))[len(start) :],
        nats_per_token=continuation_loss(chosen.model, read, len(prompt)),
    )  # fmt: skip


def _print(console: "Console", chosen: "OpenModel", points: list["SweepPoint"]) -> None:
    from rich.table import Table
    from rich.text import Text

    from cratelm.report.figures.steering import label
    from cratelm.report.shown_text import visible

    wide = console.width >= 70
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, width=console.width)
    grid.add_column("strength", justify="right", no_wrap=True)
    if wide:
        grid.add_column("moved %", justify="right", no_wrap=True)
        grid.add_column("rises most", no_wrap=True)
        grid.add_column("text, nats", justify="right", no_wrap=True)
    grid.add_column("continuation", ratio=1, overflow="fold")
    for point in points:
        top = point.effect.largest(1)
        rises = [label(chosen.strings[int(token)] if token < len(chosen.strings) else f"#{token}") for token in top]
        facts = [f"{100 * point.effect.moved:.1f}", *(rises or ["-"]), f"{point.nats_per_token:.2f}"] if wide else []
        grid.add_row(*map(Text, (point.strength, *facts, visible(point.text))))
    console.print(grid)
    console.print("text, nats: what a token of the continuation costs the unchanged model" if wide else "")
