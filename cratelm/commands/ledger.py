"""Account for a logit: what every neuron of the last layer contributes to it, to the last digit.

    cratelm ledger runs/crate-2l --prompt "import os, "
    cratelm ledger runs/crate-2l --prompt "import os, " --token "sys" --versus "re"

The logit of a token (left out: the most probable one) after the prompt is, under the final LayerNorm of that very
position, a sum over the neurons of the last layer and a few named terms: CRATE has the bias of the final norm alone,
GPT-2 the residual stream that goes round its neurons as well. The sum is printed with its remainder to the model's own
logit. --versus gives the difference of two tokens. A .json, a .csv and a figure, named by prompt and token, go to
`report` in the run, or to --out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from cratelm.errors import CrateError
from cratelm.runtime import DeviceName

if TYPE_CHECKING:
    from rich.console import Console

    from cratelm.steering.ledger import Ledger
    from cratelm.steering.ledger_rows import LedgerRow
    from cratelm.workflows.opening import OpenModel

EXPLAINED = 72
"""Columns of the terminal from which explanations have room."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm ledger`."""

    run: tyro.conf.Positional[Path]
    """Run directory, model directory, or a Hugging Face name."""
    prompt: str
    """Text after which the logit is; \\n in it is a line break."""
    token: str | None = None
    """Token whose logit to account for, as text or as #17; the most probable one if left out."""
    versus: str | None = None
    """Token whose logit to take away."""
    position: int = -1
    """Token of the prompt after which the logit is read; -1 is the last."""
    show: int = 10
    """Neurons to list on either side."""
    out: Path | None = None
    """Folder for numbers and the figure."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Compute, print, write."""
    import torch
    from rich.console import Console

    from cratelm.steering.ledger import ledger
    from cratelm.steering.ledger_rows import ledger_rows
    from cratelm.workflows.opening import open_model
    from cratelm.workflows.prompts import read_prompts

    if options.show < 1:
        raise CrateError(f"--show is {options.show}, it must be at least 1")
    chosen = open_model(options.run, options.device)
    tokens = chosen.prompt(read_prompts([options.prompt], None)[0])
    token = None if options.token is None else chosen.one_token(options.token)
    versus = None if options.versus is None else chosen.one_token(options.versus, "--versus")
    device = next(chosen.model.parameters()).device
    found = ledger(
        chosen.model, torch.tensor([tokens], device=device), token=token, versus=versus, position=options.position
    )
    explanations = chosen.explanations(found.layer)
    rows = ledger_rows(found.as_dict(), options.show, explanations)
    console = Console(highlight=False, markup=False, emoji=False)
    _print(console, chosen, found, rows, tokens)
    _write(console, chosen, found, rows, explanations, tokens, options.out)


def title_of(chosen: "OpenModel", found: "Ledger") -> str:
    """Which logit it is."""
    from cratelm.report.figures.steering import label

    names = [
        label(chosen.strings[one]) if one < len(chosen.strings) else f"#{one}"
        for one in (found.token, found.versus) if one is not None
    ]  # fmt: skip
    return f"logit of {' minus that of '.join(names)}"


def _print(
    console: "Console", chosen: "OpenModel", found: "Ledger", rows: Sequence["LedgerRow"], tokens: list[int]
) -> None:
    from rich.table import Table
    from rich.text import Text

    from cratelm.report.shown_text import visible

    read = chosen.tokenizer.decode(tokens[: found.position + 1])
    console.print(f"{chosen.name}, layer {found.layer}: {title_of(chosen, found)} after")
    console.print(_tail(visible(read), console.width), style="bold")
    said = console.width >= EXPLAINED and any(row.explanation for row in rows)
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, width=console.width if said else None)
    grid.add_column("", overflow="fold")
    grid.add_column("activation", justify="right", no_wrap=True)
    grid.add_column("contribution", justify="right", no_wrap=True)
    if said:
        grid.add_column("explanation", ratio=1, no_wrap=True, overflow="ellipsis")
    for row in rows:
        activation = "" if row.activation is None else f"{row.activation:.3g}"
        cells = [row.name, activation, f"{row.contribution:+.4f}", *([visible(row.explanation)] if said else [])]
        grid.add_row(*map(Text, cells))
    console.print(grid)
    console.print(
        f"sum {found.total:.6f}, the model's own logit {found.logit:.6f}, remainder {found.remainder:.1e}; "
        f"sigma {found.sigma:.4g}"
    )


def _tail(text: str, longest: int) -> str:
    return text if len(text) <= longest else "…" + text[1 - longest :]


def _write(
    console: "Console", chosen: "OpenModel", found: "Ledger", rows: Sequence["LedgerRow"],
    explanations: Mapping[int, str], tokens: list[int], asked: Path | None,
) -> None:  # fmt: skip
    from cratelm.report.figures.form import write_figures
    from cratelm.report.figures.steering import ledger_figure
    from cratelm.rundir import origin, write_json, write_text
    from cratelm.steering.ledger_rows import as_csv
    from cratelm.workflows.naming import result_name

    if (out := chosen.out(asked)) is None:
        return
    title = title_of(chosen, found)
    prompt = str(chosen.tokenizer.decode(tokens))
    settings = (chosen.name, tokens, found.token, found.versus, found.position)
    name = result_name(prompt[-30:], settings, kind="ledger")
    write_figures({name: ledger_figure(rows, f"{chosen.name}: {title}", found.total)}, out)
    described = found.as_dict()
    write_json(out / f"{name}.json", {"run": chosen.name, "prompt": prompt, **described, "origin": origin()})
    write_text(out / f"{name}.csv", as_csv(described, explanations))
    console.print(f"\n{out / name}.svg, .png, .json, .csv", soft_wrap=True)
