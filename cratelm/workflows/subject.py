"""The model that a command about neurons works on: of a run, of a model directory, or a Hugging Face name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cratelm.errors import CrateError
from cratelm.rundir import read_json
from cratelm.runtime import DeviceName, select_device

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

    from cratelm.activations.records import LayerRecords


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A model, ready on its device."""

    model: "nn.Module"
    tokenizer: "Tokenizer"
    strings: Sequence[str]
    """Text of each token id, for a person."""
    run: Path | None
    """The run directory, where results go and records are; None for a bare model."""
    name: str
    model_hash: str
    """Hash of the weights; empty where it was not asked for."""

    def records(self, layer: int, tap: str = "neurons") -> "LayerRecords | None":
        """The fixed records of a layer, or else the compat ones; None if there are none."""
        from cratelm.activations.records import Mode, layer_file, read_records

        modes: tuple[Mode, ...] = ("fixed", "compat")
        for mode in modes:
            if self.run is not None and layer_file(self.run, mode, tap, layer).exists():
                return read_records(self.run, layer, mode=mode, tap=tap)
        return None

    def explanations(self, layer: int) -> Mapping[int, str]:
        """What the neurons of a layer are explained by, where the run says so."""
        from cratelm.interpretation.store.database import Store
        from cratelm.report.neuron_table import open_table

        if self.run is None or self.records(layer) is None or not Store(self.run).path.exists():
            return {}
        return open_table(self.run, layer).explanations

    def out(self, asked: Path | None) -> Path | None:
        """Where results go: the folder that was named, or `report` in the run."""
        return asked or (None if self.run is None else self.run / "report")


def choose(source: Path, device: DeviceName, *, hashed: bool = False) -> Chosen:
    """Open the model of a run or a model; one without a tokenizer is refused."""
    from cratelm.activations.foreign import load_foreign
    from cratelm.data.tokenizer import token_strings
    from cratelm.model.weights import load, weights_hash

    described = source / "run.json"
    description = read_json(described, made_by="cratelm train") if described.is_file() else {}
    is_run = described.is_file() or (source / "model" / "config.json").is_file()
    remembered = description.get("source")
    model: nn.Module
    digest = ""
    if remembered is None and (is_run or _is_ours(source)):
        own, tokenizer = load(source)
        model, digest = own, weights_hash(own) if hashed else ""
    else:
        foreign = load_foreign(remembered or source)
        model, tokenizer, digest = foreign.model, foreign.tokenizer, foreign.model_hash
    if tokenizer is None:
        raise CrateError(f"{source} holds no tokenizer.json. Put the model's tokenizer beside its weights")
    return Chosen(
        model=model.requires_grad_(False).to(select_device(device)), tokenizer=tokenizer,
        strings=token_strings(tokenizer),
        run=source if is_run else None, name=str(description.get("name") or source.name), model_hash=digest,
    )  # fmt: skip


def _is_ours(source: Path) -> bool:
    """Whether it is a directory of a CRATE, which needs no transformers."""
    path = source / "config.json"
    return path.is_file() and read_json(path, made_by="cratelm train").get("model_type") == "crate"


def encode(chosen: Chosen, text: str) -> list[int]:
    """The tokens of a prompt, refused where it is empty or longer than the model's context."""
    from cratelm.activations.causal_model import causal_model

    causal = causal_model(chosen.model, chosen.tokenizer)
    tokens = causal.encode(text)
    causal.check_length(len(tokens))
    return tokens


def one_token(chosen: Chosen, text: str, flag: str = "--token") -> int:
    """The id of a text that is one token; `#1234` is the id itself."""
    if text.startswith("#") and text[1:].isdigit():
        found = int(text[1:])
        if found >= len(chosen.strings):
            raise CrateError(f"{flag} {text} is not in the vocabulary: it has #0 to #{len(chosen.strings) - 1}")
        return found
    tokens = chosen.tokenizer.encode(text, add_special_tokens=False).ids
    if len(tokens) != 1:
        parts = " ".join(repr(chosen.strings[token]) for token in tokens) or "none"
        raise CrateError(
            f"{flag} {text!r} is {len(tokens)} tokens of this model ({parts}), not one. Name one of them; "
            "mind the space before a word"
        )
    return int(tokens[0])


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line and of a file, one on each line."""
    found = list(prompts)
    if file is not None:
        try:
            found += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except FileNotFoundError:
            raise CrateError(f"{file} is not there. Give a text file with a prompt on each line") from None
        except UnicodeDecodeError as error:
            raise CrateError(f"{file} is not UTF-8 text ({error.reason}). Save it as such") from None
    return [text.replace("\\n", "\n").replace("\\t", "\t") for text in found]
