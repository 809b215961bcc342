"""Open the model of a run directory, whether it is one of ours or a Hugging Face model that `collect` has read."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cratelm.errors import CrateError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import nn

    from cratelm.model.language_model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A run's model, in evaluation mode on the CPU, and its tokenizer."""

    run: Path
    model: "nn.Module"
    tokenizer: "Tokenizer"
    model_hash: str
    description: dict[str, Any]
    """`run.json`, empty for a bare model directory."""


def open_run(run: Path) -> OpenedRun:
    """Load model and tokenizer of a run; what is no run, or has no tokenizer, is refused."""
    from cratelm.activations.foreign import load_foreign
    from cratelm.data.tokenizer import load_tokenizer
    from cratelm.model.weights import load, weights_hash
    from cratelm.rundir import read_json

    if not run.is_dir():
        raise CrateError(f"there is no run directory {run}. Run: cratelm train --data DIR --out {run}")
    described = run / "run.json"
    description = read_json(described, made_by="cratelm train") if described.is_file() else {}
    model: nn.Module
    if (source := description.get("source")) is not None and not (run / "model" / "config.json").is_file():
        foreign = load_foreign(source)
        model, tokenizer, model_hash = foreign.model, foreign.tokenizer, foreign.model_hash
    else:
        _check_own(run)
        own, tokenizer = load(run)
        model, model_hash = own, weights_hash(own)
    kept = sorted(run.glob("records/*/tokenizer.json"))
    if tokenizer is None and kept:
        tokenizer = load_tokenizer(kept[0])
    if tokenizer is None:
        raise CrateError(f"{run} holds no tokenizer.json. Put the model's tokenizer beside its weights")
    return OpenedRun(run=run, model=model, tokenizer=tokenizer, model_hash=model_hash, description=description)


def _check_own(folder: Path) -> None:
    """Refuse the directory of a Hugging Face model of another architecture, naming the way to a run of it."""
    from cratelm.rundir import read_json

    path = folder / "config.json"
    if (folder / "model" / "config.json").is_file() or not path.is_file():
        return
    kind = read_json(path, made_by="cratelm train").get("model_type")
    if kind not in ("crate", "gpt2", None):
        raise CrateError(
            f"{folder} is a Hugging Face model ({kind}) and no run, and this command works on runs. Make one with "
            f"cratelm collect {folder} --data DIR --out RUN, then give it that RUN"
        )


def open_own(run: Path) -> "tuple[LanguageModel, Tokenizer | None]":
    """Load a model of ours; the run of a Hugging Face model, whose subspaces and steps are not known, is refused."""
    from cratelm.model.weights import load
    from cratelm.rundir import read_json

    described = run / "run.json"
    if described.is_file() and not (run / "model" / "config.json").is_file():
        source = read_json(described, made_by="cratelm train").get("source")
        if source is not None:
            raise CrateError(
                f"{run} is of a Hugging Face model, whose subspaces and steps are not known; this reads models of "
                f"cratelm. A GPT-2 becomes one: cratelm import {source} --out RUN"
            )
    return load(run)
