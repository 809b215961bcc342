"""Record every neuron: the excerpts on which it fires most, random ones, ones from all strengths, and its statistics.

    cratelm collect runs/crate-2l --data tokens

One pass over the held-out documents gives all layers. Half of the documents (by a hash of their content) are for
explaining and half for scoring, so that no explanation is tested on a text it was made from. `--mode compat` follows
the released code of the paper instead. A killed collection goes on where it was.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from cratelm.activations.plan import CollectConfig
from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.runtime import DeviceName, console, progress_bar, select_device

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cratelm.activations.subject import Subject
    from cratelm.data.tokens import TokenDirectory


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm collect`."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    data: Path
    """Token directory to read."""
    tokenizer: str | None = None
    """Tokenizer of a nanoGPT directory, which has no tokens.json."""
    split: str = "val"
    """Split to read; held-out text by default."""
    mode: Mode = "fixed"
    """`fixed`, or `compat` for the released procedure."""
    tokens: int | None = None
    """Read the first documents that hold so many tokens; all by default."""
    seed: int = 0
    """Of the halving of documents and of random excerpts."""
    bf16: bool = False
    """Compute the forward pass in bfloat16 (recorded with the results); float32 by default."""
    batch_rows: int = 16
    """Rows of tokens per forward pass."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Collect the records of each run."""
    for one in options.runs:
        collect_run(one, options)
        console.print(f"records in {one / 'records' / options.mode}. Next: cratelm interpret {one}")


def collect_run(run_folder: Path, options: Options) -> None:
    """Collect the records of one run, unless they are there already."""
    from cratelm.activations.collect import collect
    from cratelm.activations.compat import collect_compat
    from cratelm.activations.records import records_folder
    from cratelm.activations.subject import Corpus
    from cratelm.model.weights import copy_tokenizer, find_model, load
    from cratelm.rundir import claim

    model, tokenizer = load(run_folder)
    if tokenizer is None:
        raise CrateError(
            f"{run_folder} holds no tokenizer.json, which records need. Put the model's beside its weights"
        )
    data = open_tokens(options.data, options.tokenizer, tokenizer, run_folder)
    device = select_device(options.device)
    identity = {"split": options.split, "tokenizer_hash": data.tokenizer_hash}
    corpus = Corpus(
        tokens=data.tokens(options.split), documents=data.documents(options.split), end_of_text=data.end_of_text,
        identity=identity | {"data_hash": data.splits[options.split].sha256},
    )  # fmt: skip
    subject = observe(model.to(device), bf16=options.bf16)
    total = min(options.tokens or len(corpus.tokens), len(corpus.tokens))
    passes = 2 if options.mode == "compat" else 1
    with claim(run_folder), progress_bar(f"collect {run_folder.name}", total=passes * total) as bar:
        copy_tokenizer(find_model(run_folder), records_folder(run_folder, options.mode) / "tokenizer.json")
        if options.mode == "compat":
            collect_compat(
                subject, corpus, run_folder, device=device, bar=bar, max_tokens=options.tokens, seed=options.seed,
                batch_rows=options.batch_rows,
            )  # fmt: skip
        else:
            config = CollectConfig(seed=options.seed, batch_rows=options.batch_rows)
            collect(config, subject, corpus, run_folder, device=device, bar=bar, max_tokens=options.tokens)


def observe(model, *, bf16: bool) -> "Subject":  # type: ignore[no-untyped-def]
    """A model of ours as the collector sees it: token ids to the code of each layer."""
    import torch

    from cratelm.activations.subject import Subject
    from cratelm.activations.taps import capture
    from cratelm.model.weights import weights_hash

    taps = model.neuron_taps

    def forward(tokens: torch.Tensor) -> dict[int, torch.Tensor]:
        autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16)
        with torch.inference_mode(), autocast, capture(model, taps) as codes:
            model.features(tokens)
        return {layer: codes[tap].float() for layer, tap in enumerate(taps)}

    return Subject(
        forward=forward, layers={layer: model.config.num_neurons for layer in range(len(taps))},
        context=model.config.context_length, tap="neurons",
        identity={"model_hash": weights_hash(model), "precision": "bfloat16" if bf16 else "float32"},
    )  # fmt: skip


def open_tokens(folder: Path, named: str | None, tokenizer: "Tokenizer | None", run_folder: Path) -> "TokenDirectory":
    """Open a token directory and check that its tokenizer is the model's."""
    from cratelm.data.tokenizer import tokenizer_hash
    from cratelm.data.tokens import TokenDirectory

    data = TokenDirectory.open(folder, tokenizer=named)
    if tokenizer is not None and tokenizer_hash(tokenizer) != data.tokenizer_hash:
        raise CrateError(
            f"the tokens of {folder} come from another tokenizer than the model of {run_folder}. "
            f"Run: cratelm tokenize SOURCE --tokenizer {run_folder / 'model' / 'tokenizer.json'} --out DIR"
        )
    return data
