"""Ablate neurons: measure the change of loss on held-out text when neurons are removed.

    cratelm ablate runs/crate-2l --data tokens --neuron 1/85 1/235
    cratelm ablate runs/crate-2l --data tokens --layer 1 --kind zero mean --tokens 20k
    cratelm ablate runs/crate-2l --data tokens --group 1/85,1/235
    cratelm ablate runs/crate-2l --data tokens --sae topk-4x-layer1 --layer 1

A neuron's activation is set to zero, or to its mean over the text, at every token. A positive change means that the
model is worse without the neuron. --layer and --all ablate every neuron, one at a time; in the last layer without
running the model again, because its logits are exact sums over neurons. The numbers go to ablation.json and
ablation.jsonl in the run (or --out), a figure to `report`. An interrupted command resumes. --sae ablates latents of an
autoencoder with its error kept (sae:1/85, --layer, --all); their numbers go to the autoencoder's folder.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cratelm.errors import CrateError
from cratelm.rundir import claim, origin
from cratelm.runtime import progress_bar
from cratelm.steering.ablation_file import AblationFile, AblationKind, AblationRow
from cratelm.steering.changes import SAE, Change, check_indices
from cratelm.workflows.opening import OpenModel, open_model
from cratelm.workflows.options.arguments import Device, RunPath, SplitName, TokensTokenizer
from cratelm.workflows.steering.printing import plain_console, plain_table
from cratelm.workflows.token_data import open_tokens, read_count, row_beginning

if TYPE_CHECKING:
    from cratelm.steering.ablation import Ablation
    from cratelm.steering.place import SparseCoder

Task = tuple[tuple[tuple[int, int], ...], AblationKind]
"""(layer, neuron) of the neurons that are ablated together, and the kind."""
TOGETHER = 64
"""Single neurons per pass over the text; an interrupt loses at most this many results."""
ROWS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm ablate`."""

    run: RunPath
    """Run directory, model directory, or a Hugging Face name."""
    data: Path
    """Token directory with the held-out text."""
    neuron: tuple[str, ...] = ()
    """Neurons to ablate one at a time, as LAYER/NEURON."""
    group: tuple[str, ...] = ()
    """Neurons to ablate together, as in 1/85,1/235; each group is one measurement."""
    layer: tuple[int, ...] = ()
    """Layers (zero-based) to ablate all neurons of, one at a time."""
    all: bool = False
    """Ablate the neurons of every layer, one at a time."""
    sae: Path | None = None
    """Ablate latents of this sparse autoencoder: a name in the run, or a folder in the format of sae-lens."""
    kind: tuple[AblationKind, ...] = ("zero",)
    """Value that replaces the activation: zero, mean (over the text), or both in turn."""
    tokens: str = "20k"
    """About how many tokens to read, as in 20k: the first context of each document, so that many documents count; or
    all."""
    split: SplitName = "val"
    tokenizer: TokensTokenizer = None
    out: Path | None = None
    """Folder for the numbers and the figure; by default the run."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Measure what is missing, then print and draw."""
    from cratelm.steering.ablation import Ablation, held_out
    from cratelm.training.document_means import mean_over_documents

    limit = read_count(options.tokens)
    if not (options.neuron or options.group or options.layer or options.all):
        raise CrateError("no neuron was given. Use --neuron 1/85, --group 1/85,1/235, --layer 1 or --all")
    if not options.kind:
        raise CrateError("--kind must be zero, mean or both, got nothing")
    opened = open_model(options.run, options.device)
    folder, sae_settings, coders, tap = _places(options, opened)
    tasks = tasks_of(options, opened, coders)
    data = open_tokens(opened, options.data, options.tokenizer)
    tokens = data.tokens(options.split)
    begin = row_beginning(opened, data) or ()
    text = held_out(tokens, data.documents(options.split), opened.model, limit, begin)
    with claim(folder):
        layers = sorted({layer for neurons, _ in tasks for layer, _ in neurons})
        ablation = Ablation(opened.model, text, layers, coders=coders)
        plain, error = mean_over_documents(text.by_document(1, ablation.plain), text.sizes)
        settings = {
            "model_hash": opened.model_hash, "data_hash": data.splits[options.split].sha256, "split": options.split,
            "read": options.tokens, "tokens": int(text.real.sum()), "documents": len(text.sizes),
            "context": text.context, **sae_settings, **({"row_beginning": list(begin)} if begin else {}),
        }  # fmt: skip
        loss = {"nats_per_token": float(plain), "standard_error": _finite(float(error))}
        file = AblationFile(folder)
        done = file.open(settings, {"run": opened.name, "plain": loss, "origin": origin()})
        _measure(ablation, file, [task for task in tasks if _key(task, coders) not in done])
    keys = {_key(task, coders) for task in tasks}
    rows = [row for row in file.rows() if row.key in keys]
    console = plain_console()
    plain_error = "" if loss["standard_error"] is None else f" ± {loss['standard_error']:.4f}"
    console.print(
        f"{opened.name}: {plain:.4f}{plain_error} nats per token on {settings['tokens']} tokens of "
        f"{settings['documents']} documents ({options.split})"
    )
    _print(console, rows)
    _draw(console, opened, tap, rows, options.out or (folder if options.sae else folder / "report"))
    console.print(f"{folder / 'ablation.json'}, ablation.jsonl")


