"""Measure the held-out loss of a trained model, and its loss on texts it was not trained for.

    cratelm evaluate runs/crate-2l --data tokens
    cratelm evaluate runs/crate-2l --zero-shot lambada,wikitext2,ptb --eval-data FOLDER

One deterministic pass over a split, or over every token of each text: nats per token with a standard error over
documents, perplexity, bits per byte; for LAMBADA also accuracy and perplexity of the last word. Printed, and written to
evaluation.json in the run directory, where each part replaces that of an earlier evaluation. The loss of every
document of a split goes to evaluation_documents.safetensors, which lets a report compare models on the same documents.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cratelm.errors import CrateError, check_least
from cratelm.rundir import claim, origin, read_json, write_json
from cratelm.runtime import progress_bar
from cratelm.workflows.opening import open_own
from cratelm.workflows.options.arguments import Device, RunPaths, SplitName, TokensTokenizer
from cratelm.workflows.token_data import open_tokens


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm evaluate`."""

    runs: RunPaths
    """Run directories."""
    data: Path | None = None
    """Token directory to measure the loss on."""
    tokenizer: TokensTokenizer = None
    split: SplitName = "val"
    zero_shot: str = ""
    """Texts to predict, with commas between: lambada, wikitext2, ptb, or paths of text files."""
    eval_data: str = "hub"
    """Folder with lambada_test.jsonl, wikitext2-test.txt and ptb-test.txt; or hub, which needs the extra hf."""
    batch: int = 16
    """Sequences per forward pass."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Evaluate each run; print a line for its held-out loss and a table for its zero-shot losses."""
    if options.data is None and not _names(options):
        raise CrateError("no text to evaluate on. Give --data DIR, or --zero-shot lambada,wikitext2,ptb")
    for folder in options.runs:
        if options.data is not None:
            result = evaluate_run(folder, options.data, options)
            print(
                f"{folder.name}: {result['nats_per_token']:.4f} ± {result['standard_error']:.4f} nats per token, "
                f"perplexity {result['perplexity']:.2f}, {result['bits_per_byte']:.4f} bits per byte "
                f"({result['tokens']} tokens of {result['documents']} {options.split} documents)"
            )
        if _names(options):
            print_table(folder.name, zero_shot_run(folder, options))


def evaluate_run(run_folder: Path, data_folder: Path, options: Options) -> dict[str, object]:
    """Evaluate one run on held-out tokens and write its evaluation.json."""
    from cratelm.training.evaluate import document_losses, summarise

    check_least(options, 1, "batch")
    opened, model = open_own(run_folder, options.device)
    data = open_tokens(opened, data_folder, options.tokenizer)
    tokens = data.tokens(options.split)
    with claim(run_folder), progress_bar(f"evaluate {run_folder.name}", total=len(tokens)) as bar:
        losses = document_losses(
            model, tokens, data.documents(options.split),
            batch=options.batch, bar=bar,
        )  # fmt: skip
        evaluation = summarise(losses, text_bytes=data.text_bytes(options.split))
        result = {"split": options.split, **asdict(evaluation), "data_hash": data.splits[options.split].sha256}
        _write_documents(run_folder, {"nats": losses.nats, "tokens": losses.tokens}, result)
        _write(run_folder, result | {"origin": origin()})
    return result


def zero_shot_run(run_folder: Path, options: Options) -> dict[str, dict[str, Any]]:
    """Evaluate one run on the named texts and write the losses under `zero_shot` of its evaluation.json."""
    from cratelm.training.zero_shot import zero_shot

    opened, model = open_own(run_folder, options.device)
    tokenizer = opened.tokenizer
    losses = {}
    with claim(run_folder):
        for name in _names(options):
            end = None if opened.special is None else opened.special.end
            measured = zero_shot(model, tokenizer, name, options.eval_data, batch=options.batch, end=end)
            losses[name] = measured | {"origin": origin()}
            _write(run_folder, {"zero_shot": _evaluated(run_folder).get("zero_shot", {}) | losses})
    return losses


def print_table(title: str, losses: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table with one line per text."""
    width = max(len("text"), *map(len, losses))
    columns = "   nats per token  perplexity  bits/byte   tokens  last word: %, perplexity"
    print(f"{title}, zero-shot\n{'text':{width}}{columns}")
    for name, row in losses.items():
        loss = f"{row['nats_per_token']:.4f} ± {row['standard_error']:.4f}"
        line = f"{name:{width}}  {loss:>15}  {row['perplexity']:10.6g}  {row['bits_per_byte']:9.4f}  {row['tokens']:7d}"
        if word := row.get("last_word"):
            line += f"  {100 * word['accuracy']:.2f} ± {100 * word['standard_error']:.2f}, {word['perplexity']:.4g}"
        print(line)


def _names(options: Options) -> list[str]:
    return [name for part in options.zero_shot.split(",") if (name := part.strip())]


def _evaluated(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "evaluation.json"
    return read_json(path, made_by=f"cratelm evaluate {run_folder} --data DIR") if path.exists() else {}


def _write(run_folder: Path, part: dict[str, Any]) -> None:
    """Replace a part of evaluation.json; other parts stay."""
    write_json(run_folder / "evaluation.json", _strict(_evaluated(run_folder) | part))


def _strict(value: Any) -> Any:
    """The value as strict JSON: null for NaN and infinity, such as an overflowing perplexity."""
    if isinstance(value, Mapping):
        return {name: _strict(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_documents(run_folder: Path, losses: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write the loss of every document, with the identity of the evaluation."""
    from cratelm.checksums import write_tensors
    from cratelm.report.results.loss import DOCUMENTS

    write_tensors(run_folder / DOCUMENTS, losses, split=result["split"], data_hash=result["data_hash"] or "")
