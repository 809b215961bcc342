"""Record every neuron: the excerpts on which it fires most, random ones, ones from all strengths, and its statistics.

    cratelm collect runs/crate-2l --data tokens
    cratelm collect EleutherAI/pythia-70m --data tokens --out runs/pythia-70m --tokens 8.2M

One pass over the held-out documents gives all layers. Half of the documents (by a hash of their content) are for
explaining and half for scoring, so that no explanation is tested on a text it was made from. `--mode compat` follows
the released code of the paper instead. A killed collection goes on where it was. A Hugging Face model gets a run
directory of its own, `--out`. `--tap` records another place than the neurons (docs/collect.md).
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cratelm.activations.plan import CollectConfig
from cratelm.activations.records import Mode, layer_file, records_folder
from cratelm.activations.repairs import Repair
from cratelm.errors import CrateError
from cratelm.rundir import atomic_path, claim, read_json
from cratelm.runtime import DeviceName, Team, console, progress_bar, select_device
from cratelm.workflows.options.counts import whole_number

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import nn

    from cratelm.activations.foreign import ForeignModel
    from cratelm.activations.subject import Corpus, Subject
    from cratelm.data.tokens import TokenDirectory


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm collect`."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; or one Hugging Face model, a directory or a name on the hub."""
    data: Path
    """Token directory to read."""
    out: Path | None = None
    """Run directory to write for a Hugging Face model. A run of ours keeps its records itself."""
    tokenizer: str | None = None
    """Tokenizer of a nanoGPT directory, which has no tokens.json, or of a model that holds none."""
    split: str = "val"
    """Split to read; held-out text by default."""
    mode: Mode = "fixed"
    """`fixed`, or `compat` for the released procedure."""
    repair: tuple[Repair, ...] = ()
    """With `compat`, flaws of the released procedure to repair (docs/compat.md). Another set needs another run."""
    tap: str = "neurons"
    """What to record: neurons, heads (their outputs side by side), residual (the output of each layer), or a module
    such as 'model.layers.{layer}.mlp.down_proj:input'; :input is what it reads."""
    sae: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Record the latents of these autoencoders of the run (docs/sae.md), each as the tap sae-NAME, instead of a tap."""
    sign: Literal["positive", "negative"] = "positive"
    """negative records the activations times -1, as a tap of its own: top excerpts rank the positive side only."""
    layer: tuple[int, ...] = ()
    """Zero-based layers to record; all if left out."""
    tokens: str = "all"
    """Read the first documents that hold so many tokens, as in 200k, 8.2M or 1G; or all."""
    context: int | None = None
    """Tokens per row; by default the model's context, for a Hugging Face model at most 1024."""
    seed: int = 0
    """Of the halving of documents and of random excerpts."""
    bf16: bool = False
    """Compute the forward pass in bfloat16 (recorded with the results); float32 by default."""
    batch_rows: int = 16
    """Rows of tokens per forward pass."""
    device: DeviceName = "auto"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to collect from and the run directory that its records go to."""

    model: "nn.Module"
    tokenizer: "Tokenizer | None"
    model_hash: str
    run: Path
    foreign: "ForeignModel | None"
    """None for a run of ours."""


def run(options: Options) -> None:
    """Collect the records of each run."""
    if not options.runs:
        raise CrateError("no run and no model was named. Run: cratelm collect RUN --data DIR")
    if options.out is not None and len(options.runs) > 1:
        raise CrateError(f"--out is the run of one model, {len(options.runs)} were named. Collect them one by one")
    for one in options.runs:
        collect_run(one, options)


def collect_run(source: Path, options: Options) -> None:
    """Collect the records of one run or foreign model, unless they are there already."""
    max_tokens = read_count(options.tokens)
    if options.batch_rows < 1:
        raise CrateError(f"--batch-rows is {options.batch_rows}, it must be at least 1")
    if options.repair and options.mode != "compat":
        raise CrateError(f"--repair {options.repair[0]} is for the released procedure. Use it with --mode compat")
    device = own_device(options.device)
    opened = open_model(source, options)
    corpus, tokenizer = open_corpus(opened, source, options)
    subjects = _subjects(opened, options, device)
    with Team.joined() as team, claim(opened.run) if team.rank == 0 else contextlib.nullcontext():
        if team.rank == 0:
            _write_head(opened, tokenizer, options.mode)
        for subject in subjects:
            _collect(subject, corpus, opened.run, options, max_tokens, device, team)
            if team.rank == 0:
                _report(opened.run, options, subject)


def _subjects(opened: Opened, options: Options, device: "torch.device") -> "list[Subject]":
    """What to observe: the tap that was asked for, or the latents of each autoencoder."""
    from cratelm.activations.observe import observe

    def at(tap: str, layers: tuple[int, ...]) -> "Subject":
        return observe(
            opened.model.to(device), model_hash=opened.model_hash, tap=tap, sign=options.sign, layers=layers,
            context=options.context, bf16=options.bf16,
        )  # fmt: skip

    if not options.sae:
        return [at(options.tap, options.layer)]
    if options.layer or (options.tap, options.sign) != ("neurons", "positive"):
        raise CrateError("an autoencoder has a tap and a layer of its own. Use --sae without --tap, --layer and --sign")
    from cratelm.sae.latents import observe_latents
    from cratelm.sae.loading import check_trained_on, load_sae

    found = []
    for name in options.sae:
        sae = load_sae(opened.run, name, device=device)
        check_trained_on(sae, opened.model_hash, opened.run)
        sae.place(opened.model)
        found.append(observe_latents(at(sae.tap, (sae.layer,)), sae))
    return found


def _write_head(opened: Opened, tokenizer: "Tokenizer", mode: Mode) -> None:
    """What lies beside the records: the tokenizer, and whose they are."""
    from cratelm.activations.foreign import write_foreign_run

    if opened.foreign is not None:
        write_foreign_run(opened.run, opened.foreign)
    with atomic_path(records_folder(opened.run, mode) / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))


def _collect(
    subject: "Subject", corpus: "Corpus", run: Path, options: Options, max_tokens: int | None, device: "torch.device",
    team: Team,
) -> None:  # fmt: skip
    from cratelm.activations.collect import collect
    from cratelm.activations.compat import collect_compat

    total = min(max_tokens or len(corpus.tokens), len(corpus.tokens))
    passes = 2 if options.mode == "compat" else 1
    with progress_bar(f"collect {run.name}", total=passes * total) as bar:
        if options.mode == "fixed":
            config = CollectConfig(seed=options.seed, batch_rows=options.batch_rows)
            collect(config, subject, corpus, run, device=device, bar=bar, max_tokens=max_tokens, team=team)
            return
        if team.size > 1:
            raise CrateError(f"--mode compat is for one process, torchrun started {team.size}. Run it without torchrun")
        collect_compat(
            subject, corpus, run, device=device, bar=bar, max_tokens=max_tokens, seed=options.seed,
            batch_rows=options.batch_rows, repairs=frozenset(options.repair),
        )  # fmt: skip


def own_device(name: DeviceName) -> "torch.device":
    """The device of this process: under torchrun each process on a machine has a GPU of its own."""
    import torch

    device = select_device(name)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def read_count(text: str) -> int | None:
    """`8.2M` -> 8200000, `all` -> None."""
    if text == "all":
        return None
    try:
        count = whole_number(text)
    except ValueError:
        count = 0
    if count < 1:
        raise CrateError(f"--tokens is {text!r}. Write a number such as 200000, 200k, 8.2M or 1G, or all")
    return count


def open_model(source: Path, options: Options) -> Opened:
    """Load the model of a run, or a foreign model with its `--out`; the run of a foreign model remembers its source."""
    from cratelm.activations.foreign import load_foreign
    from cratelm.model.weights import load, weights_hash

    described = source / "run.json"
    description = read_json(described, made_by="cratelm train") if described.is_file() else {}
    remembered = description.get("source")
    is_run = described.is_file() or (source / "model" / "config.json").is_file()
    if is_run and options.out is not None:
        raise CrateError(f"{source} is a run, which keeps its records itself. Leave --out away")
    if is_run and remembered is None:
        model, tokenizer = load(source)
        return Opened(model=model, tokenizer=tokenizer, model_hash=weights_hash(model), run=source, foreign=None)
    if not is_run and options.out is None:
        what = "is a model and no run" if (source / "config.json").exists() else "is no run directory"
        raise CrateError(
            f"{source} {what}. For the records of a Hugging Face model name the run to write: "
            f"cratelm collect {source} --data {options.data} --out runs/{source.name}"
        )
    foreign = load_foreign(remembered or source)
    return Opened(
        model=foreign.model, tokenizer=foreign.tokenizer, model_hash=foreign.model_hash,
        run=options.out or source, foreign=foreign,
    )  # fmt: skip


def open_corpus(opened: Opened, source: Path, options: Options) -> "tuple[Corpus, Tokenizer]":
    """The tokens that a model is to read and the tokenizer that made them, which is the model's own."""
    tokenizer = _tokenizer_of(opened, source, options.tokenizer)
    return _corpus(
        open_tokens(options.data, options.tokenizer, tokenizer, source), options.split, opened.model
    ), tokenizer


