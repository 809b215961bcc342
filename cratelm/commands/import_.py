"""Turn what was made elsewhere into a run: a released or nanoGPT checkpoint, a Hugging Face GPT-2, or neuron records.

    cratelm import ckpt-crate-12l.pt --out runs/crate-b
    cratelm import ckpt.pt --activation gelu --tokenizer none --out runs/nanogpt
    cratelm import gpt2 --out runs/gpt2
    cratelm import neurons/ --out runs/theirs

A .pt file is read without running any code in it. It carries no tokenizer: where the vocabulary is GPT-2's (50257, or
padded to 50304) GPT-2's is taken, from the hub unless --tokenizer names a folder; elsewhere none, and then only the
commands that need text refuse. A folder of OpenAI's NeuronRecord JSON (<layer>/<neuron>.json) becomes the records of a
run without a model, which interpret, neurons and export read.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from cratelm.errors import CrateError
from cratelm.runtime import console, human

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cratelm.model.language_model import LanguageModel

GPT2_VOCABULARIES = (50257, 50304)
"""Rows of an embedding for GPT-2's tokenizer: as it is, and padded to a multiple of 64."""


ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm import`."""

    checkpoint: tyro.conf.Positional[str]
    """A released checkpoint (.pt), a Hugging Face directory of GPT-2 or CRATE, a name on the hub, or a folder of
    neuron records."""
    out: Path
    """Run directory to write."""
    tokenizer: str | None = None
    """A tokenizer.json, its folder, a folder with encoder.json and vocab.bpe, a name on the hub, or none."""
    activation: Literal["relu", "gelu"] = "relu"
    """The nonlinearity of a GPT-2 in a .pt file, which does not say: relu as released, gelu as in nanoGPT."""


def run(options: Options) -> None:
    """Read the checkpoint and write a run directory."""
    from cratelm.model.weights import save_model
    from cratelm.rundir import claim, read_json, write_json
    from cratelm.training.train import write_run

    if (options.out / "run.json").exists() or (options.out / "model").exists():
        raise CrateError(f"{options.out} holds a run already. Use another --out, or remove it")
    path = Path(options.checkpoint)
    if (path / "neurons").is_dir() or any(path.glob("[0-9]*/[0-9]*.json")):
        from cratelm.activations.interchange import import_neuron_records

        with claim(options.out):
            records = import_neuron_records(path, options.out)
        console.print(f"records in {records}", soft_wrap=True)
        return
    if path.suffix in (".pt", ".pth", ".bin") and not path.exists():
        raise CrateError(f"{path} is not there. Name a checkpoint, a model directory or a name on the hub")
    model, tokenizer, said = _released(path, options) if path.is_file() else _hugging_face(options)
    if tokenizer is not None:
        _check(tokenizer, model, options)
    with claim(options.out):
        save_model(model, options.out / "model", tokenizer)
        write_run(options.out, model.config, training=None, control=None, of=None)
        written = read_json(options.out / "run.json", made_by="cratelm import")
        write_json(
            options.out / "run.json", written | {"imported": {"source": path.name or options.checkpoint, **said}}
        )
    size, text = human(float(model.config.num_parameters)), "with its tokenizer" if tokenizer else "no tokenizer"
    console.print(f"{options.out}: {model.config.arch}, {model.config.num_layers} layers, {size} parameters, {text}")


def _released(path: Path, options: Options) -> "tuple[LanguageModel, Tokenizer | None, dict[str, Any]]":
    """Model, tokenizer and what is known of the training, from a checkpoint of the released code or of nanoGPT."""
    from cratelm.data.tokenizer import load_tokenizer
    from cratelm.model.official import read_official

    if path.suffix == ".safetensors":
        raise CrateError(f"{path} holds weights alone. Name its folder, with the config.json beside it")
    model, said = read_official(path, activation=options.activation)
    if model.config.arch == "gpt2":
        other = "nanoGPT's own models: --activation gelu" if options.activation == "relu" else "the released: relu"
        console.print(f"read with {ACTIVATIONS[options.activation]} ({other}), which the file does not say")
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {"steps": said.iter_num, "validation loss": said.best_val_loss, "sha256": sha256}
    if options.tokenizer not in (None, "none"):
        return model, load_tokenizer(str(options.tokenizer)), facts
    if options.tokenizer is None and model.config.vocab_size in GPT2_VOCABULARIES:
        try:
            return model, load_tokenizer("gpt2"), facts
        except CrateError as error:
            raise CrateError(f"{error}. Here: --tokenizer FOLDER, or --tokenizer none to do without") from None
    return model, None, facts


def _hugging_face(options: Options) -> "tuple[LanguageModel, Tokenizer | None, dict[str, Any]]":
    """Model and tokenizer of a directory or of a name on the hub."""
    from cratelm.data.tokenizer import load_tokenizer
    from cratelm.model.weights import find_model, load_model

    folder = find_model(options.checkpoint)
    model = load_model(folder)
    if options.tokenizer == "none":
        return model, None, {}
    has_one = (folder / "tokenizer.json").exists() or (folder / "merges.txt").exists()
    named = options.tokenizer or (str(folder) if has_one else None)
    return model, None if named is None else load_tokenizer(named), {}


def _check(tokenizer: "Tokenizer", model: "LanguageModel", options: Options) -> None:
    """Refuse a tokenizer with ids that the model has no embedding of."""
    from cratelm.data.tokenizer import vocabulary_size

    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise CrateError(
            f"the tokenizer has {vocabulary_size(tokenizer)} ids, the model of {options.checkpoint} a vocabulary of "
            f"{model.config.vocab_size}. Name the model's own with --tokenizer, or none"
        )