def _places(options: Options, opened: OpenModel) -> tuple[Path, dict[str, str], dict[int, "SparseCoder"], str]:
    """The folder for the numbers, the settings and layer of the autoencoder, and the tap of the records."""
    if options.sae is None:
        if (folder := options.out or opened.run) is None:
            raise CrateError(f"{options.run} is a model, not a run, so --out must name a folder for the numbers")
        return folder, {}, {}, "neurons"
    from cratelm.sae.loading import find_sae, load_sae, saes_folder
    from cratelm.workflows.steering.autoencoders import open_coder

    coder, tap = open_coder(opened, options.sae)
    folder = find_sae(opened.run or Path("."), options.sae)
    inside = opened.run is not None and folder.parent.resolve() == saes_folder(opened.run).resolve()
    if options.out is None and not inside:
        raise CrateError(f"{options.sae} is not an autoencoder of a run, so --out must name a folder for the numbers")
    settings = {"sae_hash": load_sae(opened.run or Path("."), options.sae).sae_hash}
    return options.out or folder, settings, {coder.layer: coder}, tap


def tasks_of(options: Options, opened: OpenModel, coders: Mapping[int, "SparseCoder"]) -> list[Task]:
    """All measurements without duplicates: groups, single neurons, then whole layers. With `coders`, of latents."""
    from cratelm.steering.place import neuron_places

    sizes = {layer: place.neurons for layer, place in neuron_places(opened.model).items()}
    if coders:
        sizes = {layer: len(coder.directions) for layer, coder in coders.items()}
    what, latent = ("latents of the --sae", True) if coders else ("neurons", False)
    groups = [_neurons(text, "--group", latent) for text in options.group]
    for text in options.neuron:
        if len(neurons := _neurons(text, "--neuron", latent)) > 1:
            raise CrateError(f"--neuron takes single neurons, got {text!r}. Use --group to ablate them together")
        groups.append(neurons)
    if missing := [layer for layer in options.layer if layer not in sizes]:
        layers = ", ".join(map(str, sorted(sizes)))
        raise CrateError(f"--layer must be a layer with {what} ({layers}), got {missing[0]}")
    for layer in sorted(sizes) if options.all else options.layer:
        groups += [((layer, neuron),) for neuron in range(sizes[layer])]
    check_indices(
        [Change(layer=layer, index=index, how="silence", latent=latent) for group in groups for layer, index in group],
        sizes, what,
    )  # fmt: skip
    return list(dict.fromkeys((group, kind) for kind in options.kind for group in groups))


def _neurons(text: str, flag: str, latent: bool) -> tuple[tuple[int, int], ...]:
    neurons = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:sae:)?(\d+)/(\d+)\s*", part)
        if match is not None and ("sae:" in part) != latent:
            raise CrateError(
                f"{flag} must name latents with --sae, got {text!r}. Write sae:{part.strip()}"
                if latent else f"{flag} {text!r} names a latent, so --sae must name its autoencoder"
            )  # fmt: skip
        if match is None:
            raise CrateError(f"{flag} must be LAYER/NEURON, such as 1/85 (a group: 1/85,1/235), got {text!r}")
        neurons.append((int(match[1]), int(match[2])))
    return tuple(sorted(set(neurons)))


def _key(task: Task, coders: Mapping[int, "SparseCoder"]) -> tuple[tuple[str, ...], str]:
    neurons, kind = task
    return tuple(f"{SAE if layer in coders else ''}{layer}/{neuron}" for layer, neuron in neurons), kind


