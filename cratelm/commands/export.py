"""Write a run's neurons in the formats of other tools: OpenAI's NeuronRecord, Neuronpedia's export, or CSV tables.

    cratelm export runs/demo/crate-2l --format neuronrecord --out records
    cratelm export runs/demo/crate-2l --format neuronpedia --out exports --model-id my-crate
    cratelm export runs/demo/crate-2l --format csv --out tables --layer 1

Needs the records that `cratelm collect` wrote; scores and explanations go along where `cratelm interpret` made them.
Each layer appears whole or not at all; run again, it replaces what an earlier export wrote. docs/formats.md says what
stands where.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from cratelm.activations.records import Mode
from cratelm.commands.neurons import check_layers, find_layers


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to export, and where."""

    run: tyro.conf.Positional[Path]
    """Run directory with the records that `cratelm collect` wrote."""
    format: Literal["neuronrecord", "neuronpedia", "csv"]
    """neuronrecord: a JSON file per neuron. neuronpedia: jsonl.gz batches. csv: a table per layer."""
    out: Path
    """Folder to write to."""
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
    """Write the export, then print where it is."""
    found = find_layers(options.run, options.mode, options.tap)
    layers = sorted(set(options.layer)) or found
    check_layers(options.run, layers, found)
    if options.format == "neuronrecord":
        from cratelm.report.neuronrecord import export_neuron_records

        export_neuron_records(
            options.run, options.out, layers, mode=options.mode, tap=options.tap, split=options.split,
            width=options.width,
        )  # fmt: skip
    elif options.format == "neuronpedia":
        from cratelm.report.neuronpedia import CREATOR_ID, export_neuronpedia

        export_neuronpedia(
            options.run, options.out, layers, mode=options.mode, tap=options.tap, explainer=options.explainer,
            width=options.width, model_id=options.model_id, creator_id=options.creator_id or CREATOR_ID,
        )  # fmt: skip
    else:
        _write_csv(options, layers)
    print(options.out)


def _write_csv(options: Options, layers: list[int]) -> None:
    from cratelm.report.neuron_table import as_csv, open_table
    from cratelm.rundir import write_text

    for layer in layers:
        table = open_table(options.run, layer, mode=options.mode, tap=options.tap, explainer=options.explainer)
        write_text(options.out / f"layer_{layer:02d}.csv", as_csv(table))
