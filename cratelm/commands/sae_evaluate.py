"""Measure autoencoders on held-out text: sparsity, reconstruction error, and the effect on the model's loss.

    cratelm sae evaluate runs/crate-2l runs/gpt2-2l --data tokens
    cratelm sae evaluate runs/gpt2-2l --sae topk-4x-layer1 --data tokens --tokens 200k

The activation is replaced with the autoencoder's reconstruction, with zeros and with its mean; CE is the model's loss
in nats per token. Compare models by CE added and FVU, not by CE recovered: no residual path bypasses the code of a
CRATE block, so zeros there destroy the model and any autoencoder recovers most of the loss. The table is printed;
evaluation.json and density.svg are written to the folder of the autoencoder. Next: cratelm collect RUN --sae NAME.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cratelm.errors import CrateError, check_least
from cratelm.rundir import claim, origin, write_json
from cratelm.runtime import progress_bar, select_device
from cratelm.workflows.opening import open_for_run
from cratelm.workflows.options.arguments import Device, RunPaths, SplitName, TokensTokenizer
from cratelm.workflows.token_data import open_corpus, read_count, row_beginning

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from cratelm.data.tokens import TokenDirectory

PRINTED_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("L0", "l0", ".1f"), ("FVU", "fvu", ".3f"), ("cosine", "cosine", ".3f"), ("bias", "relative_bias", ".3f"),
    ("dead", "dead_share", ".1%"), ("CE added", "ce_added", ".4f"), ("zero", "recovered_zero", ".3f"),
    ("mean", "recovered_mean", ".3f"), ("model", "kept_model", ".3f"),
)  # fmt: skip
"""Heading, key and format of the printed columns; the last three are shares recovered."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm sae evaluate`."""

    runs: RunPaths
    """Run directories."""
    data: Path
    """Token directory to evaluate on."""
    sae: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Names of autoencoders, or the folder of one from elsewhere. Default: all of the run."""
    tap: str | None = None
    """Activations of an autoencoder from elsewhere whose files name none: neurons, heads, residual, or a module."""
    layer: int | None = None
    """Zero-based layer of an autoencoder from elsewhere whose files name none."""
    tokenizer: TokensTokenizer = None
    split: SplitName = "val"
    tokens: str = "all"
    """Number of tokens to read from the start, such as 200k or 1M; or all."""
    context: int | None = None
    """Tokens per row. Default: the model's context, at most 1024 for a Hugging Face model."""
    batch_rows: int = 16
    """Rows of tokens per forward pass."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Evaluate the autoencoders of each run and print a table."""
    from cratelm.sae.loading import sae_names

    check_least(options, 1, "batch_rows")
    for source in options.runs:
        names = options.sae or tuple(sae_names(source))
        if not names:
            raise CrateError(
                f"{source} must have an autoencoder, got none. Hint: cratelm sae train {source} --data {options.data} "
                "--layer N"
            )
        results = evaluate_saes(source, names, options)
        print("\n".join([f"\n{source.name}, {options.split}", *table_lines(results), *notes(results)]))


