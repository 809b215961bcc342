"""Make a run from a released or nanoGPT checkpoint, from a Hugging Face GPT-2, or from neuron records.

    cratelm import ckpt-crate-12l.pt --out runs/crate-b
    cratelm import ckpt.pt --activation gelu --tokenizer none --out runs/nanogpt
    cratelm import gpt2 --out runs/gpt2
    cratelm import gpt2.Q8_0.gguf --out runs/gpt2-q8
    cratelm import neurons/ --out runs/theirs

A .pt file is read without running code in it. It has no tokenizer: for a vocabulary of GPT-2's size (50257, or 50304
with padding) GPT-2's tokenizer is used, from the hub unless --tokenizer names a folder. Otherwise the run has no
tokenizer, and commands that need text refuse it. A folder of OpenAI's NeuronRecord JSON (<layer>/<neuron>.json)
becomes a run with records but without a model, for interpret, neurons and export. The same command again finishes an
import that was stopped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from cratelm.errors import CrateError
from cratelm.gguf_files import is_gguf
from cratelm.rundir import claim, read_json, remove_leftovers
from cratelm.runtime import console, human

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from cratelm.model.language_model import LanguageModel

GPT2_VOCABULARIES = (50257, 50304)
"""Sizes of the embedding for GPT-2's tokenizer: exact, and padded to a multiple of 64."""
ACTIVATIONS = {"relu": "ReLU", "gelu": "GELU"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm import`."""

    checkpoint: tyro.conf.Positional[str]
    """A released checkpoint (.pt), a Hugging Face directory of GPT-2 or CRATE, a name on the hub, or a folder of
    neuron records."""
    out: Path
    """Run directory to create."""
    tokenizer: str | None = None
    """A tokenizer.json or its folder, a folder with encoder.json and vocab.bpe, a name on the hub, or none."""
    activation: Literal["relu", "gelu"] = "relu"
    """The nonlinearity of a GPT-2 in a .pt file, which does not record it: relu as released, gelu as in nanoGPT."""
    begin_token: str | None = None
    """Token that stands before every text; by default none, or the bos_token of a model directory whose
    tokenizer_config.json says add_bos_token."""
    end_token: str | None = None
    """Token that ends a document; by default <|endoftext|>, or the eos_token that the model directory names."""


def run(options: Options) -> None:
    """Read the checkpoint and write a run directory."""
    from cratelm.model.weights import save_model
    from cratelm.training.opening import write_run

    path = Path(options.checkpoint)
    if (path / "neurons").is_dir() or any(path.glob("[0-9]*/[0-9]*.json")):
        from cratelm.activations.interchange import import_neuron_records

        with claim(options.out):
            records = import_neuron_records(path, options.out)
        console.print(f"records in {records}", soft_wrap=True)
        return
    if path.suffix in (".pt", ".pth", ".bin") and not path.exists():
        raise CrateError(f"{path} does not exist. Hint: give a checkpoint, a model directory or a name on the hub")
    is_checkpoint = path.is_file() and not is_gguf(path)
    model, tokenizer, facts = _read_checkpoint(path, options) if is_checkpoint else _read_hugging_face(options)
    begin = end = None
    if tokenizer is not None:
        _check_vocabulary(tokenizer, model, options)
        begin, end = _edges(tokenizer, path, options)
    named = {"begin_token": options.begin_token, "end_token": options.end_token}
    facts |= {name: text for name, text in named.items() if text is not None}
    imported = {"source": path.name or options.checkpoint, **facts}
    with claim(options.out):
        done = _is_done(options.out, model, tokenizer, imported)
        if not (options.out / "run.json").exists():
            write_run(options.out, model.config, training=None, control=None, of=None, more={"imported": imported})
        for part in ("run.json", "model"):
            remove_leftovers(options.out / part)
        if not done:
            save_model(model, options.out / "model", tokenizer, begin=begin, end=end)
    size, text = human(float(model.config.num_parameters)), "with its tokenizer" if tokenizer else "no tokenizer"
    where = f"{options.out} (imported before)" if done else str(options.out)
    console.print(f"{where}: {model.config.arch}, {model.config.num_layers} layers, {size} parameters, {text}")


def _is_done(
    run: Path, model: "LanguageModel", tokenizer: "Tokenizer | None", imported: dict[str, Any]
) -> bool:  # fmt: skip
    """Whether this import is complete; False after a kill or before the start. CrateError if `run` holds another."""
    from cratelm.data.tokenizer import tokenizer_hash
    from cratelm.model.weights import load, weights_hash

    whole = (run / "model").exists()
    same = not whole
    if (run / "run.json").exists():
        described = read_json(run / "run.json", made_by="cratelm import")
        same = described.get("imported") == imported and described["model"] == model.config.as_dict()
        if same and whole:
            before, its_tokenizer = load(run)
            hashes = [part and tokenizer_hash(part) for part in (its_tokenizer, tokenizer)]
            same = weights_hash(before) == weights_hash(model) and hashes[0] == hashes[1]
    if not same:
        raise CrateError(f"--out must not contain another run, got {run}. Hint: use another --out, or remove it")
    return whole


def _read_checkpoint(path: Path, options: Options) -> "tuple[LanguageModel, Tokenizer | None, dict[str, Any]]":
    """Model, tokenizer and facts about the training, from a checkpoint of the released code or of nanoGPT."""
    from cratelm.checksums import sha256_of
    from cratelm.data.tokenizer import load_tokenizer
    from cratelm.model.official import read_official

    if path.suffix == ".safetensors":
        raise CrateError(f"{path} has weights only. Hint: give its folder, which must have config.json")
    model, provenance = read_official(path, activation=options.activation)
    if model.config.arch == "gpt2":
        other = (
            "nanoGPT uses gelu: --activation gelu" if options.activation == "relu" else "the released models use relu"
        )
        console.print(f"nonlinearity: {ACTIVATIONS[options.activation]} (not recorded in the file; {other})")
    facts = {"steps": provenance.iter_num, "validation loss": provenance.best_val_loss, "sha256": sha256_of(path)}
    if options.tokenizer not in (None, "none"):
        return model, load_tokenizer(str(options.tokenizer)), facts
    if options.tokenizer is None and model.config.vocab_size in GPT2_VOCABULARIES:
        try:
            return model, load_tokenizer("gpt2"), facts
        except CrateError as error:
            raise CrateError(
                f"{error}. Hint: --tokenizer FOLDER, or --tokenizer none for a run without a tokenizer"
            ) from None
    return model, None, facts


def _read_hugging_face(options: Options) -> "tuple[LanguageModel, Tokenizer | None, dict[str, Any]]":
    """Model and tokenizer of a directory or of a name on the hub."""
    from cratelm.data.tokenizer import load_tokenizer
    from cratelm.model.weights import find_model, load_model

    folder = find_model(options.checkpoint)
    model = load_model(folder)
    if options.tokenizer == "none":
        return model, None, {}
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "merges.txt"))
    named = options.tokenizer or (str(folder) if has_tokenizer else None)
    return model, None if named is None else load_tokenizer(named), {}


def _edges(tokenizer: "Tokenizer", path: Path, options: Options) -> tuple[int | None, int | None]:
    """Ids of the token that begins a text and of the token that ends a document; None where there is none."""
    from cratelm.data.special_tokens import choose_known, special_tokens
    from cratelm.model.weights import find_model

    folder = None if path.is_file() and not is_gguf(path) else find_model(options.checkpoint)
    special = special_tokens(tokenizer, folder, post_processor=False)
    begin, end = special.begin[0] if special.begin else None, special.end
    if options.begin_token is not None:
        begin = choose_known(tokenizer, options.begin_token, "--begin-token")
    if options.end_token is not None:
        end = choose_known(tokenizer, options.end_token, "--end-token")
    return begin, end


def _check_vocabulary(tokenizer: "Tokenizer", model: "LanguageModel", options: Options) -> None:
    """Refuse a tokenizer with more ids than the model has embeddings."""
    from cratelm.data.tokenizer import vocabulary_size

    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise CrateError(
            f"the tokenizer must have at most {model.config.vocab_size} ids, the vocabulary of {options.checkpoint}, "
            f"got {vocabulary_size(tokenizer)}. Hint: give the model's tokenizer with --tokenizer, or none"
        )
