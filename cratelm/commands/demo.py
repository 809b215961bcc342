"""Run the paper's comparison in small, on text that is already on this machine.

    cratelm demo
    cratelm demo --llm models/Qwen2.5-1.5B-Instruct

Tokenizes the Python library that runs this program, trains CRATE and GPT-2 with two layers side by side on the same
tokens, records every neuron of both and of their random-init controls on held-out documents, explains and scores the
neurons by the paper's three protocols without a language model, and writes tables, figures and a page. Under five
minutes on two cores. Stopped and started again, it resumes.

With --llm a language model (a directory, a GGUF file, or the URL of a server) then explains and simulates as many
neurons of each layer as fit into --minutes, and a table shows it next to lookup. --llm alone prints how to get a model.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratelm.errors import CrateError, check_least
from cratelm.model.config import Architecture, padded_vocabulary, sized
from cratelm.rundir import append_jsonl
from cratelm.runtime import ProgressBar, console, progress_bars, select_device
from cratelm.training.config import TrainConfig
from cratelm.workflows.options.arguments import Device
from cratelm.workflows.options.language_model import Name

COMPARED_ARCHITECTURES: tuple[Architecture, ...] = ("crate", "gpt2")
SOURCE, TOKENIZER, HELD_OUT = ("stdlib",), "bpe:4096", 0.2


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm demo`."""

    out: Path = Path("runs/demo")
    """Folder for runs, tokens and the report."""
    tokens: int = 1_228_800
    """Tokens each model is trained on."""
    dry_run: bool = False
    """Print the stages, then stop."""
    device: Device = "auto"
    llm: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="")] = None
    """Language model for the last table: a directory, a GGUF file, a name on the Hugging Face hub, or a server's URL.
    Without SOURCE the commands that fetch a small model are printed."""
    model: Name = ""
    """Name of the model on the server; required if the server has several."""
    minutes: float = 10.0
    """Minutes for --llm, loading the model included; they set the number of neurons."""

    def __post_init__(self) -> None:
        check_least(self, 0, "minutes")
        if self.llm and len(self.llm) > 1:
            raise CrateError(f"--llm must be one model, got {' '.join(self.llm)}")
        source = self.llm[0] if self.llm else ""
        is_path = source.endswith(".gguf") or source.startswith((".", "/", "models/")) or source.count("/") > 1
        if is_path and "://" not in source and not Path(source).exists():
            raise CrateError(f"--llm must be a model, got {source}, which does not exist. Hint: cratelm demo --llm")


def run(options: Options) -> None:
    """Run every stage that is not done yet."""
    if options.llm == ():
        from cratelm.workflows.llm.timed_sample import fetching_lines

        print("\n".join(fetching_lines()))
        return
    config = training(options.tokens)
    runs = [options.out / f"{arch}-2l" for arch in COMPARED_ARCHITECTURES]
    controls = [folder.with_name(f"{folder.name}-random") for folder in runs]
    table = list[str]()
    stages: list[tuple[str, Callable[[], None]]] = [
        (f"tokenize {SOURCE[0]}, {int(100 * HELD_OUT)} % of the documents held out", lambda: _tokenize(options)),
        (f"train CRATE-2L and GPT-2-2L on {config.tokens:,} tokens each", lambda: _train(options, config)),
        ("write their random-init controls", lambda: _write_controls(runs, controls)),
        ("evaluate the held-out loss", lambda: _evaluate(options, runs + controls)),
        ("collect the records of every neuron", lambda: _collect(options, runs + controls)),
        ("explain, simulate and score by three protocols", lambda: _interpret(runs, controls)),
        *([(f"explain and simulate with {options.llm[0]}, {options.minutes:g} minutes",
            lambda: table.extend(_measure(options, runs)))] if options.llm else []),
        ("report", lambda: _report(options, runs + controls)),
    ]  # fmt: skip
    for number, (what, do) in enumerate(stages, 1):
        console.print(f"[bold]{number}/{len(stages)}[/bold] {what}", markup=True)
        if not options.dry_run:
            started = time.monotonic()
            do()
            append_jsonl(
                options.out / "timings.jsonl", {"stage": what, "seconds": round(time.monotonic() - started, 1)}
            )
    if table:
        print("\n" + "\n".join(table))
    if options.dry_run:
        console.print(f"nothing done (--dry-run). Everything would go to {options.out}")


