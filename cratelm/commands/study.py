"""Run the paper's study on your text: train each variant at each size with several seeds, on equal tokens, and compare.

    cratelm study --data tokens --sizes 1l,2l,3l --seeds 3 --out study --tokens 3_000_000 --context 256 \\
        --batch-tokens 2048 --learning-rate 3e-3 --warmup-steps 40

Each run is trained and evaluated, its neurons are collected, explained, simulated and scored by lookup, with a
random-init control and shuffled explanations. The report has means and differences over seeds. An estimate of the time
is printed first, and `--dry-run` stops there. The same command resumes a stopped study.

A variant is a model configuration by name: `crate` and `gpt2`, or `NAME:FIELD=VALUE,...`, for example
`sparser:penalty=1.0` or `gelu:arch=gpt2,activation=gelu`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import tyro

from cratelm.errors import CrateError, check_least
from cratelm.model.config import SIZES, ModelConfig, Size, padded_vocabulary, sized
from cratelm.model.settings import field_value
from cratelm.runtime import console, duration, human, progress_bar, select_device
from cratelm.training.config import Execution, TrainConfig
from cratelm.workflows.options.arguments import Device, TokensTokenizer
from cratelm.workflows.stopping import stopping

if TYPE_CHECKING:
    import torch

    from cratelm.data.tokens import TokenDirectory

FORWARD_PASSES = 2 * (1.25 + 1)
"""Over the held-out tokens, for each training: collection (slower by a quarter) and evaluation, of the model and of its
control."""
REPORT_SECONDS = 20
"""Rough time to explain, simulate, score and report on one training of a small model."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm study`."""

    BASIC: ClassVar = (
        "data", "out", "sizes", "seeds", "variant", "dry_run",
        "device", "tokens", "batch_tokens", "context", "learning_rate", "warmup_steps",
    )  # fmt: skip
    """The options that `--help` shows; `--help-all` shows all."""
    data: Path
    """Token directory (from `cratelm tokenize`, or nanoGPT's)."""
    out: Path
    """Folder for all runs, OUT/VARIANT-SIZE-seedK, and the report."""
    sizes: str = "1l,2l,3l"
    """Sizes from the paper's table, with commas: 1l 2l 3l s b."""
    seeds: int = 3
    """Trainings of each variant and size; the seeds count up from --seed."""
    variant: tuple[str, ...] = ("crate", "gpt2")
    """Variants to compare: crate, gpt2, or NAME:FIELD=VALUE,... (fields of a model's configuration)."""
    tokenizer: TokensTokenizer = None
    vocab_size: int | None = None
    """Rows of the embedding; by default the tokenizer's vocabulary, rounded up to a multiple of 64."""
    collect_tokens: int | None = None
    """Held-out tokens to record neurons on, in whole documents; all by default."""
    training: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    """Settings of the training, the same for all runs."""
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)
    """Settings that change speed and memory, not results."""
    dry_run: bool = False
    """Print the plan and an estimate of the time, then stop."""
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One training of the study."""

    run: Path
    config: TrainConfig
    model: ModelConfig

    @property
    def control(self) -> Path:
        """The run directory of its random-init control."""
        return self.run.with_name(f"{self.run.name}-random")


def run(options: Options) -> None:
    """Print the estimate, run every part that is missing, then report."""
    from cratelm.data.tokens import TokenDirectory
    from cratelm.training.opening import check_run

    data = TokenDirectory.open(options.data, tokenizer=options.tokenizer)
    parts = list(plan(options, data))
    device = select_device(options.device)
    for part in parts:
        check_run(part.run, part.config, part.model, data)
    if note := options.training.schedule_note():
        console.print(note, soft_wrap=True)
    _check_documents(options, data)
    _print_estimate(options, parts, data, device)
    if options.dry_run:
        return
    for number, part in enumerate(parts, 1):
        console.print(f"[bold]{number}/{len(parts)}[/bold] {part.run.name}", markup=True)
        _train(options, part, data, device)
        _measure(options, part)
    _report(options, parts)


def plan(options: Options, data: "TokenDirectory") -> Iterator[PlannedRun]:
    """All trainings of the study, seed by seed, so that a stopped study has complete seeds."""
    sizes = [size.strip() for size in options.sizes.split(",")]
    if unknown := [size for size in sizes if size not in SIZES]:
        raise CrateError(f"--sizes must be of {', '.join(SIZES)}, got {unknown[0]!r}. Write for example 1l,2l,3l")
    check_least(options, 1, "seeds")
    names = [text.partition(":")[0] for text in options.variant]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CrateError(f"variants must have different names, got {twice[0]!r} twice. Write NAME:FIELD=VALUE,...")
    vocab = options.vocab_size or padded_vocabulary(data.vocab_size)
    for number in range(options.seeds):
        for size in cast(list[Size], sizes):
            for text in options.variant:
                name, model = variant(text, size, vocab_size=vocab, context=options.training.context)
                config = replace(options.training, seed=options.training.seed + number)
                yield PlannedRun(run=options.out / f"{name}-{size}-seed{number}", config=config, model=model)


def variant(text: str, size: Size, *, vocab_size: int, context: int) -> tuple[str, ModelConfig]:
    """The name and the model of `NAME` or `NAME:FIELD=VALUE,...` at a size. CRATE unless the fields name another."""
    name, _, listed = text.partition(":")
    changes: dict[str, Any] = {"arch": name} if name in ("crate", "gpt2") else {"arch": "crate"}
    if not name or (not listed and name not in ("crate", "gpt2")):
        raise CrateError(f"a variant must be crate, gpt2 or NAME:FIELD=VALUE,..., got {text!r}")
    for setting in filter(None, listed.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise CrateError(f"a variant must be NAME:FIELD=VALUE,..., got {setting!r} in {text!r}")
        changes[key] = field_value(text, key, value)
    arch = changes.pop("arch")
    return name, sized(arch, size, vocab_size=vocab_size, **({"context_length": context} | changes))


def _print_estimate(options: Options, parts: list[PlannedRun], data: "TokenDirectory", device: "torch.device") -> None:
    """Print the cost of each model and the time of the missing parts, estimated from a few timed passes."""
    from cratelm.training.forecast import forecast

    total = 0.0
    held_out = min(options.collect_tokens or data.splits["val"].tokens, data.splits["val"].tokens)
    for model in dict.fromkeys(part.model for part in parts):
        of_model = [part for part in parts if part.model == model]
        left = [part for part in of_model if not (part.run / "model").exists()]
        name = of_model[0].run.name.rpartition("-seed")[0]
        costs = f"{human(model.num_parameters)} parameters, {human(model.flops_per_token())}FLOP per token"
        line = f"{name}: {costs}, {len(of_model)} seeds"
        if left:
            expected = forecast(of_model[0].config, model, device=device, execution=options.execution)
            forward = expected.seconds / expected.tokens / 3
            each = expected.seconds + FORWARD_PASSES * held_out * forward + REPORT_SECONDS
            total += each * len(left)
            line += f", about {duration(each)} each"
        if len(left) < len(of_model):
            line += f", {len(of_model) - len(left)} trained"
        console.print(line, soft_wrap=True)
    console.print(f"{len(parts)} trainings, about {duration(total)} in all on {device}", soft_wrap=True)


def _check_documents(options: Options, data: "TokenDirectory") -> None:
    """Raise CrateError before the first training if there are too few documents to collect from."""
    from cratelm.activations.collect import check_documents
    from cratelm.activations.plan import CollectConfig, make_plan

    config = CollectConfig()
    rows = make_plan(
        data.tokens("val"), data.documents("val"), context=options.training.context, wide=config.wide,
        narrow=config.narrow, warmup=config.warmup, max_tokens=options.collect_tokens, seed=config.seed,
    )  # fmt: skip
    check_documents(rows, config)


def _train(options: Options, part: PlannedRun, data: "TokenDirectory", device: "torch.device") -> None:
    from cratelm.training.opening import open_run
    from cratelm.training.train import train, write_control

    if (part.run / "run.json").exists():
        open_run(part.run, part.config, part.model, data)
    if not (part.run / "model").exists():
        total = part.config.steps * part.config.batch_tokens
        with stopping() as stop, progress_bar(f"train {part.run.name}", total=total) as bar:
            train(
                part.config, part.model, data, part.run, device=device, bar=bar, stop=stop,
                execution=options.execution,
            )  # fmt: skip
    write_control(part.run, part.control)


def _measure(options: Options, part: PlannedRun) -> None:
    """Evaluate, collect and score the model and its control."""
    from cratelm.commands import collect, evaluate
    from cratelm.workflows.llm.run import interpret_by_lookup
    from cratelm.workflows.options.selection import Selection

    controlled: tuple[tuple[Path, tuple[str, ...]], ...] = ((part.run, ("shuffled",)), (part.control, ()))
    for folder, controls in controlled:
        if not (folder / "evaluation.json").exists():
            evaluate.run(evaluate.Options(
                runs=(folder,), data=options.data, tokenizer=options.tokenizer, device=options.device,
            ))  # fmt: skip
        collect.run(collect.Options(
            runs=(folder,), data=options.data, tokenizer=options.tokenizer, tokens=str(options.collect_tokens or "all"),
            device=options.device,
        ))  # fmt: skip
        interpret_by_lookup(Selection(runs=(folder,)), controls=controls)


def _report(options: Options, parts: list[PlannedRun]) -> None:
    from cratelm.commands import report

    runs = tuple(run for part in parts for run in (part.run, part.control))
    report.run(report.Options(runs=runs, out=options.out / "report"))
