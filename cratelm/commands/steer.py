"""Turn neurons while the model writes, and see what changes: the text, and the probabilities of the next token.

    cratelm steer runs/crate-2l --neuron 1/85=set:2x --prompt "def read_file("
    cratelm steer runs/crate-2l --neuron 1/85=silence 0/12=scale:3 --prompt "import" --positions generated
    cratelm steer runs/crate-2l --neuron 1/85=set --sweep 0x,1x,2x,5x,10x --prompt "import"

A change is LAYER/NEURON=HOW:STRENGTH. HOW is set, add, scale, clamp (0..1) or silence; a strength is a number in the
model's own units, or a multiple of the neuron's own maximum on real text (2x), for which the run needs records. The
text is written twice with the same seed, without and with the changes. Beside the effect stand controls: the same done
to a neuron that is like it, the opposite change, a random direction as long. With --sae latents of a sparse
autoencoder are changed: sae:LAYER/LATENT=HOW:STRENGTH. A .json and figures, named by prompt and settings, go to
`report` in the run, or to --out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from cratelm.errors import CrateError
from cratelm.runtime import DeviceName

if TYPE_CHECKING:
    from rich.console import Console

    from cratelm.steering.changes import Change
    from cratelm.steering.effects import Steered
    from cratelm.steering.measure import How
    from cratelm.workflows.opening import OpenModel

CONTROL_TOKENS = 10
"""The controls' `on_tokens` is over so many of the tokens that the changes raise most."""
BESIDE = 64
"""Columns of the terminal from which two texts stand side by side."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm steer`."""

    run: tyro.conf.Positional[Path]
    """Run directory, model directory, or a Hugging Face name."""
    neuron: tuple[str, ...]
    """Changes, as in 1/85=set:2x, 1/85=add:0.5, 1/85=scale:0, 1/85=clamp:0..1 or 1/85=silence; 1/85 alone is set:1x."""
    prompt: tuple[str, ...] = ()
    """Texts to continue; \\n in them is a line break."""
    prompts: Path | None = None
    """A file with a prompt on each line."""
    positions: str = "all"
    """Tokens at which to change: all, prompt, generated, or such as 0,5..7,-1 (-1: the prompt's last)."""
    after: str | None = None
    """Change only after the first occurrence of this token in the text; #17 is the id 17."""
    sweep: str | None = None
    """Strengths to try one after the other, such as 0x,1x,2x,5x; changes are then given without a strength."""
    reference: Literal["maximum", "p99.9"] = "maximum"
    """What 1x is: the neuron's maximum in the records, or the 99.9th percentile of its activations above 0."""
    sae: tuple[Path, ...] = ()
    """Sparse autoencoders whose latents are changed: names in the run, or folders that sae-lens wrote."""
    drop_error: bool = False
    """Put the autoencoder's reconstruction in the place of the activation; otherwise its error is kept."""
    tokens: int = 40
    """Tokens to add."""
    temperature: float = 0.8
    """Below 1 the probable becomes more probable; 0 is deterministic."""
    top_k: int | None = None
    """Draw only from so many of the most probable tokens."""
    seed: int = 0
    """Of the text and of the controls."""
    excerpts: int = 20
    """Measure the effect also after the peak of so many of the first neuron's top excerpts; 0 leaves that out."""
    show: int = 8
    """Tokens to list whose probability rises, and as many that falls."""
    out: Path | None = None
    """Folder for numbers and figures."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Change, print, write."""
    from rich.console import Console

    from cratelm.workflows.opening import open_model
    from cratelm.workflows.prompts import read_prompts
    from cratelm.workflows.steering.changes import open_changes

    if options.tokens < 1 or options.temperature < 0 or options.show < 1 or options.excerpts < 0:
        raise CrateError("--tokens and --show must be at least 1, --temperature and --excerpts 0 or more")
    texts = read_prompts(options.prompt, options.prompts)
    if not texts:
        raise CrateError('there is no prompt. Give some text with --prompt "..." or a file with --prompts')
    chosen = open_model(options.run, options.device)
    prompts = [chosen.prompt(text) for text in texts]
    changing = open_changes(chosen, options)
    console = Console(highlight=False, markup=False, emoji=False)
    if options.sweep is not None:
        from cratelm.workflows.steering.sweep import sweep

        sweep(console, chosen, changing, prompts, options)
        return
    _steer(console, chosen, changing, prompts, options)


