"""Train a sparse autoencoder on the activations at one place of a model.

    cratelm sae train runs/crate-2l --data tokens --layer 1 --kind topk --k 32
    cratelm sae train runs/gpt2-2l --data tokens --layer 1 --kind paper --tokens 400M

Training needs sae-lens (pip install 'cratelm[sae]'); the files in RUN/saes/NAME are in its format. Activations are
computed as they are needed and never stored. You can stop at any moment: the same command resumes with the same batches
and ends with the same weights. --dry-run estimates memory and time. --kind sets what makes the latents sparse:
"""

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from cratelm.errors import CrateError
from cratelm.rundir import claim
from cratelm.runtime import console, human, progress_bar
from cratelm.sae.config import SaeConfig
from cratelm.sae.kinds import SAE_KINDS, describe_kinds
from cratelm.workflows.opening import OpenModel, open_for_run
from cratelm.workflows.options.arguments import Device, RunPaths, SplitName, TokensTokenizer
from cratelm.workflows.stopping import stopping
from cratelm.workflows.token_data import open_corpus, read_count

if TYPE_CHECKING:
    import torch
    from torch import nn

    from cratelm.activations.subject import Corpus, Subject
    from cratelm.sae.stream import ActivationStream
    from cratelm.sae.training import Trainer, TrainingPlace

    Kind = str
else:
    Kind = Literal[tuple(SAE_KINDS)]

__doc__ = f"{__doc__}\n{describe_kinds()}"


IDENTITY = ("model_hash", "precision", "row_beginning")
"""Settings of the activations that a trained autoencoder records."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(SaeConfig):
    """Settings of the training."""

    kind: Kind = "standard"
    """What makes the latents sparse; see the list above."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm sae train`."""

    BASIC: ClassVar = (
        "data", "out", "tap", "layer", "tokens", "name",
        "kind", "k", "expansion", "l1", "dry_run", "device",
    )  # fmt: skip
    """The options that `--help` shows; `--help-all` shows all."""
    runs: RunPaths
    """Run directories; or one Hugging Face model (directory or hub name) with --out."""
    data: Path
    """Token directory to train on."""
    out: Path | None = None
    """Run directory to create for a Hugging Face model."""
    tokenizer: TokensTokenizer = None
    split: SplitName = "train"
    tap: str = "neurons"
    """Activations to train on: neurons, heads (their outputs joined), residual (the output of the layer), or a module
    such as 'model.layers.{layer}.mlp.down_proj:input'."""
    layer: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT...", help_behavior_hint="")]
    """Zero-based layers; each gets its own autoencoder."""
    tokens: str = "2M"
    """Number of activations to train on, such as 200k, 8.2M or 1G; a smaller split is read repeatedly."""
    name: str | None = None
    """Name of the autoencoder. Default: from kind, size, layer and tap, such as topk-4x-layer1."""
    context: int | None = None
    """Tokens per row. Default: the model's context, at most 1024 for a Hugging Face model."""
    bf16: bool = False
    """Compute the model's forward pass in bfloat16 instead of float32."""
    training: tyro.conf.OmitArgPrefixes[TrainingOptions] = field(default_factory=TrainingOptions)
    """Settings of the training."""
    dry_run: bool = False
    """Print what would be trained with an estimate of memory and time, then stop."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Train one autoencoder for each run and layer."""
    from cratelm.sae.library import import_sae_lens

    if options.name is not None and (len(options.layer) > 1 or not re.fullmatch(r"\w[\w.-]*", options.name)):
        raise CrateError(f"--name must be letters, digits, - and _, and go with a single --layer, got {options.name!r}")
    tokens = read_count(options.tokens)
    if tokens is None:
        raise CrateError("--tokens must be a number such as 2M, got all")
    options.training.steps(tokens)
    import_sae_lens()
    for source in options.runs:
        for layer in options.layer:
            _train(source, layer, tokens, options)


def sae_name(config: SaeConfig, tap: str, layer: int) -> str:
    """Default name of an autoencoder: `topk-4x-layer1`, `standard-1x-layer0-residual`."""
    from cratelm.activations.places import tap_folder

    place = "" if tap == "neurons" else "-" + re.sub(r"[^\w.-]", "_", tap_folder(tap))
    return f"{config.kind}-{config.expansion}x-layer{layer}{place}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One autoencoder to train, with its data and its folder."""

    config: SaeConfig
    model: "nn.Module"
    subject: "Subject"
    corpus: "Corpus"
    place: "TrainingPlace"
    folder: Path
    tokens: int
    device: "torch.device"

    def stream(self, first: int, buffer_tokens: int | None = None) -> "ActivationStream":
        """The activations from batch number `first` on."""
        from cratelm.sae.stream import ActivationStream

        return ActivationStream(
            lambda tokens: self.subject.forward(tokens)[self.place.layer], self.corpus.tokens, d_in=self.place.d_in,
            context=self.place.context, batch_tokens=self.config.batch_tokens,
            buffer_tokens=buffer_tokens or self.config.buffer_tokens, seed=self.config.seed, device=self.device,
            first=first,
        )  # fmt: skip

    def candidates(self, trainer: "Trainer", count: int, step: int) -> "torch.Tensor":
        """Activations at which resampled latents start."""
        from cratelm.sae.resampling import costly_inputs

        return costly_inputs(
            self.model, self.place.path, trainer.sae, self.corpus.tokens, count=count,
            rows=self.config.resample_rows, context=min(self.place.context, len(self.corpus.tokens) - 1),
            seed=self.config.seed, step=step, begin=self.subject.row_beginning or (),
        )  # fmt: skip


