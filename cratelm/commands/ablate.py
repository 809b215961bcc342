"""Take neurons out and measure what the model loses: the change of loss on held-out text, document by document.

    cratelm ablate runs/crate-2l --data tokens --neuron 1/85 1/235
    cratelm ablate runs/crate-2l --data tokens --layer 1 --kind zero mean --tokens 20k
    cratelm ablate runs/crate-2l --data tokens --group 1/85,1/235
    cratelm ablate runs/crate-2l --data tokens --sae topk-4x-layer1 --layer 1

Each neuron is set to zero, or to its mean over the text, at every token. A positive change says that the model is worse
without it. --layer and --all measure every neuron, one at a time: in the last layer without running the model again,
since its logits are exact sums over neurons. The numbers go to ablation.json and ablation.jsonl in the run (or --out),
a figure to `report`; stopped and run again, it goes on where it was. With --sae the latents of an autoencoder are taken
out in the same way, its error kept (sae:1/85, --layer, --all); their numbers go to its folder in the run.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from cratelm.errors import CrateError
from cratelm.runtime import DeviceName, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from cratelm.steering.ablation import Ablation
    from cratelm.steering.ablation_file import AblationFile, AblationRow
    from cratelm.steering.place import SparseCoder
    from cratelm.workflows.opening import OpenModel

Kind = Literal["zero", "mean"]
Task = tuple[tuple[tuple[int, int], ...], Kind]
"""Neurons that are taken out together, and how."""
TOGETHER = 64
"""Neurons of a layer that are measured in one go: what a kill can cost."""
SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm ablate`."""

    run: tyro.conf.Positional[Path]
    """Run directory, model directory, or a Hugging Face name."""
    data: Path
    """Token directory to predict."""
    neuron: tuple[str, ...] = ()
    """Neurons to take out one at a time, as LAYER/NEURON."""
    group: tuple[str, ...] = ()
    """Neurons to take out together, as in 1/85,1/235; several groups one after the other."""
    layer: tuple[int, ...] = ()
    """Zero-based layers whose neurons to take out, all of them, one at a time."""
    all: bool = False
    """The same for every layer."""
    sae: Path | None = None
    """Sparse autoencoder whose latents to take out: a name in the run, or a folder that sae-lens wrote."""
    kind: tuple[Kind, ...] = ("zero",)
    """zero, mean, or both."""
    tokens: str = "20k"
    """Read the beginnings, a context each, of the first documents that hold so many tokens, as in 20k; or all."""
    split: str = "val"
    """Split to predict; held-out text by default."""
    tokenizer: str | None = None
    """Tokenizer of a nanoGPT directory, which has no tokens.json."""
    out: Path | None = None
    """Folder for the numbers and the figure; the run itself if left out."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Measure what is not measured yet, then print and draw."""
    from rich.console import Console

    from cratelm.rundir import claim, origin
    from cratelm.steering.ablation import Ablation, held_out, mean_change
    from cratelm.steering.ablation_file import AblationFile
    from cratelm.workflows.opening import open_model
    from cratelm.workflows.token_data import open_tokens, read_count

    limit = read_count(options.tokens)
    if not (options.neuron or options.group or options.layer or options.all):
        raise CrateError("no neuron was named. Give --neuron 1/85, --group 1/85,1/235, --layer 1 or --all")
    if not options.kind:
        raise CrateError("--kind names nothing. Give zero, mean or both")
    chosen = open_model(options.run, options.device)
    folder, own, coders, tap = _places(options, chosen)
    tasks = tasks_of(options, chosen, coders)
    data = open_tokens(chosen, options.data, options.tokenizer)
    tokens = data.tokens(options.split)
    text = held_out(tokens, data.documents(options.split), chosen.model, limit)
    console = Console(highlight=False, markup=False, emoji=False)
    with claim(folder):
        layers = sorted({layer for neurons, _ in tasks for layer, _ in neurons})
        ablation = Ablation(chosen.model, text, layers, coders=coders)
        plain, error = mean_change(text.by_document(1, ablation.plain), text.sizes)
        settings = {
            "model_hash": chosen.model_hash, "data_hash": data.splits[options.split].sha256, "split": options.split,
            "read": options.tokens, "tokens": int(text.real.sum()), "documents": len(text.sizes),
            "context": text.context, **own,
        }  # fmt: skip
        loss = {"nats_per_token": float(plain), "standard_error": _finite(float(error))}
        file = AblationFile(folder)
        done = file.open(settings, {"run": chosen.name, "plain": loss, "origin": origin()})
        _measure(ablation, file, [task for task in tasks if _key(task, coders) not in done])
    wanted = {_key(task, coders) for task in tasks}
    _report(console, chosen, folder, tap, [row for row in file.rows() if row.key in wanted], loss, settings, options)


