"""Make the neurons of a model browsable: one command from a model and texts to a page.

    cratelm explore HuggingFaceTB/SmolLM2-135M
    cratelm explore EleutherAI/pythia-70m my-texts/ --minutes 5
    cratelm explore runs/demo/crate-2l notes.md --llm http://localhost:8000/v1 --neurons 40

Tokenizes the texts with the model's tokenizer (without TEXT, the library of the running Python), records every neuron
on as many tokens as fit into --minutes, explains and scores by lookup, reads each neuron's direction in the weights,
writes the neuron browser and opens it. With --llm a language model also explains a sample of the neurons.

Each step is a command, which is printed. Stopped and started again, it resumes.
"""

import shlex
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import tyro
from rich.markup import escape

from cratelm.errors import CrateError, check_least
from cratelm.rundir import differing_fields, read_json, write_json
from cratelm.runtime import DeviceName, console
from cratelm.workflows.next_command import explored_run
from cratelm.workflows.options.arguments import Device
from cratelm.workflows.options.language_model import Name, Where
from cratelm.workflows.token_data import read_count

if TYPE_CHECKING:
    from cratelm.workflows.opening import OpenModel

SPLIT = "train"
"""All text: nothing is held out, because the model was not trained here."""
COLLECTING = 0.75
"""Share of --minutes for the forward passes; scores and pages take the rest."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm explore`."""

    BASIC: ClassVar = ("out", "minutes", "layer", "llm", "neurons", "dry_run", "device", "no_open")
    """The options that `--help` shows; `--help-all` shows all."""
    model: tyro.conf.Positional[Path]
    """A Hugging Face directory or name, or a run directory."""
    text: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")] = (
        "stdlib",
    )
    """Files, folders or hf:DATASET, as for `cratelm tokenize`; by default the library of the running Python."""
    out: Path | None = None
    """Run directory to create or resume. Default: runs/NAME; a run keeps its own."""
    minutes: float = 20.0
    """About how long everything may take without --llm. More minutes read more text."""
    tokens: Annotated[str, tyro.conf.arg(metavar="N", help_behavior_hint="")] = ""
    """Read about N tokens, such as 200k or 8.2M, whatever that takes."""
    layer: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...", help_behavior_hint="")] = ()
    """Zero-based layers; by default all."""
    llm: Where = ""
    """Language model that also explains: the URL of a server, or a Hugging Face directory or name."""
    llm_model: Name = ""
    """Name of the language model on the server; required if the server has several."""
    neurons: Annotated[str, tyro.conf.arg(metavar="N|I-J,...")] = "20"
    """With --llm: neurons of each layer to explain, as for `cratelm interpret`."""
    dry_run: bool = False
    """Measure this machine, print the commands, tokens and time, then stop."""
    device: Device = "auto"
    force: bool = False
    """Continue with a Hugging Face model that predicts the text worse than token frequencies do."""
    no_open: bool = False
    """Write the browser without opening it."""


def run(options: Options) -> None:
    """Run every step that is not done yet, then open the browser."""
    from cratelm.workflows.opening import describe, open_model

    check_least(options, 0, "minutes")
    if options.minutes == 0:
        raise CrateError("--minutes must be above 0, got 0")
    _, is_run = describe(options.model)
    if is_run and options.out is not None:
        raise CrateError(f"--out must be left out for a run, which holds its results, got {options.model}")
    home = explored_run(options)
    opened = open_model(options.model, options.device)
    tokenizer = options.model / "model" if (options.model / "model").is_dir() else options.model
    _print_step("tokenize", *options.text, "--tokenizer", tokenizer, "--held-out", 0, "--out", home / "tokens")
    _tokenize(opened, options.text, home / "tokens")
    tokens = read_count(options.tokens) if options.tokens else _tokens_within(opened, options, home)
    del opened  # each step opens the model itself, so that it can be run alone
    for words, do in _steps(options, home, tokens, is_run=is_run):
        _print_step(*words)
        if not options.dry_run:
            do()
    if options.dry_run:
        console.print("nothing recorded (--dry-run)")
        return
    if not options.no_open:
        webbrowser.open((home / "site" / "index.html").resolve().as_uri())


Step = tuple[list[Any], Callable[[], object]]
"""The words of a command, and a function that does the same."""