def _train(source: Path, layer: int, tokens: int, options: Options) -> None:
    from cratelm.activations.foreign import write_foreign_run
    from cratelm.sae.training import is_trained, settings_of, train_sae

    opened, home = open_for_run(source, options.device, out=options.out, data=options.data)
    corpus, _ = open_corpus(opened, options.data, options.split, options.tokenizer)
    job = _job(opened, home, corpus, layer, tokens, options)
    console.print(job_summary(job), soft_wrap=True)
    if options.dry_run:
        console.print(resource_estimate(job), soft_wrap=True)
        return
    with claim(job.folder), stopping() as stop:
        if is_trained(job.folder, settings_of(job.config, job.place, tokens)):
            console.print(f"{job.folder}: already trained")
            return
        if opened.foreign is not None:
            write_foreign_run(home, opened.foreign)
        with progress_bar(f"sae {job.folder.name}", total=job.config.steps(tokens) * job.config.batch_tokens) as bar:
            train_sae(
                job.config, job.place, job.stream, job.folder, tokens=tokens, device=job.device, bar=bar, stop=stop,
                candidates=job.candidates,
            )  # fmt: skip
    console.print(f"autoencoder in {job.folder}", soft_wrap=True)


def _job(
    opened: OpenModel, home: Path, corpus: "Corpus", layer: int, tokens: int, options: Options
) -> Job:  # fmt: skip
    from cratelm.activations.observe import observe
    from cratelm.sae.loading import saes_folder
    from cratelm.sae.training import TrainingPlace
    from cratelm.workflows.token_data import row_beginning

    causal = opened.causal
    subject = observe(
        opened.model, model_hash=opened.model_hash, tap=options.tap, layers=(layer,), context=options.context,
        bf16=options.bf16, row_beginning=row_beginning(opened, corpus),
    )  # fmt: skip
    place = TrainingPlace(
        tap=options.tap, layer=layer, path=causal.places(options.tap)[layer], d_in=subject.layers[layer],
        context=subject.context, model_flops_per_token=causal.flops_per_token,
        identity={name: value for name, value in subject.identity.items() if name in IDENTITY}
        | dict(corpus.identity),
    )  # fmt: skip
    config = options.training
    config.width(place.d_in)
    folder = saes_folder(home) / (options.name or sae_name(config, options.tap, layer))
    return Job(
        config=config, model=opened.model, subject=subject, corpus=corpus, place=place, folder=folder, tokens=tokens,
        device=causal.device,
    )  # fmt: skip


def job_summary(job: Job) -> str:
    """One line: what is trained, on how many tokens, with how many FLOPs."""
    config, place = job.config, job.place
    width, steps = config.width(place.d_in), config.steps(job.tokens)
    seen = steps * config.batch_tokens
    parameters = 2 * width * place.d_in + width + place.d_in
    return (
        f"{job.folder.name}: {width} latents over {place.d_in} of {place.tap}, layer {place.layer}; "
        f"{human(parameters)} parameters; {human(seen)} of the {human(len(job.corpus.tokens))} tokens of "
        f"{job.corpus.identity['split']}, {steps} steps of {config.batch_tokens}; "
        f"{human(config.training_flops(place.d_in, seen, place.model_flops_per_token))}FLOP"
    )


def resource_estimate(job: Job) -> str:
    """Estimated memory, by arithmetic, and time, measured with a few steps of a throwaway autoencoder."""
    from cratelm.sae.training import Trainer

    config, place = job.config, job.place
    trainer, stream = Trainer(config, place, job.tokens, device=job.device), job.stream(0, config.batch_tokens)
    times = []
    for _ in range(4):
        began = time.monotonic()
        batch = next(stream)
        trainer.scale(batch)
        trainer.learn(batch)
        times.append(time.monotonic() - began)
    seconds = min(times[1:]) * trainer.steps
    weights = 16 * sum(weight.numel() for weight in trainer.sae.parameters())
    buffer = 4 * place.d_in * (config.buffer_tokens // config.batch_tokens) * config.batch_tokens
    batch_bytes = 4 * config.batch_tokens * (6 * config.width(place.d_in) + 4 * place.d_in)
    return (
        f"memory: about {human(weights + buffer + batch_bytes)}B in addition to the model (weights, gradients and "
        f"moments {human(weights)}B, buffer {human(buffer)}B, one batch {human(batch_bytes)}B); time: about "
        f"{seconds / 60:.3g} minutes on this machine ({len(times) - 1} steps measured)"
    )
