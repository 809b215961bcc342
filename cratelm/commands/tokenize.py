"""Turn text into a token directory, which training and collection read.

    cratelm tokenize stdlib --out data/stdlib --tokenizer bpe:4096
    cratelm tokenize books/ notes.md pile-00.jsonl.zst --out data/mine --tokenizer gpt2 --held-out 0.02
    cratelm tokenize hf:monology/pile-uncopyrighted --out data/pile

Each document is followed by one end-of-text token: <|endoftext|>, or what the tokenizer's files name. A document goes
to train, val or test by a hash of its text, so copies of a text never land on both sides. The folder holds train.bin
and val.bin (nanoGPT reads them), tokenizer.json, and tokens.json with counts and hashes. The same command again finds
it done.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cratelm import runtime


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of `cratelm tokenize`."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE...", help_behavior_hint="")]
    """stdlib (the running Python's own library), files and folders (.txt .md .rst .py .jsonl .jsonl.gz .jsonl.zst
    .parquet), or hf:DATASET[:CONFIG] streamed from the hub."""
    out: Path
    """The token directory to write."""
    tokenizer: str = "gpt2"
    """gpt2 (from the hub), bpe:4096 (trains a byte-level BPE of 4096 tokens on the training split), a tokenizer.json,
    or a folder holding one or GPT-2's encoder.json + vocab.bpe."""
    held_out: float | None = None
    """Share of the documents held out as val; by default 0.2 for stdlib alone, 0.01 otherwise."""
    test: float = 0.0
    """Share of the documents set aside as test."""
    seed: int = 0
    """Seed of the split."""
    skip_bad: tyro.conf.FlagCreatePairsOff[bool] = False
    """Skip unreadable documents and count them."""
    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    begin_token: str | None = None
    """Token with which every row begins when a Hugging Face model reads these tokens, such as '<s>'; by default what
    the model's own tokenizer puts before a text."""
    end_token: str | None = None
    """Token that follows every document; by default the tokenizer's own. A text that is not a token of the tokenizer
    is added as a special token, for models that you train."""


def run(options: Options) -> None:
    """Tokenize and print what was written."""
    # Reading the options must stay quick; the work needs numpy and the tokenizers library.
    from cratelm.data.tokens import tokenize

    stdlib_alone = options.sources == ("stdlib",)
    held_out = options.held_out if options.held_out is not None else 0.2 if stdlib_alone else 0.01
    directory = tokenize(
        options.sources, options.out, options.tokenizer, held_out=held_out, test=options.test, seed=options.seed,
        skip_bad=options.skip_bad, text_field=options.text_field, begin_token=options.begin_token,
        end_token=options.end_token,
    )  # fmt: skip
    print(f"{'split':<8}{'documents':>12}{'tokens':>16}{'text bytes':>16}{'bytes/token':>13}")
    for name, split in directory.splits.items():
        text_bytes = directory.text_bytes(name)
        row = f"{name:<8}{split.documents or 0:>12,}{split.tokens:>16,}{text_bytes:>16,}"
        print(f"{row}{text_bytes / split.tokens:>13.2f}")
    print(f"vocabulary {directory.vocab_size:,} in {directory.dtype}, {directory.path}")
    if skipped := directory.source.get("skipped"):
        runtime.console.print(
            f"skipped {skipped} unreadable documents, the first: {directory.source['skipped_origins'][0]}"
        )