def _steer(console: "Console", chosen: "OpenModel", changing: Any, prompts: list[list[int]], options: Options) -> None:
    from cratelm.report.figures.form import write_figures
    from cratelm.report.figures.steering import effect_figure
    from cratelm.rundir import origin, write_json
    from cratelm.steering.measure import steered_effect
    from cratelm.workflows.naming import steering_name

    changes, matched = changing.changes(), changing.matched()
    texts = [
        [_continue(chosen, prompt, made, changing.how, options) for made in ((), changes)] for prompt in prompts
    ]  # fmt: skip
    measured = {f"after {'the prompt' if len(prompts) == 1 else f'{len(prompts)} prompts'}": ("prompts", prompts)}
    if excerpts := changing.excerpts(options.excerpts):
        measured[f"after {len(excerpts)} top excerpts of {changing.requests[0].name}"] = ("excerpts", excerpts)
    effects = {
        name: steered_effect(chosen.model, read, changes, changing.how, matched=matched, seed=options.seed)
        for name, (_, read) in measured.items()
    }  # fmt: skip
    console.print(f"{chosen.name}: {', '.join(map(str, changes))}")
    starts = [chosen.tokenizer.decode(prompt) for prompt in prompts]
    for start, (without, turned) in zip(starts, texts, strict=True):
        _print_texts(console, start, without, turned)
    found: dict[str, Any] = {
        "run": chosen.name, "changes": [str(one) for one in changes],
        "texts": [
            {"prompt": start, "without": without, "with": turned}
            for start, (without, turned) in zip(starts, texts, strict=True)
        ],
        **_exactness(console, chosen, prompts[0], changes, changing.how),
    }  # fmt: skip
    for name, steered in effects.items():
        _print_effect(console, name, steered, chosen, options.show)
        found[measured[name][0]] = steered.as_dict(chosen.strings, CONTROL_TOKENS)
    console.print(
        f"\nmoved: the probability that went to other tokens. on its: what the {CONTROL_TOKENS} tokens gain that the "
        "changes raise most. KL: divergence from the model without changes"
        + ("" if changing.how.keep_error else "; all but the last row against the autoencoder's reconstruction")
    )
    if (out := chosen.out(options.out)) is not None:
        title = f"{chosen.name}: {', '.join(found['changes'])}"
        drawn = {name: steered.effect for name, steered in effects.items()}
        name = steering_name("steer", chosen, prompts, options)
        write_figures({name: effect_figure(drawn, chosen.strings, title)}, out)
        write_json(out / f"{name}.json", found | {"origin": origin()})
        console.print(f"\n{out / name}.svg, .png, .json", soft_wrap=True)


def _continue(chosen: "OpenModel", prompt: list[int], changes: Any, how: "How", options: Options) -> str:
    import torch

    from cratelm.steering.generate import generate

    device = next(chosen.model.parameters()).device
    tokens = generate(
        chosen.model, torch.tensor([prompt], device=device), options.tokens, changes=changes,
        positions=how.positions, coders=how.coders, keep_error=how.keep_error,
        temperature=options.temperature, top_k=options.top_k, seed=options.seed,
    )  # fmt: skip
    whole, start = tokens[0].tolist(), chosen.tokenizer.decode(prompt)
    return str(chosen.tokenizer.decode(whole))[len(start) :]


