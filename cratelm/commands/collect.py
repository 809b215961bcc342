"""Record every neuron: top, random and quantile excerpts with its activations, and its statistics.

    cratelm collect runs/crate-2l --data tokens
    cratelm collect EleutherAI/pythia-70m --data tokens --out runs/pythia-70m --tokens 8.2M

One pass over the held-out documents collects all layers. Half of the documents (by a hash of their content) are for
explaining and half for scoring, so that no explanation is scored on a text it was made from. `--mode compat` follows
the released code of the paper instead. A killed collection resumes where it stopped. The records of a Hugging Face
model go to a separate run directory, `--out`. `--tap` records other activations than the neurons' (docs/collect.md).
"""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from cratelm.activations.plan import CollectConfig
from cratelm.activations.records import Mode, layer_file, records_folder
from cratelm.checksums import checked_path
from cratelm.errors import CrateError, check_least
from cratelm.rundir import claim
from cratelm.runtime import console, progress_bar
from cratelm.workflows.opening import OpenModel, open_for_run
from cratelm.workflows.options.arguments import Device, RunPaths, SplitName, TokensTokenizer
from cratelm.workflows.token_data import open_corpus, read_count, row_beginning

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from cratelm.activations.subject import Corpus, Subject
    from cratelm.distributed import World


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm collect`."""

    BASIC: ClassVar = ("data", "out", "mode", "tap", "sae", "layer", "tokens", "device", "dry_run")
    """The options that `--help` shows; `--help-all` shows all."""
    runs: RunPaths
    """Run directories; or one Hugging Face model, as a directory, a GGUF file or a name on the hub."""
    data: Path
    """Token directory to read."""
    out: Path | None = None
    """Run directory to write for a Hugging Face model. The records of a run always go to that run."""
    tokenizer: TokensTokenizer = None
    split: SplitName = "val"
    mode: Mode = "fixed"
    """`fixed`, or `compat` for the released procedure."""
    tap: str = "neurons"
    """Activations to record: neurons, heads (their concatenated outputs), residual (the output of each layer), or the
    output of a module such as 'model.layers.{layer}.mlp'; with the suffix :input, its input."""
    sae: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Record the latents of these autoencoders of the run (docs/sae.md) instead, each as the tap sae-NAME."""
    sign: Literal["positive", "negative"] = "positive"
    """negative records the activations times -1, as a separate tap, because top excerpts rank positive values only."""
    layer: tuple[int, ...] = ()
    """Zero-based layers to record; all if left out."""
    tokens: str = "all"
    """Read the first documents that hold N tokens, such as 200k, 8.2M or 1G; or all."""
    context: int | None = None
    """Tokens per row; by default the model's context, for a Hugging Face model at most 1024."""
    seed: int = 0
    """Seed of the document split and of random excerpts."""
    bf16: bool = False
    """Compute the forward pass in bfloat16 (recorded with the results); float32 by default."""
    batch_rows: int = 16
    """Rows of tokens per forward pass."""
    force: bool = False
    """Collect from a Hugging Face model even if it predicts the text worse than token frequencies do, as an untrained
    model does."""
    device: Device = "auto"
    dry_run: bool = False
    """Measure for some seconds, print the time, disk space and memory that the collection will take, then stop."""


def run(options: Options) -> None:
    """Collect the records of each run."""
    if options.out is not None and len(options.runs) > 1:
        raise CrateError(f"--out needs a single model, got {len(options.runs)}. Collect them one by one")
    for source in options.runs:
        collect_run(source, options)


def collect_run(source: Path, options: Options) -> None:
    """Collect the records of one run or foreign model, unless they exist already."""
    from cratelm.distributed import join_world

    max_tokens = read_count(options.tokens)
    check_least(options, 1, "batch_rows")
    with join_world(options.device, same_errors=False) as (world, device):
        opened, home = open_for_run(source, device, out=options.out, data=options.data)
        corpus, tokenizer = open_corpus(opened, options.data, options.split, options.tokenizer)
        begin = row_beginning(opened, corpus)
        subjects = _subjects(opened, home, options, begin)
        if options.dry_run:
            _print_forecast(subjects, corpus, options, max_tokens, device)
            return
        collected = (records_folder(home, options.mode) / "records.json").exists()
        if not opened.causal.has_known_parts and not collected:
            _check_loss(opened, corpus, begin, options, shown=world.leads)
        with claim(home) if world.leads else contextlib.nullcontext():
            if world.leads:
                _write_head(opened, home, tokenizer, options.mode, corpus.begin_of_text)
            for subject in subjects:
                _collect(subject, corpus, home, options, max_tokens, device, world)
                if world.leads:
                    _report(home, options, subject)


def _print_forecast(
    subjects: "list[Subject]", corpus: "Corpus", options: Options, max_tokens: int | None, device: "torch.device"
) -> None:  # fmt: skip
    from cratelm.activations.forecast import forecast_collection

    if options.mode != "fixed":
        raise CrateError("--dry-run must be used with --mode fixed, got compat")
    total = min(max_tokens or len(corpus.tokens), len(corpus.tokens))
    config = CollectConfig(seed=options.seed, batch_rows=options.batch_rows)
    for subject in subjects:
        print(f"{subject.tap}: {forecast_collection(config, subject, corpus, device=device).line(total)}")


def _subjects(
    opened: OpenModel, home: Path, options: Options, begin: tuple[int, ...] | None
) -> "list[Subject]":  # fmt: skip
    """The activations to record: the requested tap, or the latents of each autoencoder."""
    from cratelm.activations.observe import observe

    def at(tap: str, layers: tuple[int, ...]) -> "Subject":
        return observe(
            opened.model, model_hash=opened.model_hash, tap=tap, sign=options.sign, layers=layers,
            context=options.context, bf16=options.bf16, row_beginning=begin,
        )  # fmt: skip

    if not options.sae:
        return [_named(at(options.tap, options.layer), opened)]
    if options.layer or (options.tap, options.sign) != ("neurons", "positive"):
        raise CrateError("an autoencoder determines tap and layer. Use --sae without --tap, --layer and --sign")
    from cratelm.sae.latents import observe_latents
    from cratelm.sae.loading import check_trained_on, load_sae

    subjects = []
    for name in options.sae:
        sae = load_sae(home, name, device=opened.causal.device)
        check_trained_on(sae, opened.model_hash, home)
        sae.place(opened.model)
        subjects.append(_named(observe_latents(at(sae.tap, (sae.layer,)), sae), opened))
    return subjects


def _named(subject: "Subject", opened: OpenModel) -> "Subject":
    """The subject, with the quantisation of a model from a GGUF file in the description of its records."""
    name = opened.foreign.quantization if opened.foreign is not None else None
    return replace(subject, identity={**subject.identity, "quantization": name}) if name else subject


def _check_loss(
    opened: OpenModel, corpus: "Corpus", begin: tuple[int, ...] | None, options: Options, *, shown: bool
) -> None:  # fmt: skip
    """Print the loss of a Hugging Face model on the text. Raises CrateError if a unigram model has a lower one."""
    from cratelm.activations.text_loss import loss_on

    loss = loss_on(opened.causal, corpus, begin, bf16=options.bf16)
    hint, other = "", opened.causal.special.unused_begin
    if other is not None and begin == () and loss_on(opened.causal, corpus, (other,)).model < loss.model - 0.1:
        hint = f"The loss is lower with {opened.strings[other]} before each row: tokenize with --begin-token"
    if shown:
        console.print(
            f"loss on this text: {loss.model:.2f} nats per token, of a unigram model {loss.unigram:.2f} "
            f"(first {loss.tokens} tokens). {hint}".rstrip()
        )
    if loss.model > loss.unigram and not options.force:
        raise CrateError(
            f"the loss of {opened.source} on this text must be below {loss.unigram:.2f} nats per token, that of a "
            f"unigram model, got {loss.model:.2f}: {hint or 'the text, its tokens or the weights do not fit the model'}"
            ". Hint: --force collects all the same, as from an untrained model"
        )


def _write_head(
    opened: OpenModel, home: Path, tokenizer: "Tokenizer", mode: Mode, begin: tuple[int, ...] | None
) -> None:  # fmt: skip
    """Write the tokenizer next to the records, and the `run.json` of a foreign model."""
    from cratelm.activations.foreign import write_foreign_run

    if opened.foreign is not None:
        write_foreign_run(home, opened.foreign, begin)
    with checked_path(records_folder(home, mode) / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))


def _collect(
    subject: "Subject", corpus: "Corpus", run: Path, options: Options, max_tokens: int | None, device: "torch.device",
    world: "World",
) -> None:  # fmt: skip
    from cratelm.activations.collect import collect
    from cratelm.activations.compat import collect_compat

    total = min(max_tokens or len(corpus.tokens), len(corpus.tokens))
    passes = 2 if options.mode == "compat" else 1
    with progress_bar(f"collect {run.name}", total=passes * total) as bar:
        if options.mode == "fixed":
            config = CollectConfig(seed=options.seed, batch_rows=options.batch_rows)
            collect(config, subject, corpus, run, device=device, bar=bar, max_tokens=max_tokens, world=world)
            return
        if world.size > 1:
            raise CrateError(f"--mode compat needs a single process, got {world.size}. Run it without torchrun")
        collect_compat(
            subject, corpus, run, device=device, bar=bar, max_tokens=max_tokens, seed=options.seed,
            batch_rows=options.batch_rows,
        )  # fmt: skip


def _report(run: Path, options: Options, subject: "Subject") -> None:
    """Print where the records are, and how to read them if activations can be negative."""
    from cratelm.activations.writing import least_activation

    files = [layer_file(run, options.mode, subject.tap, layer) for layer in subject.layers]
    if (least := min(map(least_activation, files))) < 0:
        other = "positive" if options.sign == "negative" else "negative"
        console.print(
            f"{subject.tap} has negative activations (down to {least:.3g}). Top excerpts are the strongest positive "
            f"ones, and the density counts positive ones. For the other side: --sign {other}"
        )
    folder = records_folder(run, options.mode)
    if subject.tap == "neurons":
        console.print(f"records in {folder}", soft_wrap=True)
    else:
        console.print(f"records in {folder / subject.tap}, read by cratelm.read_records(..., tap={subject.tap!r})")
