"""Measure the held-out loss of a trained model.

    cratelm evaluate runs/crate-2l --data tokens

One deterministic pass over a split: nats per token with a standard error over documents, perplexity, bits per byte.
Printed, and written to evaluation.json in the run directory.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from cratelm.errors import CrateError
from cratelm.runtime import DeviceName, progress_bar, select_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm evaluate`."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories."""
    data: Path
    """Token directory to predict."""
    tokenizer: str | None = None
    """Tokenizer of a nanoGPT directory, which has no tokens.json."""
    split: str = "val"
    """Split to predict."""
    batch: int = 16
    """Sequences per forward pass."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Evaluate each run and print a line for it."""
    for one in options.runs:
        result = evaluate_run(one, options.data, options)
        print(
            f"{one.name}: {result['nats_per_token']:.4f} ± {result['standard_error']:.4f} nats per token, perplexity "
            f"{result['perplexity']:.2f}, {result['bits_per_byte']:.4f} bits per byte ({result['tokens']} tokens of "
            f"{result['documents']} {options.split} documents)"
        )


def evaluate_run(run_folder: Path, data_folder: Path, options: Options) -> dict[str, object]:
    """Evaluate one run and write its evaluation.json."""
    from cratelm.commands.collect import open_tokens
    from cratelm.model.weights import load
    from cratelm.rundir import claim, origin, write_json
    from cratelm.training.evaluate import evaluate

    if options.batch < 1:
        raise CrateError(f"--batch is {options.batch}, it must be at least 1")
    model, tokenizer = load(run_folder)
    data = open_tokens(data_folder, options.tokenizer, tokenizer, run_folder)
    if data.vocab_size > model.config.vocab_size:
        raise CrateError(
            f"the tokens of {data_folder} come from a vocabulary of {data.vocab_size}, the model of {run_folder} has "
            f"{model.config.vocab_size} rows. Tokenize with the model's own tokenizer"
        )
    tokens = data.tokens(options.split)
    with claim(run_folder), progress_bar(f"evaluate {run_folder.name}", total=len(tokens)) as bar:
        evaluation = evaluate(
            model.to(select_device(options.device)), tokens, data.documents(options.split),
            text_bytes=data.text_bytes(options.split), batch=options.batch, bar=bar,
        )  # fmt: skip
        result = {"split": options.split, **asdict(evaluation), "data_hash": data.splits[options.split].sha256}
        write_json(run_folder / "evaluation.json", result | {"origin": origin()})
    return result
