"""Write the model of a run for other tools.

    cratelm export runs/crate-2l --format hf --out crate-2l            a Hugging Face directory with a model card
    cratelm export runs/crate-2l --format hf --push me/crate-2l        the same, to the hub
    cratelm export runs/crate-2l --format official --out ckpt.pt       a checkpoint as the released code has it

A GPT-2 becomes a stock GPT-2, which needs no cratelm. A model that the released code does not know is refused for
`official`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from cratelm.errors import CrateError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm export`."""

    run: tyro.conf.Positional[Path]
    """Run directory or model directory."""
    format: Literal["hf", "official"] = "hf"
    """A Hugging Face directory, or one file in the format of the released code."""
    out: Path | None = None
    """Folder (hf) or file (official) to write; there must be none of that name."""
    push: str | None = None
    """For hf: the name on the hub to upload to, as you/name."""
    private: bool = False
    """Make the repository on the hub private, where it is new."""


def run(options: Options) -> None:
    """Write the model and print where it is."""
    if options.out is None and options.push is None:
        raise CrateError("nowhere to write to. Give --out PATH, or --push NAME with --format hf")
    if options.out is not None and options.out.exists():
        raise CrateError(f"{options.out} is there already. Use another --out, or remove it")
    if options.format == "official":
        _official(options)
        return
    from cratelm.hub import push_to_hub, write_directory

    if options.out is not None:
        write_directory(options.run, options.out)
        print(options.out)
    if options.push is not None:
        print(push_to_hub(options.run, options.push, private=options.private or None))


def _official(options: Options) -> None:
    """Write a checkpoint, with the steps and the loss that the run knows of."""
    from cratelm.model.official import Provenance, write_official
    from cratelm.model.weights import find_model, load_model
    from cratelm.rundir import read_json

    if options.out is None or options.push is not None:
        raise CrateError("an official checkpoint is a file: give --out FILE.pt, without --push")
    path = options.run / "run.json"
    run = read_json(path, made_by="cratelm train") if path.exists() else {}
    training, imported = run.get("training") or {}, run.get("imported") or {}
    steps = -(-training["tokens"] // training["batch_tokens"]) if training else imported.get("steps")
    said = Provenance(iter_num=steps, best_val_loss=imported.get("validation loss"))
    write_official(load_model(find_model(options.run)), options.out, said)
    print(options.out)