def training(tokens: int) -> TrainConfig:
    """The paper's training settings, scaled down."""
    return TrainConfig(
        tokens=tokens, batch_tokens=2048, micro_batch=8, context=256, learning_rate=3e-3, final_learning_rate=3e-4,
        warmup_steps=40, log_every=10, evaluate_every=100, evaluate_tokens=16_384, checkpoint_every=100,
    )  # fmt: skip


def _tokenize(options: Options) -> None:
    from cratelm.commands import tokenize

    tokens = options.out / "tokens"
    tokenize.run(tokenize.Options(sources=SOURCE, out=tokens, tokenizer=TOKENIZER, held_out=HELD_OUT))


def _train(options: Options, config: TrainConfig) -> None:
    """Both models at once, each on half of the cores; a mistake or Ctrl-C in one stops the other."""
    import torch

    from cratelm.data.tokens import TokenDirectory
    from cratelm.training.train import train

    data = TokenDirectory.open(options.out / "tokens")
    device, stop = select_device(options.device), threading.Event()
    threads = max(1, torch.get_num_threads() // len(COMPARED_ARCHITECTURES))

    def train_one(arch: Architecture, bar: ProgressBar) -> None:
        torch.set_num_threads(threads)
        model = sized(arch, "2l", vocab_size=padded_vocabulary(data.vocab_size), context_length=config.context)
        train(config, model, data, options.out / f"{arch}-2l", device=device, bar=bar, stop=stop.is_set)

    before = torch.get_num_threads()
    with progress_bars() as add, ThreadPoolExecutor(len(COMPARED_ARCHITECTURES)) as pool:
        bars = [add(f"train {arch}-2l", config.steps * config.batch_tokens) for arch in COMPARED_ARCHITECTURES]
        jobs = [pool.submit(train_one, arch, bar) for arch, bar in zip(COMPARED_ARCHITECTURES, bars, strict=True)]
        try:
            wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    torch.set_num_threads(before)
    for job in jobs:
        job.result()


def _write_controls(runs: list[Path], controls: list[Path]) -> None:
    from cratelm.training.train import write_control

    for trained, control in zip(runs, controls, strict=True):
        write_control(trained, control)


def _evaluate(options: Options, runs: list[Path]) -> None:
    from cratelm.commands import evaluate

    missing = tuple(folder for folder in runs if not (folder / "evaluation.json").exists())
    if missing:
        evaluate.run(evaluate.Options(runs=missing, data=options.out / "tokens", device=options.device))


def _collect(options: Options, runs: list[Path]) -> None:
    from cratelm.commands import collect

    for folder in runs:
        collect.run(collect.Options(runs=(folder,), data=options.out / "tokens", device=options.device))


def _interpret(runs: list[Path], controls: list[Path]) -> None:
    from cratelm.workflows.llm.run import interpret_by_lookup
    from cratelm.workflows.options.selection import Selection

    for folder in runs + controls:
        shuffled = () if folder in controls else ("shuffled",)
        interpret_by_lookup(Selection(runs=(folder,)), controls=shuffled)


def _measure(options: Options, runs: list[Path]) -> list[str]:
    from cratelm.workflows.llm.timed_sample import measure_for, sample_lines

    assert options.llm
    sample = asyncio.run(measure_for(runs, options.llm[0], model=options.model, minutes=options.minutes))
    return list(sample_lines(sample))


def _report(options: Options, runs: list[Path]) -> None:
    from cratelm.commands import report

    report.run(report.Options(runs=tuple(runs), out=options.out / "report"))
