"""Steer neurons and measure what changes: the generated text, and the probabilities of the next token.

    cratelm steer runs/crate-2l --neuron 1/85=set:2x --prompt "def read_file("
    cratelm steer runs/crate-2l --neuron 1/85=silence 0/12=scale:3 --prompt "import" --positions generated
    cratelm steer runs/crate-2l --neuron 1/85=set --sweep 0x,1x,2x,5x,10x --prompt "import"

A change is LAYER/NEURON=HOW:STRENGTH. HOW is set, add, scale, clamp (0..1) or silence. A strength is an activation
(0.5) or a multiple of the neuron's maximum on real text (2x), which needs records in the run. Each prompt is continued
twice with the same seed, without and with the changes. The effect on the next token is compared with controls: the same
changes to a similar neuron, the opposite changes, and random directions of the same length. --sae steers latents of a
sparse autoencoder: sae:LAYER/LATENT=HOW:STRENGTH. A .json file and figures, named by prompt and settings, go to
`report` in the run, or to --out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.console import Console
from rich.text import Text

from cratelm.errors import CrateError, check_least
from cratelm.report.shown_text import visible
from cratelm.rundir import origin, write_json
from cratelm.workflows.naming import steering_name
from cratelm.workflows.opening import OpenModel, open_model
from cratelm.workflows.options.arguments import Device, RunPath
from cratelm.workflows.prompts import read_prompts
from cratelm.workflows.steering.printing import plain_console, plain_table, tail

if TYPE_CHECKING:
    from cratelm.steering.effects import Steered
    from cratelm.steering.intervention import Intervention
    from cratelm.workflows.steering.task import SteeringTask

CONTROL_TOKENS = 10
"""`on_tokens` sums over this many of the tokens that the changes raise most."""
TWO_COLUMNS = 64
"""Narrowest terminal in which two texts are printed side by side, in columns."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm steer`."""

    BASIC: ClassVar = ("neuron", "prompt", "positions", "sweep", "sae", "tokens", "temperature", "out", "device")
    """The options that `--help` shows; `--help-all` shows all."""
    run: RunPath
    """Run directory, model directory, or a Hugging Face name."""
    neuron: tuple[str, ...]
    """Changes: 1/85=set:2x, 1/85=add:0.5, 1/85=scale:0, 1/85=clamp:0..1 or 1/85=silence. 1/85 alone is set:1x."""
    prompt: tuple[str, ...] = ()
    """Texts to continue; \\n in them is a line break."""
    prompts: Path | None = None
    """Text file with a prompt on each line."""
    positions: str = "all"
    """Tokens to change: all, prompt, generated, or positions such as 0,5..7,-1 (-1: the prompt's last token)."""
    after: str | None = None
    """Change only tokens after the first occurrence of this token; #17 is token id 17."""
    sweep: str | None = None
    """Strengths to measure one after the other, such as 0x,1x,2x,5x; --neuron then has no strength."""
    reference: Literal["maximum", "p99.9"] = "maximum"
    """Meaning of 1x: the neuron's maximum in the records, or the 99.9th percentile of its activations above 0, which
    depends less on a single token."""
    sae: tuple[Path, ...] = ()
    """Sparse autoencoders whose latents to steer: names in the run, or folders in the format of sae-lens."""
    drop_error: bool = False
    """Replace the activation by the autoencoder's reconstruction, instead of keeping its error."""
    tokens: int = 40
    """Tokens to generate."""
    temperature: float = 0.8
    """Sampling temperature; 0 always takes the most probable token."""
    top_k: int | None = None
    """Sample only from this many of the most probable tokens."""
    seed: int = 0
    """Seed of the texts and of the controls."""
    excerpts: int = 20
    """Also measure the effect after the peaks of this many top excerpts of the first neuron; 0 skips it."""
    show: int = 8
    """Tokens to list whose probability rises, and the same number whose probability falls."""
    out: Path | None = None
    """Folder for numbers and figures; by default `report` in the run."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Steer, print, write."""
    from cratelm.workflows.steering.sweep import sweep
    from cratelm.workflows.steering.task import open_task

    check_least(options, 1, "tokens", "show")
    check_least(options, 0, "temperature", "excerpts")
    texts = read_prompts(options.prompt, options.prompts)
    if not texts:
        raise CrateError('no prompt was given. Use --prompt "..." or --prompts FILE')
    opened = open_model(options.run, options.device)
    prompts = [opened.prompt(text) for text in texts]
    task = open_task(opened, options)
    if options.sweep is not None:
        sweep(plain_console(), task, prompts)
        return
    _steer(plain_console(), task, prompts)


