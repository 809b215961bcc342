"""Train a CRATE or GPT-2 language model.

The defaults are the paper's (157 billion tokens); on a laptop, train on fewer:

    cratelm tokenize stdlib --tokenizer bpe:4096 --out tokens
    cratelm train --data tokens --out runs/crate-2l --arch crate --size 2l --context 256 \\
        --tokens 1_228_800 --batch-tokens 2048 --learning-rate 3e-3 --warmup-steps 40

You can stop it at any moment; the same command resumes from the last checkpoint and ends with the same model. Files:
run.json (configuration and origin), metrics.jsonl (losses), checkpoints/ and, at the end, model/ (a model directory).
On several GPUs, with the same batches in the same order:

    torchrun --nproc-per-node 8 --max-restarts 3 -m cratelm train --data tokens --out runs/crate-b --size b
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from cratelm.errors import CrateError
from cratelm.model.config import Architecture, ModelConfig, Size, padded_vocabulary, sized
from cratelm.model.settings import field_value
from cratelm.runtime import console, human, progress_bar
from cratelm.training.config import Execution, MeasurementName, TrainConfig
from cratelm.workflows.options.arguments import Device, TokensTokenizer
from cratelm.workflows.stopping import stopping


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm train`."""

    BASIC: ClassVar = (
        "out", "data", "arch", "size", "control_of", "dry_run", "device",
        "tokens", "batch_tokens", "context", "learning_rate", "warmup_steps", "seed",
    )  # fmt: skip
    """The options that `--help` shows; `--help-all` shows all."""
    out: Path
    """Run directory to create or resume."""
    data: Path | None = None
    """Token directory (from `cratelm tokenize`, or nanoGPT's)."""
    tokenizer: TokensTokenizer = None
    arch: Architecture = "crate"
    """CRATE, or the GPT-2 baseline."""
    size: Size = "2l"
    """Size from the paper's table: 1l 2l 3l (width 128), s (6 layers, width 768), b (12 layers)."""
    activation: Literal["relu", "gelu"] = "relu"
    """GPT-2's nonlinearity: relu as in the paper, or gelu."""
    variant: tuple[str, ...] = ()
    """Departures from the paper, FIELD=VALUE each: penalty=1.0 shifted_keys=true rotary=true ... (docs/variants.md)."""
    vocab_size: int | None = None
    """Rows of the embedding; by default the tokenizer's vocabulary, rounded up to a multiple of 64."""
    training: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    """Settings of the training."""
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)
    """Settings that change speed and memory, not results."""
    measure: tuple[MeasurementName, ...] = ()
    """Measurements during training: `lookup` (lookup score of some neurons), `samples` (of generated text), `whitebox`
    (coding rates, sparsity, objective and dictionary of each layer)."""
    control_of: Path | None = None
    """Instead of training, write the random-init control of this trained run."""
    dry_run: bool = False
    """Print the model and its estimated cost, then stop."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Train, or write a control."""
    from cratelm.training.train import write_control

    if options.arch == "crate" and options.activation != "relu":
        raise CrateError("--activation is an option of GPT-2 only. Leave it out")
    if options.control_of is not None:
        console.print(f"{options.out} will hold the model of {options.control_of} before its first step")
        if not options.dry_run:
            write_control(options.control_of, options.out)
        return
    if options.data is None:
        raise CrateError("no tokens were given. Give --data DIR, made by: cratelm tokenize stdlib --out DIR")
    _train(options, options.data)


def _train(options: Options, data_folder: Path) -> None:
    from cratelm.data.tokens import TokenDirectory
    from cratelm.distributed import join_world
    from cratelm.training.forecast import forecast
    from cratelm.training.opening import check_run
    from cratelm.training.train import train
    from cratelm.workflows.measurements import measurements

    data = TokenDirectory.open(data_folder, tokenizer=options.tokenizer)
    if data.begin_of_text is not None:
        raise CrateError(
            f"the tokens of {data_folder} must be made without --begin-token: training reads the documents one after "
            "the other, with the end token between them. Hint: tokenize again without it"
        )
    config, execution = options.training, options.execution
    rows = options.vocab_size or padded_vocabulary(data.vocab_size)
    model_config = sized(options.arch, options.size, vocab_size=rows, context_length=config.context)
    if options.arch == "gpt2":
        model_config = replace(model_config, activation=options.activation)
    model_config = depart(model_config, options.variant)
    with stopping() as stop, join_world(options.device) as (world, device):
        console.print(preview(config, model_config), soft_wrap=True)
        if note := config.schedule_note():
            console.print(note, soft_wrap=True)
        config.rows_of(world.rank, world.size)
        world.decide(lambda: check_run(options.out, config, model_config, data))
        if world.leads and (options.dry_run or not (options.out / "run.json").exists()):
            expected = forecast(config, model_config, device=device, world_size=world.size, execution=execution)
            console.print(str(expected), soft_wrap=True)
        if options.dry_run:
            return
        with progress_bar(f"train {options.out.name}", total=config.steps * config.batch_tokens) as bar:
            train(
                config, model_config, data, options.out, device=device, bar=bar, stop=stop, stop_evaluation=stop,
                execution=execution, measurements=measurements(options.measure, data, options.out), world=world,
            )  # fmt: skip
    console.print(f"model in {options.out / 'model'}", soft_wrap=True)


def depart(model_config: ModelConfig, settings: tuple[str, ...]) -> ModelConfig:
    """The configuration with fields changed by FIELD=VALUE settings."""
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key == "arch":
            raise CrateError(f"--variant must be FIELD=VALUE of a model, got {setting!r}. See docs/variants.md")
        changes[key] = field_value(setting, key, value)
    return replace(model_config, **changes)


def preview(config: TrainConfig, model_config: ModelConfig) -> str:
    """One line about a training: model, tokens, steps, and arithmetic operations."""
    flops = 3 * model_config.flops_per_token(config.context) * config.steps * config.batch_tokens
    return (
        f"{model_config.arch} with {model_config.num_layers} layers, {human(model_config.num_parameters)} parameters, "
        f"on {human(config.tokens)} tokens: {config.steps} steps of {config.batch_tokens}, {human(flops)}FLOP"
    )
