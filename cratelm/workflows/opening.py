"""Open the model that a command works on: of a run, of a model directory, or by its Hugging Face name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from cratelm.errors import CrateError
from cratelm.gguf_files import is_gguf, model_name
from cratelm.rundir import read_json
from cratelm.runtime import DeviceName, select_device

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import nn

    from cratelm.activations.causal_model import CausalModel
    from cratelm.activations.foreign import ForeignModel
    from cratelm.activations.records import LayerRecords
    from cratelm.data.special_tokens import SpecialTokens
    from cratelm.model.language_model import LanguageModel

Expected = Literal["anything", "run", "ours"]
"""What a command accepts: any source; a directory to write results into; or a model of this package."""


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model on its device, in evaluation mode and without gradients of its weights."""

    source: Path
    model: "nn.Module"
    known_tokenizer: "Tokenizer | None"
    run: Path | None
    """Run directory, which holds records and results; None for a bare model."""
    description: Mapping[str, Any]
    """`run.json`; empty for a bare model."""
    foreign: "ForeignModel | None"
    """The source of a Hugging Face model; None for a model of this package."""
    special: "SpecialTokens | None" = None
    """The tokens that begin and end texts, where files next to the tokenizer name them."""

    @property
    def tokenizer(self) -> "Tokenizer":
        """The model's tokenizer. Raises CrateError if it has none."""
        if self.known_tokenizer is None:
            raise CrateError(f"{self.source} must have a tokenizer.json, got none. Hint: put it next to the weights")
        return self.known_tokenizer

    @cached_property
    def strings(self) -> Sequence[str]:
        """Text of each token id, as a person reads it."""
        from cratelm.data.tokenizer import token_strings

        return token_strings(self.tokenizer)

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 of configuration and weights."""
        from cratelm.model.weights import weights_hash

        return weights_hash(self.model) if self.foreign is None else self.foreign.model_hash  # type: ignore[arg-type]

    @cached_property
    def causal(self) -> "CausalModel":
        """The adapter of the model."""
        from cratelm.activations.causal_model import causal_model

        return causal_model(self.model, self.known_tokenizer, self.special)

    @property
    def name(self) -> str:
        """Name in titles and tables."""
        return str(self.description.get("name") or model_name(self.source))

    def records(self, layer: int, tap: str = "neurons") -> "LayerRecords | None":
        """The `fixed` records of a layer, else the `compat` ones; None if it has none."""
        from cratelm.activations.records import Mode, layer_file, read_records

        modes: tuple[Mode, ...] = ("fixed", "compat")
        for mode in modes:
            if self.run is not None and layer_file(self.run, mode, tap, layer).exists():
                return read_records(self.run, layer, mode=mode, tap=tap)
        return None

    def explanations(self, layer: int) -> Mapping[int, str]:
        """Explanations of the neurons of a layer; empty if the run has none."""
        from cratelm.interpretation.store.database import Store
        from cratelm.report.neuron_table import open_table

        if self.run is None or self.records(layer) is None or not Store(self.run).path.exists():
            return {}
        return open_table(self.run, layer).explanations

    def out(self, given: Path | None) -> Path | None:
        """Folder of the results: --out, or `report` in the run."""
        return given or (None if self.run is None else self.run / "report")

    def one_token(self, text: str, flag: str = "--token") -> int:
        """Id of a text that is one token; `#1234` is the id itself. Raises CrateError for any other text."""
        if text.startswith("#") and text[1:].isdigit():
            token = int(text[1:])
            if token >= len(self.strings):
                raise CrateError(f"{flag} must be #0 to #{len(self.strings) - 1}, the vocabulary, got {text}")
            return token
        tokens = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(tokens) != 1:
            parts = " ".join(repr(self.strings[token]) for token in tokens) or "none"
            raise CrateError(
                f"{flag} must be one token of this model, got {text!r}, which is {len(tokens)} tokens ({parts}). "
                "Name one of them, with the space before a word"
            )
        return int(tokens[0])

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt. Raises CrateError if it is empty or longer than the model's context."""
        tokens = self.causal.encode(text)
        self.causal.check_length(len(tokens))
        return tokens


