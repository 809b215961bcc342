"""`cratelm steer --sweep`: one change at many strengths, as a table, a figure and JSON."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from cratelm.report.figures.form import write_figures
from cratelm.report.figures.steering import label, sweep_figure
from cratelm.report.shown_text import visible
from cratelm.rundir import origin, write_json
from cratelm.runtime import progress_bar
from cratelm.steering.changes import parse_strengths
from cratelm.steering.effects import SweepPoint, token_text
from cratelm.steering.measure import continuation_loss, steered_effect
from cratelm.workflows.naming import steering_name
from cratelm.workflows.steering.printing import plain_table
from cratelm.workflows.steering.task import SteeringTask


def sweep(console: Console, task: SteeringTask, prompts: list[list[int]]) -> None:
    """Measure every strength of `--sweep`; the continuations are those of the first prompt."""
    opened, options, prompt = task.opened, task.options, prompts[0]
    strengths = parse_strengths(options.sweep)
    interventions = [task.intervention(strength) for strength in strengths]  # a bad one fails before the first runs
    points, values = [], []
    with progress_bar("sweep", total=len(strengths), unit="strengths") as bar:
        for strength, intervention in zip(strengths, interventions, strict=True):
            steered = steered_effect(
                opened.model, prompts, intervention, matched=task.matched(strength), seed=options.seed
            )
            tokens, text = task.continuation(prompt, intervention)
            loss = continuation_loss(opened.model, tokens[:, : opened.causal.context_length], len(prompt))
            points.append(SweepPoint(
                strength=str(strength), value=float(strength.number), effect=steered.effect, text=text,
                nats_per_token=loss,
            ))  # fmt: skip
            values.append(
                {"strength": str(strength), "text": text, "nats_per_token": loss, **steered.as_dict(opened.strings, 10)}
            )
            bar.advance(1, str(strength))
    _print(console, opened.strings, points)
    if (out := opened.out(options.out)) is None:
        return
    names = ", ".join(f"{request.name}={request.how}" for request in task.requests)
    unit = "multiples of the neuron's maximum" if strengths[0].of_maximum else "activation units"
    unit = "factor" if task.requests[0].how == "scale" else unit
    name = steering_name("sweep", opened, prompts, options)
    write_figures({name: sweep_figure(points, opened.strings, f"{opened.name}: {names}", unit)}, out)
    result = {"run": opened.name, "prompt": opened.tokenizer.decode(prompt), "points": values, "origin": origin()}
    write_json(out / f"{name}.json", result)
    console.print(f"\n{out / name}.svg, .png, .json", soft_wrap=True)


def _print(console: Console, strings: Sequence[str], points: list[SweepPoint]) -> None:

    wide = console.width >= 70
    grid = plain_table(console.width)
    grid.add_column("strength", justify="right", no_wrap=True)
    if wide:
        grid.add_column("moved %", justify="right", no_wrap=True)
        grid.add_column("top rise", no_wrap=True)
        grid.add_column("loss, nats", justify="right", no_wrap=True)
    grid.add_column("continuation", ratio=1, overflow="fold")
    for point in points:
        rises = [label(token_text(int(token), strings)) for token in point.effect.largest(1)] or ["-"]
        numbers = [f"{100 * point.effect.moved:.1f}", *rises, f"{point.nats_per_token:.2f}"] if wide else []
        grid.add_row(*map(Text, (point.strength, *numbers, visible(point.text))))
    console.print(grid)
    if wide:
        console.print("loss: mean loss of the continuation's tokens under the unchanged model")
