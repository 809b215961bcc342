"""Measure autoencoders on held-out text: how sparse and faithful they are, and what they cost the model.

    cratelm sae evaluate runs/crate-2l runs/gpt2-2l --data tokens
    cratelm sae evaluate runs/gpt2-2l --sae topk-4x-layer1 --data tokens --tokens 200k

Each autoencoder's reconstruction takes the place of the activation, and so do zeros and the mean activation. CE is the
model's loss in nats per token. CE added and FVU compare between models; CE recovered does not: without its code a CRATE
block gives nothing, since no residual leads round it, so everything recovers most of that. Printed as a table, and
written to evaluation.json and density.svg beside the autoencoder. Next: cratelm collect RUN --sae NAME.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cratelm.errors import CrateError
from cratelm.runtime import DeviceName, progress_bar, select_device

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from cratelm.data.tokens import TokenDirectory

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("L0", "l0", ".1f"), ("FVU", "fvu", ".3f"), ("cosine", "cosine", ".3f"), ("bias", "relative_bias", ".3f"),
    ("dead", "dead_share", ".1%"), ("CE added", "ce_added", ".4f"), ("zero", "recovered_zero", ".3f"),
    ("mean", "recovered_mean", ".3f"), ("model", "kept_model", ".3f"),
)  # fmt: skip
"""Head, key and format of the printed numbers; the last three are the shares recovered."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm sae evaluate`."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    """Run directories."""
    data: Path
    """Token directory to read."""
    sae: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")] = ()
    """Autoencoders by name, or one that sae-lens wrote elsewhere by its folder; all of the run if left out."""
    tap: str | None = None
    """Which activations one from elsewhere reads, where its files do not say: neurons, heads, residual, or a module."""
    layer: int | None = None
    """The zero-based layer of one from elsewhere."""
    tokenizer: str | None = None
    """Tokenizer of a nanoGPT directory, which has no tokens.json, or of a model that holds none."""
    split: str = "val"
    """Split to read; held-out text by default."""
    tokens: str = "all"
    """Read so many tokens from the start, as in 200k or 1M; or all."""
    context: int | None = None
    """Tokens per row; by default the model's context, for a Hugging Face model at most 1024."""
    batch_rows: int = 16
    """Rows of tokens per forward pass."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Evaluate the autoencoders of each run and print a table."""
    from cratelm.sae.loading import sae_names

    if not options.runs:
        raise CrateError("no run directory was named. Run: cratelm sae evaluate RUN --data DIR")
    if options.batch_rows < 1:
        raise CrateError(f"--batch-rows is {options.batch_rows}, it must be at least 1")
    for one in options.runs:
        names = options.sae or tuple(sae_names(one))
        if not names:
            raise CrateError(f"{one} has no autoencoder. Run: cratelm sae train {one} --data {options.data} --layer N")
        found = evaluate_run(one, names, options)
        print("\n".join([f"\n{one.name}, {options.split}", *table(found), *notes(found)]))


def evaluate_run(source: Path, names: Sequence[str], options: Options) -> dict[str, dict[str, Any]]:
    """Evaluate some autoencoders of one run and write evaluation.json and a figure beside each."""
    from cratelm.activations.observe import observe
    from cratelm.data.tokens import TokenDirectory
    from cratelm.report.figures.sae import write_density
    from cratelm.rundir import claim, origin, write_json
    from cratelm.sae.evaluation import evaluate_sae
    from cratelm.sae.loading import check_trained_on, find_sae, load_sae, saes_folder
    from cratelm.workflows.opening import open_for_run
    from cratelm.workflows.token_data import open_corpus, read_count

    max_tokens, device = read_count(options.tokens), select_device(options.device)
    saes = [load_sae(source, name, tap=options.tap, layer=options.layer, device=device) for name in names]
    opened, _ = open_for_run(source, device, out=None, data=options.data)
    corpus, _ = open_corpus(opened, options.data, options.split, options.tokenizer)
    frequencies = _frequencies(TokenDirectory.open(options.data, tokenizer=options.tokenizer), options.split)
    model, found = opened.model, {}
    total = 2 * min(max_tokens or len(corpus.tokens), len(corpus.tokens)) * len(saes)
    with progress_bar(f"evaluate {source.name}", total=total) as bar:
        for name, sae in zip(names, saes, strict=True):
            check_trained_on(sae, opened.model_hash, source)
            check_own_name(source, sae.name, find_sae(source, name))
            sae.place(model)
            subject = observe(
                model, model_hash=opened.model_hash, tap=sae.tap, layers=(sae.layer,), context=options.context
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
            found[sae.name] = described | result
            with claim(folder):
                write_json(folder / "evaluation.json", found[sae.name] | {"origin": origin()})
                write_density(found[sae.name], folder)
    return found


def check_own_name(run_folder: Path, name: str, folder: Path) -> None:
    """Refuse one from elsewhere whose results would lie beside another autoencoder, of the same name, in the run."""
    from cratelm.sae.loading import CONFIG, saes_folder

    inside = saes_folder(run_folder) / name
    if (inside / CONFIG).exists() and inside.resolve() != folder.resolve():
        raise CrateError(
            f"{run_folder} has another autoencoder of the name {name}. Give the folder {folder} another name"
        )


def _frequencies(data: "TokenDirectory", split: str) -> "Callable[[np.ndarray], float]":
    """The loss of a predictor by the frequencies of the training split; of the read split where there is no other."""
    import numpy as np

    from cratelm.sae.evaluation import unigram_loss

    seen = data.tokens("train" if "train" in data.splits else split)
    counts = np.bincount(seen, minlength=data.vocab_size)
    return lambda tokens: unigram_loss(counts, tokens)


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each autoencoder, under heads; the shares recovered stand last."""
    width = max(len("autoencoder"), *map(len, found))
    lines = [f"{'autoencoder':{width}}" + "".join(f"{head:>9}" for head, _, _ in COLUMNS)]
    for name, row in found.items():
        cells = ("-" if row[key] is None else format(row[key], shape) for _, key, shape in COLUMNS)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>9}" for cell in cells))
    return lines


def notes(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the numbers are of and how to read them."""
    one = next(iter(found.values()))
    lines = [
        f"{one['tokens']} tokens of {one['documents']} documents; the model's CE is {one['ce']:.4f} nats per token.",
        "zero, mean, model: share of CE recovered, of what zeros or the mean activation cost, and of",
        "what the model gains over token frequencies. Compare models by CE added and FVU.",
    ]
    inflated = [row for row in found.values() if (row["recovered_zero"] or 0) > 0 and _deletes(row)]
    if inflated:
        cost = max(row["ce_zero"] - row["ce"] for row in inflated)
        lines += [
            f"Zeros here cost {cost:.2f} nats, about all that the model gains over frequencies or more:",
            "no path leads round this activation, so the shares under zero and mean are inflated.",
        ]
    return lines


def _deletes(row: Mapping[str, Any]) -> bool:
    """Whether zeros in the activation's place leave the model hardly anything of what it gains over frequencies."""
    return row["ce_zero"] - row["ce"] >= 0.9 * (row["ce_unigram"] - row["ce"])