def _steer(console: Console, task: "SteeringTask", prompts: list[list[int]]) -> None:
    from cratelm.report.figures.form import write_figures
    from cratelm.report.figures.steering import effect_figure
    from cratelm.steering.measure import steered_effect

    opened, options = task.opened, task.options
    intervention, matched = task.intervention(), task.matched()
    texts = [
        {
            "prompt": str(opened.tokenizer.decode(prompt)), "without": task.continuation(prompt, task.setting)[1],
            "with": task.continuation(prompt, intervention)[1],
        }
        for prompt in prompts
    ]  # fmt: skip
    measured = {"prompts": (f"after {'the prompt' if len(prompts) == 1 else f'{len(prompts)} prompts'}", prompts)}
    if excerpts := task.excerpts(options.excerpts):
        measured["excerpts"] = (f"after {len(excerpts)} top excerpts of {task.requests[0].name}", excerpts)
    effects = {
        key: steered_effect(opened.model, read, intervention, matched=matched, seed=options.seed)
        for key, (_, read) in measured.items()
    }
    console.print(f"{opened.name}: {intervention}")
    for text in texts:
        _print_texts(console, text["prompt"], text["without"], text["with"])
    changes = list(map(str, intervention.changes))
    result: dict[str, Any] = {"run": opened.name, "changes": changes, "texts": texts}
    result |= _exactness(console, opened, prompts[0], intervention)
    for key, steered in effects.items():
        _print_effect(console, measured[key][0], steered, opened.strings, options.show)
        result[key] = steered.as_dict(opened.strings, CONTROL_TOKENS)
    console.print(
        f"\nmoved: probability that moved to other tokens. top {CONTROL_TOKENS}: change of the {CONTROL_TOKENS} tokens "
        "that the changes raise most. KL: divergence from the model without changes"
        + ("" if intervention.keep_error else "; all rows but the last relative to the autoencoder's reconstruction")
    )
    if (out := opened.out(options.out)) is not None:
        name = steering_name("steer", opened, prompts, options)
        panels = {measured[key][0]: steered.effect for key, steered in effects.items()}
        write_figures({name: effect_figure(panels, opened.strings, f"{opened.name}: {intervention}")}, out)
        write_json(out / f"{name}.json", result | {"origin": origin()})
        console.print(f"\n{out / name}.svg, .png, .json", soft_wrap=True)


def _exactness(console: Console, opened: OpenModel, prompt: list[int], intervention: "Intervention") -> dict[str, Any]:
    """Largest change of the prompt's logits when the same neurons or latents are changed with strength 0.

    With autoencoders also the change that their reconstruction makes, to the logits and to the prompt's loss.
    """
    import torch

    from cratelm.steering.generate import next_logits
    from cratelm.steering.measure import text_loss

    tokens = torch.tensor([prompt], device=next(opened.model.parameters()).device)
    setting = replace(intervention, changes=())
    strength_0 = replace(
        intervention, changes=[replace(change, how="add", value=0.0) for change in intervention.changes]
    )
    logits, same_logits = (next_logits(opened.model, tokens, side) for side in (setting, strength_0))
    exact, largest = bool(torch.equal(logits, same_logits)), float((same_logits - logits).abs().max())
    console.print(f"\nstrength 0: the logits {'are identical' if exact else 'change'} (largest change {largest:.2g})")
    result: dict[str, Any] = {"strength_0_is_exact": exact, "strength_0_logit_change": largest}
    if intervention.coders:
        reconstructed = replace(setting, keep_error=False)
        change = next_logits(opened.model, tokens, reconstructed) - next_logits(opened.model, tokens)
        result["reconstruction_logit_change"] = float(change.abs().max())
        console.print(f"autoencoder reconstruction: largest change of a logit {float(change.abs().max()):.2g}")
        if len(prompt) > 1:
            before, after = text_loss(opened.model, tokens), text_loss(opened.model, tokens, reconstructed)
            console.print(f"  loss of the prompt {before:.4f} -> {after:.4f} nats per token")
            result |= {"prompt_loss": before, "prompt_loss_reconstructed": after}
    return result


def _print_texts(console: Console, prompt: str, without: str, steered: str) -> None:
    console.print(f"\n{tail(visible(prompt), console.width * 2)}", style="bold")
    if console.width < TWO_COLUMNS:
        for head, text in (("without", without), ("with", steered)):
            console.print(f"{head}:", style="bold")
            console.print(visible(text))
        return
    table = plain_table(console.width)
    for head in ("without", "with"):
        table.add_column(head, ratio=1, overflow="fold")
    table.add_row(Text(visible(without)), Text(visible(steered)))
    console.print(table)


def _print_effect(console: Console, name: str, steered: "Steered", strings: Sequence[str], show: int) -> None:
    """Tokens that rise and fall, and the controls."""

    from cratelm.report.figures.steering import label
    from cratelm.steering.effects import token_rows

    effect = steered.effect
    console.print(f"\nnext token {name}, probabilities in %, without -> with", style="bold")
    lists = {}
    for head, decreases in (("more", False), ("less", True)):
        rows = token_rows(effect, effect.largest(show, decreases=decreases), strings)
        lists[head] = [(label(row["text"]), f"{_percent(row['before'])} -> {_percent(row['after'])}") for row in rows]
    _print_lists(console, lists)
    table = plain_table()
    table.add_column("", overflow="fold")
    for head in ("moved %", f"top {CONTROL_TOKENS} %", "KL, nats"):
        table.add_column(head, justify="right")
    for row in steered.rows(CONTROL_TOKENS):
        numbers = [f"{100 * row['moved']:.2f}", f"{100 * row['on_tokens']:+.2f}", f"{row['divergence']:.2g}"]
        table.add_row(*map(Text, (row["name"], *numbers)))
    console.print(table)


def _print_lists(console: Console, lists: dict[str, list[tuple[str, str]]]) -> None:
    """Lists of pairs side by side; one below the other in a narrow terminal."""
    if console.width < TWO_COLUMNS and len(lists) > 1:
        for head, pairs in lists.items():
            _print_lists(console, {head: pairs})
        return
    table = plain_table()
    for head in lists:
        table.add_column(head, no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    for cells in zip_longest(*lists.values(), fillvalue=("", "")):
        table.add_row(*(Text(cell) for pair in cells for cell in pair))
    console.print(table)


def _percent(probability: float) -> str:
    return f"{100 * probability:.2g}" if probability < 0.0995 else f"{100 * probability:.0f}"
