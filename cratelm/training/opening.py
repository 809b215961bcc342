"""Run directories as training opens them: `run.json` says which model this is, how it came to be, what it costs."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig
from cratelm.rundir import differing_fields, origin, read_json, write_json
from cratelm.training.config import TrainConfig, settled


def open_run(run: Path, config: TrainConfig, model_config: ModelConfig, data: TokenDirectory) -> None:
    """Write `run.json`, or check that the one there describes this very run."""
    check_run(run, config, model_config, data)
    if not (run / "run.json").exists():
        write_run(run, model_config, training=training_identity(config, data), control=None, of=None)


def check_run(run: Path, config: TrainConfig, model_config: ModelConfig, data: TokenDirectory) -> None:
    """Raise CrateError if data and model do not fit each other, or if `run` holds another run. Nothing is written."""
    data.tokenizer()
    if config.context > model_config.context_length:
        raise CrateError(
            f"training sequences of {config.context} tokens are longer than the model's context of "
            f"{model_config.context_length}. Lower --context or raise the model's"
        )
    if data.vocab_size > model_config.vocab_size:
        raise CrateError(
            f"the tokens of {data.path} come from a vocabulary of {data.vocab_size}, the model has "
            f"{model_config.vocab_size} rows. Give --vocab-size {data.vocab_size} or more"
        )
    for split in ("train", "val"):
        if len(data.tokens(split)) <= config.context:
            raise CrateError(
                f"{data.path} has {len(data.tokens(split))} {split} tokens, fewer than one sequence of "
                f"{config.context}. Tokenize more text, or lower --context"
            )
    if (run / "run.json").exists():
        found = read_json(run / "run.json", made_by=f"cratelm train --out {run}")
        before = settled(found["training"]) if found.get("training") else {}
        asked = model_config.as_dict() | settled(training_identity(config, data))
        if different := differing_fields(found.get("model", {}) | before, asked):
            raise CrateError(f"{run} holds another run ({different}). Use another --out, or remove it")


def training_identity(config: TrainConfig, data: TokenDirectory) -> dict[str, Any]:
    """How and on what: two runs of a model for which this agrees, but for what may change, are the same."""
    return asdict(config) | {"data_hash": data.splits["train"].sha256, "tokenizer_hash": data.tokenizer_hash}


def write_run(
    run: Path, model_config: ModelConfig, *, training: dict[str, Any] | None, control: str | None, of: str | None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Write `run.json`: which model this directory is about, how it came to be, and what it costs."""
    write_json(
        run / "run.json",
        {
            "name": run.resolve().name, "arch": model_config.arch, "control": control, "of": of,
            "model": model_config.as_dict(), "parameters": model_config.num_parameters,
            "flops_per_token": model_config.flops_per_token(), "training": training, "origin": origin(), **more,
        },
    )  # fmt: skip