def open_model(
    source: Path,
    device: "DeviceName | torch.device",
    *,
    expected: Expected = "anything",
    needs_tokenizer: bool = True,
) -> OpenModel:
    """Open the model of a run directory, of a model directory, of a GGUF file, or a Hugging Face name.

    The run of a Hugging Face model names its source, which is opened. A source that is not what was `expected`, or has
    no tokenizer where one is needed, is a CrateError.
    """
    from cratelm.activations.foreign import load_foreign
    from cratelm.data.tokenizer import load_tokenizer
    from cratelm.model.weights import load

    description, is_run = describe(source)
    remembered = description.get("source")
    if expected == "run":
        _check_directory(source)
    if expected == "ours" and remembered is not None:
        raise CrateError(
            f"{source} must be a model of cratelm, got a Hugging Face model. Hint: for a GPT-2, cratelm import "
            f"{remembered} --out RUN"
        )
    model: nn.Module
    foreign = None
    if remembered is None and (is_run or expected != "anything"):
        model, tokenizer = load(source)
    else:
        foreign = load_foreign(remembered or source)
        model, tokenizer = foreign.model, foreign.tokenizer
    recorded = sorted(source.glob("records/*/tokenizer.json")) if is_run else []
    if tokenizer is None and recorded:
        tokenizer = load_tokenizer(recorded[0])
    place = select_device(device) if isinstance(device, str) else device
    opened = OpenModel(
        source=source, model=model.requires_grad_(False).to(place), known_tokenizer=tokenizer,
        run=source if is_run else None, description=description, foreign=foreign,
        special=_special_tokens(source, tokenizer, foreign, description),
    )  # fmt: skip
    if needs_tokenizer:
        _ = opened.tokenizer
    return opened


def _special_tokens(
    source: Path, tokenizer: "Tokenizer | None", foreign: "ForeignModel | None", description: Mapping[str, Any]
) -> "SpecialTokens | None":
    """The tokens that begin and end texts; those that `collect` was given for this run come first."""
    from cratelm.data.special_tokens import special_tokens
    from cratelm.model.weights import find_model

    if tokenizer is None:
        return None
    if foreign is None:
        return special_tokens(tokenizer, find_model(source), post_processor=False)
    special = foreign.special or special_tokens(tokenizer)
    given = description.get("begin_of_text")
    return special if given is None else replace(special, begin=tuple(given))


def open_own(source: Path, device: "DeviceName | torch.device") -> "tuple[OpenModel, LanguageModel]":
    """Open a model of this package, with or without a tokenizer; the run of a Hugging Face model is refused."""
    from cratelm.model.language_model import LanguageModel

    opened = open_model(source, device, expected="ours", needs_tokenizer=False)
    return opened, cast(LanguageModel, opened.model)


def open_for_run(
    source: Path, device: "DeviceName | torch.device", *, out: Path | None, data: Path
) -> tuple[OpenModel, Path]:  # fmt: skip
    """A model and the run directory that its results go to: its own, or `out` for a bare Hugging Face model."""
    _, is_run = describe(source)
    if is_run and out is not None:
        raise CrateError(f"--out must be left out for a run, which holds its results, got {source}")
    if not is_run and out is None:
        is_model = is_gguf(source) or (source / "config.json").exists()
        what = "is a model, not a run" if is_model else "is not a run directory"
        raise CrateError(
            f"{source} {what}. Hint: for a Hugging Face model give the run to create: "
            f"cratelm collect {source} --data {data} --out runs/{model_name(source)}"
        )
    return open_model(source, device, needs_tokenizer=False), out or source


def describe(source: Path) -> tuple[dict[str, Any], bool]:
    """The `run.json` of a source, empty if there is none, and whether the source is a run."""
    path = source / "run.json"
    description = read_json(path, made_by="cratelm train") if path.is_file() else {}
    return description, path.is_file() or (source / "model" / "config.json").is_file()


def _check_directory(folder: Path) -> None:
    """Raise CrateError for a path that is not a directory, and for the directory of a bare Hugging Face model."""
    if not folder.is_dir():
        raise CrateError(f"there is no run directory {folder}. Hint: cratelm train --data DIR --out {folder}")
    path = folder / "config.json"
    if (folder / "model" / "config.json").is_file() or not path.is_file():
        return
    kind = read_json(path, made_by="cratelm train").get("model_type")
    if kind not in ("crate", "gpt2", None):
        raise CrateError(
            f"{folder} must be a run, got a Hugging Face model ({kind}). Hint: cratelm collect {folder} --data DIR "
            "--out RUN, then give that RUN"
        )
