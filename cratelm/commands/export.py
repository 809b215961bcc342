"""Write the model of a run, or its neurons, in the formats of other tools.

    cratelm export runs/crate-2l --format hf --out crate-2l            a Hugging Face directory with a model card
    cratelm export runs/crate-2l --format hf --push me/crate-2l        the same, to the hub
    cratelm export runs/crate-2l --format official --out ckpt.pt       a checkpoint as the released code has it
    cratelm export runs/crate-2l --format neuronrecord --out records   OpenAI's NeuronRecord, a JSON file per neuron
    cratelm export runs/crate-2l --format neuronpedia --out exports    Neuronpedia's jsonl.gz batches
    cratelm export runs/crate-2l --format csv --out tables --layer 1   a table per layer

Exports of neurons need the records that `cratelm collect` wrote, and include the scores and explanations of
`cratelm interpret`. A layer is written whole or not at all, and replaces the layer of an earlier export. The files are
described in docs/formats.md. A GPT-2 model becomes a stock GPT-2, which needs no cratelm.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.rundir import read_json, remove_leftovers, write_text
from cratelm.runtime import console
from cratelm.workflows.options.arguments import RunPath
from cratelm.workflows.recorded import find_layers


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm export`."""

    run: RunPath
    """Run directory; for hf and official also a model directory."""
    format: Literal["hf", "official", "neuronrecord", "neuronpedia", "csv"] = "hf"
    """hf, official: the model. neuronrecord, neuronpedia, csv: its neurons."""
    out: Path | None = None
    """Folder to write, for official the file. The path of a model must not exist."""
    push: str | None = None
    """hf: upload to this name on the Hugging Face hub, such as you/name."""
    private: bool = False
    """hf: create the repository on the hub as private."""
    layer: tuple[int, ...] = ()
    """Zero-based layers; by default all that have records."""
    mode: Mode = "fixed"
    """Mode of the records."""
    tap: str = "neurons"
    """Tap of the records: neurons, sae-NAME, or another tap given to `cratelm collect --tap`."""
    split: Literal["both", "explain", "score"] = "both"
    """neuronrecord: excerpts for explaining, for scoring, or both, interleaved as OpenAI's tools expect."""
    width: int | None = None
    """Length of the excerpts in tokens; by default the longest that is recorded."""
    explainer: str = "lookup"
    """Explainer of the explanations to write: lookup, or the name of a language model."""
    model_id: str | None = None
    """neuronpedia: name of the model on Neuronpedia; by default the run's name."""
    creator_id: str | None = None
    """neuronpedia: id of the user who owns the rows; by default Neuronpedia's default user."""


def run(options: Options) -> None:
    """Write the export and print its path."""
    if options.push is not None and options.format != "hf":
        raise CrateError(f"--push needs --format hf, got {options.format}")
    if options.out is None and options.push is None:
        raise CrateError(f"--out must be a path{' (or use --push NAME)' * (options.format == 'hf')}, got none")
    if options.format in ("hf", "official"):
        _export_model(options)
    elif options.out is not None:
        _export_neurons(options, options.out)


def _export_model(options: Options) -> None:
    from cratelm.hub import push_to_hub, write_directory

    if options.out is not None:
        if options.out.exists():
            if not _is_written(options, options.out):
                raise CrateError(f"--out must not exist, got {options.out}. Hint: use another --out, or remove it")
            remove_leftovers(options.out)
            console.print(f"{options.out} contains this model already; remove it to write it again", markup=False)
        else:
            write = _write_official if options.format == "official" else write_directory
            write(options.run, options.out)
        print(options.out)
    if options.push is not None:
        print(push_to_hub(options.run, options.push, private=options.private or None))


def _is_written(options: Options, out: Path) -> bool:
    """Whether `out` already is the complete export, written by a process that was stopped afterwards."""
    from cratelm.model.official import read_official
    from cratelm.model.weights import find_model, load_model, weights_hash

    model = load_model(find_model(options.run))
    activation: Literal["relu", "gelu"] = "gelu" if model.config.activation == "gelu" else "relu"
    try:
        official = options.format == "official"
        before = read_official(out, activation=activation)[0] if official else load_model(out)
    except CrateError:
        return False
    return weights_hash(before) == weights_hash(model) and (official or (out / "README.md").exists())


def _write_official(folder: Path, out: Path) -> None:
    """Write a checkpoint of the released code, with the steps and the loss of the run."""
    from cratelm.model.official import Provenance, write_official
    from cratelm.model.weights import find_model, load_model

    path = folder / "run.json"
    run = read_json(path, made_by="cratelm train") if path.exists() else {}
    training, imported = run.get("training") or {}, run.get("imported") or {}
    steps = -(-training["tokens"] // training["batch_tokens"]) if training else imported.get("steps")
    provenance = Provenance(iter_num=steps, best_val_loss=imported.get("validation loss"))
    write_official(load_model(find_model(folder)), out, provenance)


def _export_neurons(options: Options, out: Path) -> None:
    from cratelm.report.export.neuronpedia import CREATOR_ID, export_neuronpedia
    from cratelm.report.export.neuronrecord import export_neuron_records
    from cratelm.report.neuron_table import neurons_csv, open_table

    run, mode, tap, explainer = options.run, options.mode, options.tap, options.explainer
    layers = find_layers(run, mode, tap, options.layer)
    match options.format:
        case "neuronrecord":
            export_neuron_records(run, out, layers, mode=mode, tap=tap, split=options.split, width=options.width)
        case "neuronpedia":
            export_neuronpedia(
                run, out, layers, mode=mode, tap=tap, explainer=explainer, width=options.width,
                model_id=options.model_id, creator_id=options.creator_id or CREATOR_ID,
            )  # fmt: skip
        case _:
            for layer in layers:
                table = open_table(run, layer, mode=mode, tap=tap, explainer=explainer)
                write_text(out / f"layer_{layer:02d}.csv", neurons_csv(table))
    print(out)