def _exactness(
    console: "Console", chosen: "OpenModel", prompt: list[int], changes: Sequence["Change"], how: "How"
) -> dict[str, Any]:
    """What a change of nothing, to the very neurons or latents that are turned, does to the prompt's logits.

    And what an autoencoder's reconstruction does to them, and to the prompt's loss.
    """
    import torch

    from cratelm.steering.generate import next_logits
    from cratelm.steering.measure import PLAIN, text_loss

    tokens = torch.tensor([prompt], device=next(chosen.model.parameters()).device)

    def logits(how: "How", changes: Sequence["Change"] = ()) -> torch.Tensor:
        return next_logits(
            chosen.model, tokens, changes=changes, positions=how.positions, coders=how.coders, keep_error=how.keep_error
        )

    nothing = [replace(one, how="add", value=0.0) for one in changes]
    base, moved = logits(how), logits(how, nothing)
    same, most = bool(torch.equal(base, moved)), float((moved - base).abs().max())
    said = "not one bit of the logits changes" if same else "the logits change"
    console.print(f"\nstrength 0: {said} (largest change {most:.2g})")
    found: dict[str, Any] = {"strength_0_is_exact": same, "strength_0_logit_change": most}
    if how.coders:
        rebuilding = replace(how, keep_error=False)
        rebuilt = float((logits(rebuilding) - logits(PLAIN)).abs().max())
        console.print(f"the autoencoder's reconstruction: largest change of a logit {rebuilt:.2g}")
        found["reconstruction_logit_change"] = rebuilt
    if how.coders and len(prompt) > 1:
        loss, with_it = text_loss(chosen.model, tokens), text_loss(chosen.model, tokens, how=rebuilding)
        console.print(f"  loss of the prompt {loss:.4f} -> {with_it:.4f} nats per token")
        found |= {"prompt_loss": loss, "prompt_loss_reconstructed": with_it}
    return found


def _print_texts(console: "Console", prompt: str, without: str, with_: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from cratelm.report.shown_text import visible

    console.print(f"\n{_tail(visible(prompt), console.width * 2)}", style="bold")
    if console.width < BESIDE:
        for head, text in (("without", without), ("with", with_)):
            console.print(f"{head}:", style="bold")
            console.print(visible(text))
        return
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, width=console.width)
    for head in ("without", "with"):
        grid.add_column(head, ratio=1, overflow="fold")
    grid.add_row(Text(visible(without)), Text(visible(with_)))
    console.print(grid)


def _tail(text: str, longest: int) -> str:
    return text if len(text) <= longest else "…" + text[1 - longest :]


def _print_effect(console: "Console", name: str, steered: "Steered", chosen: "OpenModel", show: int) -> None:
    """Tokens that rise and fall, and the controls."""
    from rich.table import Table
    from rich.text import Text

    from cratelm.report.figures.steering import label
    from cratelm.steering.effects import token_rows

    effect = steered.effect
    console.print(f"\nnext token {name}, probabilities in %, without -> with", style="bold")
    lists = []
    for decreases in (False, True):
        rows = token_rows(effect, effect.largest(show, decreases=decreases), chosen.strings)
        lists.append([(label(row["text"]), f"{_share(row['before'])} -> {_share(row['after'])}") for row in rows])
    _print_lists(console, ("more", "less"), lists)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", overflow="fold")
    for head in ("moved %", "on its %", "KL, nats"):
        table.add_column(head, justify="right")
    for row in steered.rows(CONTROL_TOKENS):
        numbers = [f"{100 * row['moved']:.2f}", f"{100 * row['on_tokens']:+.2f}", f"{row['divergence']:.2g}"]
        table.add_row(*map(Text, (row["name"], *numbers)))
    console.print(table)


def _print_lists(console: "Console", heads: tuple[str, ...], lists: list[list[tuple[str, str]]]) -> None:
    """Lists of pairs side by side, or in a narrow terminal below each other."""
    from rich.table import Table
    from rich.text import Text

    if console.width < BESIDE and len(lists) > 1:
        for head, one in zip(heads, lists, strict=True):
            _print_lists(console, (head,), [one])
        return
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head in heads:
        grid.add_column(head, no_wrap=True)
        grid.add_column("", justify="right", no_wrap=True)
    for at in range(max(map(len, lists))):
        grid.add_row(*(Text(cell) for one in lists for cell in (one[at] if at < len(one) else ("", ""))))
    console.print(grid)


def _share(probability: float) -> str:
    return f"{100 * probability:.2g}" if probability < 0.0995 else f"{100 * probability:.0f}"