def evaluate_saes(source: Path, names: Sequence[str], options: Options) -> dict[str, dict[str, Any]]:
    """Evaluate autoencoders of one run; write evaluation.json and density.svg for each."""
    from cratelm.activations.observe import observe
    from cratelm.data.tokens import TokenDirectory
    from cratelm.report.figures.sae import write_density
    from cratelm.sae.evaluation import evaluate_sae
    from cratelm.sae.loading import check_trained_on, find_sae, load_sae, saes_folder

    max_tokens, device = read_count(options.tokens), select_device(options.device)
    saes = [load_sae(source, name, tap=options.tap, layer=options.layer, device=device) for name in names]
    opened, _ = open_for_run(source, device, out=None, data=options.data)
    corpus, _ = open_corpus(opened, options.data, options.split, options.tokenizer)
    frequencies = _frequencies(TokenDirectory.open(options.data, tokenizer=options.tokenizer), options.split)
    model, results = opened.model, {}
    total = 2 * min(max_tokens or len(corpus.tokens), len(corpus.tokens)) * len(saes)
    with progress_bar(f"evaluate {source.name}", total=total) as bar:
        for name, sae in zip(names, saes, strict=True):
            check_trained_on(sae, opened.model_hash, source)
            check_name_is_free(source, sae.name, find_sae(source, name))
            sae.place(model)
            subject = observe(
                model,
                model_hash=opened.model_hash,
                tap=sae.tap,
                layers=(sae.layer,),
                context=options.context,
                row_beginning=row_beginning(opened, corpus),
            )
            result = evaluate_sae(
                model, sae, subject, corpus, max_tokens=max_tokens, at_once=options.batch_rows, bar=bar,
                unigram=frequencies,
            )  # fmt: skip
            folder = saes_folder(source) / sae.name
            described = {
                "name": sae.name, "kind": sae.description.get("kind", sae.architecture), "tap": sae.tap,
                "layer": sae.layer, "d_in": sae.d_in, "width": sae.width, "parameters": sae.num_parameters,
                "sae_hash": sae.sae_hash, "model_hash": opened.model_hash, **corpus.identity,
                "context": subject.context,
            }  # fmt: skip
            results[sae.name] = described | result
            with claim(folder):
                write_json(folder / "evaluation.json", results[sae.name] | {"origin": origin()})
                write_density(results[sae.name], folder)
    return results


def check_name_is_free(run_folder: Path, name: str, folder: Path) -> None:
    """Refuse an autoencoder from elsewhere if the run has another one of the same name: their results would mix."""
    from cratelm.sae.loading import CONFIG, saes_folder

    inside = saes_folder(run_folder) / name
    if (inside / CONFIG).exists() and inside.resolve() != folder.resolve():
        raise CrateError(
            f"the folder {folder} must not have the name of an autoencoder in {run_folder}, got {name}. Hint: rename it"
        )


def _frequencies(data: "TokenDirectory", split: str) -> "Callable[[np.ndarray], float]":
    """The loss of predicting by token frequency in the training split, or in the read split if it is the only one."""
    import numpy as np

    from cratelm.sae.evaluation import unigram_loss

    tokens_seen = data.tokens("train" if "train" in data.splits else split)
    counts = np.bincount(tokens_seen, minlength=data.vocab_size)
    return lambda tokens: unigram_loss(counts, tokens)


def table_lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A heading and a line for each autoencoder."""
    width = max(len("autoencoder"), *map(len, results))
    lines = [f"{'autoencoder':{width}}" + "".join(f"{head:>9}" for head, _, _ in PRINTED_COLUMNS)]
    for name, row in results.items():
        cells = ("-" if row[key] is None else format(row[key], shape) for _, key, shape in PRINTED_COLUMNS)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>9}" for cell in cells))
    return lines


def notes(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the numbers come from and how to read them."""
    first = next(iter(results.values()))
    lines = [
        f"{first['tokens']} tokens of {first['documents']} documents; CE: {first['ce']:.4f} nats per token.",
        "zero, mean: share of CE recovered, relative to replacing the activation with zeros or its mean;",
        "model: share of the gain over token frequencies that is kept. Compare models by CE added and FVU.",
    ]
    inflated = [row for row in results.values() if (row["recovered_zero"] or 0) > 0 and _deletes(row)]
    if inflated:
        cost = max(row["ce_zero"] - row["ce"] for row in inflated)
        lines += [
            f"Replacing this activation with zeros costs {cost:.2f} nats, about the model's gain over frequencies:",
            "no path bypasses it, so the shares under zero and mean are inflated.",
        ]
    return lines


def _deletes(row: Mapping[str, Any]) -> bool:
    """Whether replacing the activation with zeros removes at least 90 % of the model's gain over frequencies."""
    return row["ce_zero"] - row["ce"] >= 0.9 * (row["ce_unigram"] - row["ce"])