def _measure(ablation: "Ablation", file: AblationFile, tasks: Sequence[Task]) -> None:
    """Measure groups one by one and single neurons `TOGETHER` at a time, writing each result at once."""
    from cratelm.training.document_means import mean_over_documents

    def record(task: Task, nats: Any, error: Any, density: float | None) -> None:
        names, kind = _key(task, ablation.coders)[0], task[1]
        file.append(AblationRow(
            neurons=names, kind=kind, nats=float(nats), standard_error=_finite(float(error)), density=density
        ))  # fmt: skip

    singles: dict[tuple[int, AblationKind], list[int]] = {}
    with progress_bar(f"ablate {file.folder.name}", total=len(tasks), unit="ablations") as bar:
        for neurons, kind in tasks:
            if len(neurons) == 1:
                singles.setdefault((neurons[0][0], kind), []).append(neurons[0][1])
                continue
            nats, error = mean_over_documents(ablation.together(neurons, kind), ablation.text.sizes)
            record((neurons, kind), nats, error, None)
            bar.advance(1)
        for (layer, kind), indices in singles.items():
            for first in range(0, len(indices), TOGETHER):
                chunk = indices[first : first + TOGETHER]
                nats, error = mean_over_documents(ablation.each(layer, chunk, kind), ablation.text.sizes)
                for at, neuron in enumerate(chunk):
                    record((((layer, neuron),), kind), nats[at], error[at], float(ablation.densities[layer][neuron]))
                bar.advance(len(chunk), f"layer {layer}, {kind}")


def _finite(number: float) -> float | None:
    return None if number != number else number


def _print(console: Console, rows: Sequence[AblationRow]) -> None:
    for kind in dict.fromkeys(row.kind for row in rows):
        strongest = sorted((row for row in rows if row.kind == kind), key=lambda row: -row.nats)
        console.print(f"\nablated ({kind}), change of loss in nats per token", style="bold")
        console.print(_table(strongest, console.width))
        certain = [abs(row.nats) > 2 * row.standard_error for row in strongest if row.standard_error is not None]
        if len(strongest) > 2 * ROWS_SHOWN and certain:
            console.print(
                f"{len(strongest)} measured: ablating {sum(row.nats > 0 for row in strongest)} of them raises the "
                f"loss; {sum(certain)} changes exceed two standard errors"
            )


def _table(rows: Sequence[AblationRow], columns: int) -> Table:
    table = plain_table()
    table.add_column("neuron", overflow="fold", max_width=max(12, columns - 40))
    for head in ("change", "± s.e.", "density %"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in [*rows] if len(rows) <= 2 * ROWS_SHOWN else [*rows[:ROWS_SHOWN], None, *rows[-ROWS_SHOWN // 2 :]]:
        if row is None:
            table.add_row("...")
            continue
        error = "-" if row.standard_error is None else f"{row.standard_error:.1e}"
        density = "-" if row.density is None else f"{100 * row.density:.3g}"
        table.add_row(*map(Text, (" ".join(row.neurons), f"{row.nats:+.6f}", error, density)))
    return table


def _draw(console: Console, opened: OpenModel, tap: str, rows: Sequence[AblationRow], out: Path) -> None:
    """One figure per kind, of the single neurons, if there are enough."""
    from cratelm.report.figures.form import write_figures
    from cratelm.report.figures.steering import ablation_figure

    for kind in dict.fromkeys(row.kind for row in rows):
        single = [row for row in rows if row.kind == kind and row.density is not None]
        if len(single) < ROWS_SHOWN:
            continue
        scores, what = _scores(opened, tap, single), "neuron" if tap == "neurons" else "latent"
        title = f"{opened.name}: change of loss when one {what} is ablated ({kind}), {len(single)} {what}s"
        figure = ablation_figure([row.nats for row in single], [row.density or 0.0 for row in single], scores, title)
        if figure is not None:
            write_figures({f"ablation-{kind}": figure}, out)
            console.print(f"\n{out / f'ablation-{kind}.svg'}, ablation-{kind}.png")


def _scores(opened: OpenModel, tap: str, rows: Sequence[AblationRow]) -> list[float | None]:
    """The score of each neuron; None if the run has none."""
    from cratelm.interpretation.store.database import Store
    from cratelm.report.neuron_table import open_table

    places = [tuple(map(int, row.neurons[0].removeprefix("sae:").split("/"))) for row in rows]
    tables: dict[int, Any] = {}
    if opened.run is not None and Store(opened.run).path.exists():
        for layer in {layer for layer, _ in places}:
            if opened.records(layer, tap) is not None:
                tables[layer] = open_table(opened.run, layer, tap=tap).scores
    scores = []
    for layer, neuron in places:
        table = tables.get(layer)
        scores.append(None if table is None else _finite(float(table.correlation[neuron])))
    return scores
