"""Read each neuron from its weights: tokens in, tokens out, neighbours in the next layer, heads.

    cratelm directions runs/crate-2l
    cratelm neurons runs/crate-2l --layer 1 --neuron 17

Tokens in drive the neuron, tokens out become more probable when it fires. Successors are neurons of the next layer that
it drives, predecessors neurons of the previous layer that drive it. Written to RUN/directions, where `cratelm neurons`
and the browser read it without the model. Works for Hugging Face models whose parts are recognised.
"""

from dataclasses import dataclass
from pathlib import Path

from cratelm.errors import check_least
from cratelm.rundir import claim, origin, write_json
from cratelm.runtime import console, progress_bar
from cratelm.workflows.opening import OpenModel, open_model
from cratelm.workflows.options.arguments import Device, RunPaths


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm directions`."""

    runs: RunPaths
    """Run directories: from `cratelm train`, or of Hugging Face models after `cratelm collect`."""
    keep: int = 20
    """Length of each list."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Write the directions of each run."""
    check_least(options, 1, "keep")
    for folder in options.runs:
        directions_run(folder, options)


def directions_run(folder: Path, options: Options) -> None:
    """Write the directions of one run, unless they exist already."""
    from cratelm.activations.direction_files import directions_folder
    from cratelm.data.tokenizer import tokenizer_hash

    opened = open_model(folder, options.device, expected="run")
    settings = {
        "model_hash": opened.model_hash, "tokenizer_hash": tokenizer_hash(opened.tokenizer), "keep": options.keep,
    }  # fmt: skip
    if (begin := opened.causal.row_beginning) is not None:  # else token lists are those of earlier versions
        settings["row_beginning"] = list(begin)
    home = directions_folder(folder)
    if _is_written(folder, settings):
        console.print(f"directions of this model are in {home}", soft_wrap=True)
        return
    with claim(folder):
        (home / "directions.json").unlink(missing_ok=True)  # its presence marks the layer files as complete
        written = _write(opened, options)
        write_json(home / "directions.json", settings | {"tap": "neurons", "layers": written, "origin": origin()})
    console.print(f"directions in {home}", soft_wrap=True)


def _is_written(folder: Path, settings: dict[str, object]) -> bool:
    from cratelm.activations.direction_files import described_directions, directions_folder

    if not (directions_folder(folder) / "directions.json").exists():
        return False
    described = described_directions(folder)
    return all(described.get(name) == value for name, value in settings.items())


def _write(opened: OpenModel, options: Options) -> dict[str, list[str]]:
    """Write a file for each layer and the tokenizer; return the lists of each layer."""
    from cratelm.activations.direction_files import directions_file
    from cratelm.activations.observe import observe
    from cratelm.checksums import checked_path, write_tensors
    from cratelm.data.tokenizer import vocabulary_size
    from cratelm.whitebox.directions import layer_directions, tokens_alone
    from cratelm.whitebox.wiring import wiring

    causal, weights = opened.causal, wiring(opened.model)
    vocabulary = min(vocabulary_size(opened.tokenizer), causal.vocabulary_rows)
    begin = causal.row_beginning
    lead = causal.special.end if begin is None else None  # `subject` puts `begin` before each row itself
    subject = observe(opened.model, model_hash=opened.model_hash, row_beginning=begin)
    with checked_path(opened.source / "directions" / "tokenizer.json") as temporary:
        opened.tokenizer.save(str(temporary))
    written = {}
    with progress_bar(f"directions {opened.source.name}", total=2 * vocabulary) as bar:
        alone = tokens_alone(
            subject, vocabulary=vocabulary, start=lead, device=causal.device, bar=bar, keep=options.keep,
        )  # fmt: skip
        for layer in range(len(weights.layers)):
            arrays = layer_directions(weights, layer, vocabulary=vocabulary, keep=options.keep) | alone[layer]
            write_tensors(directions_file(opened.source, layer), arrays)
            written[str(layer)] = sorted({name.split(".")[0] for name in arrays if name.endswith(".index")})
            bar.advance(vocabulary / len(weights.layers))
    return written