def _tokenizer_of(opened: Opened, source: Path, named: str | None) -> "Tokenizer":
    """The model's own tokenizer, or the one that was named for a model without."""
    from cratelm.data.tokenizer import load_tokenizer

    if opened.tokenizer is not None:
        return opened.tokenizer
    if named is None:
        raise CrateError(
            f"the model of {source} has no tokenizer.json, so nothing says that the tokens are its own. "
            "Put it there, or name its tokenizer with --tokenizer"
        )
    return load_tokenizer(named)


def open_tokens(folder: Path, named: str | None, tokenizer: "Tokenizer | None", source: Path) -> "TokenDirectory":
    """Open a token directory and check that its tokenizer is the model's."""
    from cratelm.data.tokenizer import tokenizer_hash
    from cratelm.data.tokens import TokenDirectory

    data = TokenDirectory.open(folder, tokenizer=named)
    if tokenizer is not None and tokenizer_hash(tokenizer) != data.tokenizer_hash:
        inside = source / "model" / "tokenizer.json"
        raise CrateError(
            f"the tokens of {folder} come from another tokenizer than the model of {source}. "
            f"Run: cratelm tokenize SOURCE --tokenizer {inside if inside.exists() else source} --out DIR"
        )
    return data


def _corpus(data: "TokenDirectory", split: str, model: "nn.Module") -> "Corpus":
    from cratelm.activations.places import vocabulary_rows
    from cratelm.activations.subject import Corpus

    tokens, rows = data.tokens(split), vocabulary_rows(model)
    if data.vocab_size > rows and (largest := int(tokens.max())) >= rows:
        raise CrateError(
            f"{data.path / split}.bin holds token {largest}, the model's vocabulary ends at {rows - 1}. "
            "Tokenize with the model's own tokenizer"
        )
    identity = {"split": split, "tokenizer_hash": data.tokenizer_hash, "data_hash": data.splits[split].sha256}
    return Corpus(tokens=tokens, documents=data.documents(split), end_of_text=data.end_of_text, identity=identity)


def _report(run: Path, options: Options, subject: "Subject") -> None:
    """Say where the records are, and what they mean where activations can be negative."""
    from cratelm.activations.writing import least_activation

    files = [layer_file(run, options.mode, subject.tap, layer) for layer in subject.layers]
    if (least := min(map(least_activation, files))) < 0:
        other = "positive" if options.sign == "negative" else "negative"
        console.print(
            f"{subject.tap} has negative activations (down to {least:.3g}). Top excerpts are the strongest positive "
            f"ones, density counts what is above 0. For the other side: --sign {other}"
        )
    folder = records_folder(run, options.mode)
    if subject.tap == "neurons":
        other = "" if options.mode == "fixed" else f" --mode {options.mode}"
        console.print(f"records in {folder}. Next: cratelm interpret {run}{other}")
    else:
        console.print(f"records in {folder / subject.tap}, read by cratelm.read_records(..., tap={subject.tap!r})")
