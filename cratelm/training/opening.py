"""Create or check the `run.json` of a training: the model, its training settings, its size and cost."""

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
    """Write `run.json`, or check that the existing one describes the same run."""
    check_run(run, config, model_config, data)
    if not (run / "run.json").exists():
        write_run(run, model_config, training=training_identity(config, data), control=None, of=None)


def check_run(run: Path, config: TrainConfig, model_config: ModelConfig, data: TokenDirectory) -> None:
    """Raise CrateError if data and model do not match, or if `run` is another run. Writes nothing."""
    data.tokenizer()
    if config.context > model_config.context_length:
        raise CrateError(
            f"--context must be at most the model's context of {model_config.context_length}, got {config.context}"
        )
    if data.vocab_size > model_config.vocab_size:
        raise CrateError(
            f"--vocab-size must be at least {data.vocab_size}, the vocabulary of {data.path}, "
            f"got {model_config.vocab_size}"
        )
    for split in ("train", "val"):
        if len(data.tokens(split)) <= config.context:
            raise CrateError(
                f"{data.path} has {len(data.tokens(split))} {split} tokens, fewer than one sequence of "
                f"{config.context}. Tokenize more text, or lower --context"
            )
    if (run / "run.json").exists():
        described = read_json(run / "run.json", made_by=f"cratelm train --out {run}")
        trained = settled(described["training"]) if described.get("training") else {}
        requested = model_config.as_dict() | settled(training_identity(config, data))
        if different := differing_fields(described.get("model", {}) | trained, requested):
            raise CrateError(f"{run} is another run ({different}). Use another --out, or remove it")


def training_identity(config: TrainConfig, data: TokenDirectory) -> dict[str, Any]:
    """Training settings and hashes of the data. Runs of a model are the same if these agree, except `MAY_CHANGE`."""
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