def _places(options: Options, chosen: "OpenModel") -> tuple[Path, dict[str, str], dict[int, "SparseCoder"], str]:
    """Where the numbers go, what the file says of the autoencoder, the autoencoder by layer, and the records' tap."""
    if options.sae is None:
        if (folder := options.out or chosen.run) is None:
            raise CrateError(f"{options.run} is a model and no run. Name a folder for the result with --out")
        return folder, {}, {}, "neurons"
    from cratelm.sae.loading import find_sae, load_sae, saes_folder
    from cratelm.workflows.steering.autoencoders import open_coder

    coder, tap = open_coder(chosen, options.sae)
    found = find_sae(chosen.run or Path("."), options.sae)
    inside = chosen.run is not None and found.parent.resolve() == saes_folder(chosen.run).resolve()
    if options.out is None and not inside:
        raise CrateError(f"{options.sae} is no autoencoder of a run. Name a folder for the result with --out")
    own = {"sae_hash": load_sae(chosen.run or Path("."), options.sae).sae_hash}
    return options.out or found, own, {coder.layer: coder}, tap


def tasks_of(options: Options, chosen: "OpenModel", coders: Mapping[int, "SparseCoder"]) -> list[Task]:
    """Everything to measure, each thing once: groups and named neurons first, then whole layers.

    Of latents where there are `coders`.
    """
    from cratelm.steering.changes import Change, check_indices
    from cratelm.steering.place import neuron_places

    sizes = {layer: place.neurons for layer, place in neuron_places(chosen.model).items()}
    if coders:
        sizes = {layer: len(coder.directions) for layer, coder in coders.items()}
    what, latent = ("latents of the --sae", True) if coders else ("neurons", False)
    groups = [_neurons(text, "--group", latent) for text in options.group]
    for text in options.neuron:
        if len(found := _neurons(text, "--neuron", latent)) > 1:
            raise CrateError(f"--neuron {text!r} names several. Use --group to take them out together")
        groups.append(found)
    if missing := [layer for layer in options.layer if layer not in sizes]:
        there = f"there are {min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"there is {min(sizes)}"
        raise CrateError(f"there is no layer {missing[0]} with {what} ({there}). Give another --layer")
    for layer in sorted(sizes) if options.all else options.layer:
        groups += [((layer, neuron),) for neuron in range(sizes[layer])]
    asked = [
        Change(layer=layer, index=neuron, how="silence", latent=latent) for group in groups for layer, neuron in group
    ]
    check_indices(asked, sizes, what)
    return list(dict.fromkeys((group, kind) for kind in options.kind for group in groups))


def _neurons(text: str, flag: str, latent: bool) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:sae:)?(\d+)/(\d+)\s*", part)
        if match is not None and ("sae:" in part) != latent:
            raise CrateError(
                f"{flag} {text!r} names a neuron, and with --sae latents are taken out. Write sae:{part.strip()}"
                if latent else f"{flag} {text!r} names a latent of no autoencoder. Say which with --sae"
            )  # fmt: skip
        if match is None:
            raise CrateError(f"{flag} {text!r} is not understood. Write LAYER/NEURON, as in 1/85 (a group: 1/85,1/235)")
        found.append((int(match[1]), int(match[2])))
    return tuple(sorted(set(found)))


def _key(task: Task, coders: Mapping[int, "SparseCoder"]) -> tuple[tuple[str, ...], str]:
    from cratelm.steering.changes import SAE

    neurons, kind = task
    return tuple(f"{SAE if layer in coders else ''}{layer}/{neuron}" for layer, neuron in neurons), kind


def _measure(ablation: "Ablation", file: "AblationFile", tasks: Sequence[Task]) -> None:
    """Groups one by one, single neurons of a layer many at a time; every result is written when it is there."""
    from cratelm.steering.ablation import mean_change
    from cratelm.steering.ablation_file import AblationRow

    singles: dict[tuple[int, Kind], list[int]] = {}
    with progress_bar(f"ablate {file.folder.name}", total=len(tasks), unit="ablations") as bar:
        for neurons, kind in tasks:
            if len(neurons) == 1:
                singles.setdefault((neurons[0][0], kind), []).append(neurons[0][1])
                continue
            nats, error = mean_change(ablation.together(neurons, kind), ablation.text.sizes)
            names, _ = _key((neurons, kind), ablation.coders)
            file.append(
                AblationRow(
                    neurons=names, kind=kind, nats=float(nats), standard_error=_finite(float(error)), density=None
                )
            )
            bar.advance(1)
        for (layer, kind), indices in singles.items():
            for first in range(0, len(indices), TOGETHER):
                some = indices[first : first + TOGETHER]
                nats, error = mean_change(ablation.each(layer, some, kind), ablation.text.sizes)
                for at, neuron in enumerate(some):
                    file.append(
                        AblationRow(
                            neurons=_key((((layer, neuron),), kind), ablation.coders)[0], kind=kind,
                            nats=float(nats[at]), standard_error=_finite(float(error[at])),
                            density=float(ablation.densities[layer][neuron]),
                        )
                    )  # fmt: skip
                bar.advance(len(some), f"layer {layer}, {kind}")


