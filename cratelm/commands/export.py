"""Write the model of a run, or its neurons, in the formats of other tools.

    cratelm export runs/crate-2l --format hf --out crate-2l            a Hugging Face directory with a model card
    cratelm export runs/crate-2l --format hf --push me/crate-2l        the same, to the hub
    cratelm export runs/crate-2l --format official --out ckpt.pt       a checkpoint as the released code has it
    cratelm export runs/crate-2l --format neuronrecord --out records   OpenAI's NeuronRecord, a JSON file per neuron
    cratelm export runs/crate-2l --format neuronpedia --out exports    Neuronpedia's jsonl.gz batches
    cratelm export runs/crate-2l --format csv --out tables --layer 1   a table per layer

Neurons need the records that `cratelm collect` wrote; scores and explanations go along where `cratelm interpret` made
them. Each layer appears whole or not at all; run again, it replaces what an earlier export wrote. docs/formats.md says
what stands where. A GPT-2 model becomes a stock GPT-2, which needs no cratelm.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.workflows.recorded import find_layers


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and where."""

    run: tyro.conf.Positional[Path]
    """Run directory; for hf and official also a model directory."""
    format: Literal["hf", "official", "neuronrecord", "neuronpedia", "csv"] = "hf"
    """hf, official: the model. neuronrecord, neuronpedia, csv: its neurons."""
    out: Path | None = None
    """Folder to write, or for official the file; a model is not written over what is there."""
    push: str | None = None
    """hf: the name on the hub to upload to, as you/name."""
    private: bool = False
    """hf: make the repository on the hub private, where it is new."""
    layer: tuple[int, ...] = ()
    """Zero-based layers; all that have records if left out."""
    mode: Mode = "fixed"
    """Which records."""
    tap: str = "neurons"
    """Which place of the model the records are of."""
    split: Literal["both", "explain", "score"] = "both"
    """neuronrecord: the excerpts for explaining, those for scoring, or both, interleaved for the official tools."""
    width: int | None = None
    """Tokens of the excerpts to write; the longest recorded if left out."""
    explainer: str = "lookup"
    """Who made the explanations to write."""
    model_id: str | None = None
    """neuronpedia: name of the model there; the run's name if left out."""
    creator_id: str | None = None
    """neuronpedia: id of the user there to whom the rows belong; its default user's if left out."""


def run(options: Options) -> None:
    """Write the export and print its path."""
    if options.push is not None and options.format != "hf":
        raise CrateError(f"--push uploads a model: use it with --format hf, not {options.format}")
    if options.out is None and options.push is None:
        also = ", or --push NAME" if options.format == "hf" else ""
        raise CrateError(f"nowhere to write to. Give --out PATH{also}")
    if options.format in ("hf", "official"):
        _export_model(options)
    elif options.out is not None:
        _export_neurons(options, options.out)


def _export_model(options: Options) -> None:
    from cratelm.hub import push_to_hub, write_directory

    if options.out is not None and options.out.exists():
        raise CrateError(f"--out must not exist, got {options.out}. Hint: use another --out, or remove it")
    if options.out is not None and options.format == "official":
        _official(options.run, options.out)
    elif options.out is not None:
        write_directory(options.run, options.out)
        print(options.out)
    if options.push is not None:
        print(push_to_hub(options.run, options.push, private=options.private or None))


def _official(folder: Path, out: Path) -> None:
    """Write a checkpoint with the steps and the loss of the run."""
    from cratelm.model.official import Provenance, write_official
    from cratelm.model.weights import find_model, load_model
    from cratelm.rundir import read_json

    path = folder / "run.json"
    run = read_json(path, made_by="cratelm train") if path.exists() else {}
    training, imported = run.get("training") or {}, run.get("imported") or {}
    steps = -(-training["tokens"] // training["batch_tokens"]) if training else imported.get("steps")
    said = Provenance(iter_num=steps, best_val_loss=imported.get("validation loss"))
    write_official(load_model(find_model(folder)), out, said)
    print(out)


def _export_neurons(options: Options, out: Path) -> None:
    layers = find_layers(options.run, options.mode, options.tap, options.layer)
    if options.format == "neuronrecord":
        from cratelm.report.export.neuronrecord import export_neuron_records

        export_neuron_records(
            options.run, out, layers, mode=options.mode, tap=options.tap, split=options.split,
            width=options.width,
        )  # fmt: skip
    elif options.format == "neuronpedia":
        from cratelm.report.export.neuronpedia import CREATOR_ID, export_neuronpedia

        export_neuronpedia(
            options.run, out, layers, mode=options.mode, tap=options.tap, explainer=options.explainer,
            width=options.width, model_id=options.model_id, creator_id=options.creator_id or CREATOR_ID,
        )  # fmt: skip
    else:
        _write_csv(options, out, layers)
    print(out)


def _write_csv(options: Options, out: Path, layers: list[int]) -> None:
    from cratelm.report.neuron_table import as_csv, open_table
    from cratelm.rundir import write_text

    for layer in layers:
        table = open_table(options.run, layer, mode=options.mode, tap=options.tap, explainer=options.explainer)
        write_text(out / f"layer_{layer:02d}.csv", as_csv(table))
