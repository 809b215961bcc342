"""Decompose a logit into contributions of the last layer's neurons.

    cratelm ledger runs/crate-2l --prompt "import os, "
    cratelm ledger runs/crate-2l --prompt "import os, " --token "sys" --versus "re"

At one position the final norm divides by a known number, so a token's logit is a sum over the last layer's neurons and
a few named terms: the bias of the final norm, and in GPT-2 the residual stream that bypasses the neurons. The sum is
printed with its remainder to the logit that the model computes. --versus decomposes the difference of two logits.
A .json, a .csv and a figure, named by prompt and token, go to `report` in the run, or to --out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from cratelm.errors import check_least
from cratelm.report.shown_text import visible
from cratelm.rundir import origin, write_json, write_text
from cratelm.steering.ledger_rows import LedgerRow, ledger_csv, ledger_rows
from cratelm.workflows.naming import result_name
from cratelm.workflows.opening import OpenModel, open_model
from cratelm.workflows.options.arguments import Device, RunPath
from cratelm.workflows.prompts import read_prompts
from cratelm.workflows.steering.printing import plain_console, plain_table, tail

if TYPE_CHECKING:
    from cratelm.steering.ledger import Ledger

EXPLAINED = 72
"""Narrowest terminal, in columns, in which explanations are printed."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm ledger`."""

    run: RunPath
    """Run directory, model directory, or a Hugging Face name."""
    prompt: str
    """Text that the model reads; \\n in it is a line break."""
    token: str | None = None
    """Token whose logit to decompose, as text or as #17 (token id); by default the most probable one."""
    versus: str | None = None
    """Token whose logit to subtract."""
    position: int = -1
    """Position in the prompt whose next-token logit to decompose; -1 is the last token."""
    show: int = 10
    """Positive and negative neurons to list, each."""
    out: Path | None = None
    """Folder for numbers and the figure; by default `report` in the run."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Compute, print, write."""
    import torch

    from cratelm.steering.ledger import ledger

    check_least(options, 1, "show")
    opened = open_model(options.run, options.device)
    tokens = opened.prompt(read_prompts([options.prompt], None)[0])
    token = None if options.token is None else opened.one_token(options.token)
    versus = None if options.versus is None else opened.one_token(options.versus, "--versus")
    device = next(opened.model.parameters()).device
    result = ledger(
        opened.model, torch.tensor([tokens], device=device), token=token, versus=versus, position=options.position
    )
    explanations = opened.explanations(result.layer)
    rows = ledger_rows(result.as_dict(), options.show, explanations)
    console = plain_console()
    _print(console, opened, result, rows, tokens)
    if (out := opened.out(options.out)) is not None:
        _write(console, opened, result, rows, explanations, tokens, out)


def title_of(opened: OpenModel, ledger: "Ledger") -> str:
    """Name of the logit."""
    from cratelm.report.figures.steering import label
    from cratelm.steering.effects import token_text

    tokens = [token for token in (ledger.token, ledger.versus) if token is not None]
    return "logit of " + " minus that of ".join(label(token_text(token, opened.strings)) for token in tokens)


def _print(console: Console, opened: OpenModel, ledger: "Ledger", rows: Sequence[LedgerRow], tokens: list[int]) -> None:
    console.print(f"{opened.name}, layer {ledger.layer}: {title_of(opened, ledger)} after")
    console.print(tail(visible(opened.tokenizer.decode(tokens[: ledger.position + 1])), console.width), style="bold")
    explained = console.width >= EXPLAINED and any(row.explanation for row in rows)
    table = plain_table(console.width if explained else None)
    table.add_column("", overflow="fold")
    table.add_column("activation", justify="right", no_wrap=True)
    table.add_column("contribution", justify="right", no_wrap=True)
    if explained:
        table.add_column("explanation", ratio=1, no_wrap=True, overflow="ellipsis")
    for row in rows:
        activation = "" if row.activation is None else f"{row.activation:.3g}"
        cells = [row.name, activation, f"{row.contribution:+.4f}", *([visible(row.explanation)] if explained else [])]
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print(
        f"sum {ledger.total:.6f}, the model's own logit {ledger.logit:.6f}, remainder {ledger.remainder:.1e}; "
        f"sigma {ledger.sigma:.4g}"
    )


def _write(
    console: Console, opened: OpenModel, ledger: "Ledger", rows: Sequence[LedgerRow],
    explanations: Mapping[int, str], tokens: list[int], out: Path,
) -> None:  # fmt: skip
    from cratelm.report.figures.form import write_figures
    from cratelm.report.figures.steering import ledger_figure

    prompt = str(opened.tokenizer.decode(tokens))
    settings = (opened.name, tokens, ledger.token, ledger.versus, ledger.position)
    name = result_name(prompt[-30:], settings, kind="ledger")
    write_figures({name: ledger_figure(rows, f"{opened.name}: {title_of(opened, ledger)}", ledger.total)}, out)
    values = ledger.as_dict()
    write_json(out / f"{name}.json", {"run": opened.name, "prompt": prompt, **values, "origin": origin()})
    write_text(out / f"{name}.csv", ledger_csv(values, explanations))
    console.print(f"\n{out / name}.svg, .png, .json, .csv", soft_wrap=True)