def _finite(number: float) -> float | None:
    return None if number != number else number


def _report(
    console: "Console", chosen: "OpenModel", folder: Path, tap: str, rows: list["AblationRow"], loss: dict[str, Any],
    settings: dict[str, Any], options: Options,
) -> None:  # fmt: skip
    from cratelm.steering.ablation_file import strongest_first

    error = "" if loss["standard_error"] is None else f" ± {loss['standard_error']:.4f}"
    console.print(
        f"{chosen.name}: {loss['nats_per_token']:.4f}{error} nats per token on {settings['tokens']} tokens of "
        f"{settings['documents']} documents ({options.split})"
    )
    for kind in dict.fromkeys(options.kind):
        of_kind = strongest_first([row for row in rows if row.kind == kind])
        console.print(f"\nwithout them ({kind}), change of loss in nats per token", style="bold")
        console.print(_table(of_kind, console.width))
        certain = [abs(row.nats) > 2 * row.standard_error for row in of_kind if row.standard_error is not None]
        if len(of_kind) > 2 * SHOWN and certain:
            worse = sum(row.nats > 0 for row in of_kind)
            console.print(
                f"{len(of_kind)} in all: the loss rises without {worse} of them; for {sum(certain)} the change is more "
                "than two standard errors"
            )
    _draw(console, chosen, tap, rows, options.out or (folder if options.sae else folder / "report"))
    console.print(f"{folder / 'ablation.json'}, ablation.jsonl")


def _table(rows: Sequence["AblationRow"], columns: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("neuron", overflow="fold", max_width=max(12, columns - 40))
    for head in ("change", "± s.e.", "density %"):
        table.add_column(head, justify="right", no_wrap=True)
    shown = [*rows] if len(rows) <= 2 * SHOWN else [*rows[:SHOWN], None, *rows[-SHOWN // 2 :]]
    for row in shown:
        if row is None:
            table.add_row("...")
            continue
        error = "-" if row.standard_error is None else f"{row.standard_error:.1e}"
        density = "-" if row.density is None else f"{100 * row.density:.3g}"
        table.add_row(*map(Text, (" ".join(row.neurons), f"{row.nats:+.6f}", error, density)))
    return table


def _draw(console: "Console", chosen: "OpenModel", tap: str, rows: Sequence["AblationRow"], out: Path) -> None:
    """A figure for each kind of which single neurons were measured."""
    from cratelm.report.figures.form import write_figures
    from cratelm.report.figures.steering import ablation_figure

    for kind in dict.fromkeys(row.kind for row in rows):
        single = [row for row in rows if row.kind == kind and row.density is not None]
        if len(single) < SHOWN:
            continue
        scores, what = _scores(chosen, tap, single), "neuron" if tap == "neurons" else "latent"
        title = f"{chosen.name}: loss without a {what} ({kind}), {len(single)} {what}s"
        figure = ablation_figure([row.nats for row in single], [row.density or 0.0 for row in single], scores, title)
        if figure is not None:
            write_figures({f"ablation-{kind}": figure}, out)
            console.print(f"\n{out / f'ablation-{kind}.svg'}, ablation-{kind}.png")


def _scores(chosen: "OpenModel", tap: str, rows: Sequence["AblationRow"]) -> list[float | None]:
    """The score of each neuron where the run has one."""
    from cratelm.interpretation.store.database import Store
    from cratelm.report.neuron_table import open_table

    places = [tuple(map(int, row.neurons[0].removeprefix("sae:").split("/"))) for row in rows]
    found: dict[int, Any] = {}
    if chosen.run is not None and Store(chosen.run).path.exists():
        for layer in {layer for layer, _ in places}:
            if chosen.records(layer, tap) is not None:
                found[layer] = open_table(chosen.run, layer, tap=tap).scores
    scores = []
    for layer, neuron in places:
        own = found.get(layer)
        value = None if own is None else float(own.correlation[neuron])
        scores.append(None if value is None or value != value else value)
    return scores
