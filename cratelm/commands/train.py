"""Train a CRATE or GPT-2 language model.

The defaults are the paper's (157 billion tokens); a laptop wants fewer:

    cratelm tokenize stdlib --tokenizer bpe:4096 --out tokens
    cratelm train --data tokens --out runs/crate-2l --arch crate --size 2l --context 256 \\
        --tokens 1_228_800 --batch-tokens 2048 --learning-rate 3e-3 --warmup-steps 40

Stop it at any moment; the same command goes on from the last checkpoint and ends with the same model. What is written:
run.json (configuration and origin), metrics.jsonl (losses), checkpoints/ and, at the end, model/ (a model directory).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from cratelm.errors import CrateError
from cratelm.model.config import Architecture, ModelConfig, Size, sized
from cratelm.runtime import DeviceName, console, human, progress_bar, select_device
from cratelm.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm train`."""

    out: Path
    """Run directory to write, or to go on with."""
    data: Path | None = None
    """Token directory (from `cratelm tokenize`, or nanoGPT's)."""
    tokenizer: str | None = None
    """Tokenizer of a nanoGPT directory, which has no tokens.json: gpt2, or a tokenizer.json."""
    arch: Architecture = "crate"
    """CRATE, or the GPT-2 baseline."""
    size: Size = "2l"
    """Of the paper's table: 1l 2l 3l (width 128), s (6 layers, width 768), b (12 layers)."""
    activation: Literal["relu", "gelu"] = "relu"
    """GPT-2's nonlinearity: relu as in the paper, or gelu."""
    vocab_size: int | None = None
    """Rows of the embedding; by default the tokenizer's vocabulary, rounded up to a multiple of 64."""
    training: tyro.conf.OmitArgPrefixes[TrainConfig] = field(default_factory=TrainConfig)
    """How to train."""
    control_of: Path | None = None
    """Write no trained model but the random-init control of this trained run."""
    dry_run: bool = False
    """Say what would be trained and what it costs, then stop."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Train, or write a control."""
    from cratelm.training.train import write_control

    if options.arch == "crate" and options.activation != "relu":
        raise CrateError("--activation is of GPT-2; CRATE's codes have none to choose. Leave it out")
    if options.control_of is not None:
        console.print(f"{options.out} will hold the model of {options.control_of} before its first step")
        if not options.dry_run:
            write_control(options.control_of, options.out)
        return
    if options.data is None:
        raise CrateError("no tokens named. Give --data DIR, made by: cratelm tokenize stdlib --out DIR")
    _train(options, options.data)


def _train(options: Options, data_folder: Path) -> None:
    from cratelm.data.tokens import TokenDirectory
    from cratelm.training.train import train

    data = TokenDirectory.open(data_folder, tokenizer=options.tokenizer)
    config = options.training
    model_config = model_for(
        options.arch, options.size, vocab_size=options.vocab_size or padded(data.vocab_size), context=config.context
    )
    if options.arch == "gpt2":
        model_config = replace(model_config, activation=options.activation)
    device = select_device(options.device)
    console.print(preview(config, model_config))
    if options.dry_run:
        return
    with progress_bar(f"train {options.out.name}", total=config.steps * config.batch_tokens) as bar:
        train(config, model_config, data, options.out, device=device, bar=bar)
    console.print(f"model in {options.out / 'model'}. Next: cratelm evaluate {options.out} --data {data_folder}")


def model_for(arch: Architecture, size: Size, *, vocab_size: int, context: int) -> ModelConfig:
    """One of the paper's models for this vocabulary and context."""
    return sized(arch, size, vocab_size=vocab_size, context_length=context)


def padded(vocab_size: int) -> int:
    """The vocabulary rounded up to a multiple of 64, as the paper pads 50257 to 50304."""
    return -(-vocab_size // 64) * 64


def preview(config: TrainConfig, model_config: ModelConfig) -> str:
    """One line: what is trained on how much, and the arithmetic it takes."""
    flops = 3 * model_config.flops_per_token(config.context) * config.steps * config.batch_tokens
    return (
        f"{model_config.arch} with {model_config.num_layers} layers, {human(model_config.num_parameters)} parameters, "
        f"on {human(config.tokens)} tokens: {config.steps} steps of {config.batch_tokens}, {human(flops)}FLOP"
    )