def _steps(options: Options, home: Path, tokens: int | None, *, is_run: bool) -> list[Step]:
    """What follows the tokens, in order."""
    from cratelm.commands import collect, interpret, report
    from cratelm.workflows.options.language_model import Explaining

    collecting = collect.Options(
        runs=(options.model,), data=home / "tokens", out=None if is_run else home, split=SPLIT, layer=options.layer,
        tokens="all" if tokens is None else str(tokens), device=options.device, force=options.force,
    )  # fmt: skip
    layers = ["--layer", *options.layer] if options.layer else []
    to_collect: list[Any] = ["collect", options.model, "--data", home / "tokens", "--split", SPLIT, *layers]
    to_collect += [
        "--tokens",
        collecting.tokens,
        *([] if is_run else ["--out", home]),
        *(["--force"] if options.force else []),
    ]
    by_lookup = interpret.Options(runs=(home,), layer=options.layer, controls=("shuffled",))
    steps: list[Step] = [
        (to_collect, lambda: collect.run(collecting)),
        (
            ["interpret", home, *layers, "--controls", "shuffled"],
            lambda: interpret.run(by_lookup),
        ),
    ]
    if options.llm:
        named = ["--model", options.llm_model] if options.llm_model else []
        explaining = Explaining(
            llm=options.llm, model=options.llm_model, neurons=options.neurons, device=options.device
        )
        asking = replace(by_lookup, protocol=("top-and-random",), explaining=explaining, skip_lookup=True)
        words = ["interpret", home, *layers, "--controls", "shuffled", "--protocol", "top-and-random", "--skip-lookup"]
        words += ["--llm", options.llm, *named, "--neurons", options.neurons]
        steps.append((words, lambda: interpret.run(asking)))
    return [
        *steps,
        (["directions", home], lambda: _write_directions(home, options.device)),
        (["report", home, "--site"], lambda: report.run(report.Options(runs=(home,), site=True))),
    ]


def _write_directions(home: Path, device: DeviceName) -> None:
    """Read the directions; a model whose parts are not recognised is browsed without them."""
    from cratelm.commands import directions

    try:
        directions.run(directions.Options(runs=(home,), device=device))
    except CrateError as error:
        console.print(f"continuing without directions: {error}")


def _tokenize(opened: "OpenModel", text: tuple[str, ...], out: Path) -> None:
    from cratelm.data.tokens import tokenize

    data = tokenize(text, out, opened.tokenizer, held_out=0.0, known_end=opened.causal.special.end)
    split = data.splits[SPLIT]
    console.print(f"{split.documents:,} documents, {split.tokens:,} tokens in {out}", soft_wrap=True)


def _tokens_within(opened: "OpenModel", options: Options, home: Path) -> int | None:
    """How many tokens fit into the time; None for all of them. A resumed command reads the stored number."""
    from cratelm.activations.forecast import fewest_tokens, forecast_collection
    from cratelm.activations.observe import observe
    from cratelm.activations.plan import CollectConfig
    from cratelm.workflows.token_data import open_corpus, row_beginning

    path, wanted = home / "explore.json", {"minutes": options.minutes, "layer": list(options.layer)}
    if path.exists():
        before = read_json(path, made_by=f"cratelm explore {options.model}")
        if different := differing_fields({name: before.get(name) for name in wanted}, wanted):
            raise CrateError(
                f"{home} was explored with other settings ({different}). Hint: use those, another --out, or remove "
                f"{path} and {home / 'records'}"
            )
        return cast("int | None", before["tokens"])
    corpus, _ = open_corpus(opened, home / "tokens", SPLIT)
    subject = observe(
        opened.model, model_hash=opened.model_hash, layers=options.layer, row_beginning=row_beginning(opened, corpus)
    )
    cost = forecast_collection(CollectConfig(), subject, corpus, device=opened.causal.device)
    within = round(60 * COLLECTING * options.minutes * cost.tokens_per_second / 1000) * 1000
    fitting = max(within, fewest_tokens(CollectConfig(), subject, corpus))
    tokens = fitting if fitting < len(corpus.tokens) else None
    console.print(
        f"{len(subject.layers)} layers with {sum(subject.layers.values()):,} neurons, "
        + cost.line(tokens or len(corpus.tokens))
    )
    if not options.dry_run:
        write_json(path, {"tokens": tokens, "tokens_per_second": cost.tokens_per_second, **wanted})
    return tokens


def _print_step(*words: Any) -> None:
    """Print a step as the command that does it."""
    console.print(
        f"[bold]step:[/bold] {escape(shlex.join(['cratelm', *map(str, words)]))}", markup=True, soft_wrap=True
    )
