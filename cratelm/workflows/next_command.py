"""The command that usually follows: printed at the end of a command from the command line."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any


def next_command(verb: str, options: Any) -> str:
    """The command that usually follows; empty after a dry run, and in all but the first process of torchrun."""
    spending = getattr(options, "spending", None)
    unfinished = getattr(options, "dry_run", False) or (spending and (spending.dry_run or spending.part))
    if verb not in NEXT or unfinished or os.environ.get("RANK", "0") != "0":
        return ""
    words = NEXT[verb](options)
    return shlex.join(["cratelm", *map(str, words)]) if words else ""


def _records(options: Any) -> list[str]:
    """--mode and --tap, where they differ from the defaults."""
    mode = [] if options.mode == "fixed" else ["--mode", options.mode]
    return mode if options.tap == "neurons" else [*mode, "--tap", options.tap]


def explored_run(options: Any) -> Path:
    """The run directory of `cratelm explore`."""
    from cratelm.gguf_files import model_name
    from cratelm.workflows.opening import describe

    model: Path = options.model
    return model if describe(model)[1] else options.out or Path("runs") / model_name(model.resolve())


def _after_evaluate(options: Any) -> list[str | Path]:
    return ["collect", *options.runs, "--data", options.data] if options.data else []


def _after_collect(options: Any) -> list[str | Path]:
    runs, mode = [options.out] if options.out else options.runs, _records(options)
    if options.sae:
        return ["interpret", *runs, *mode, "--tap", f"sae-{options.sae[0]}"]
    if options.sign == "negative" or options.tap not in ("neurons", "heads", "residual"):
        return []
    return ["interpret", *runs, *mode]


def _after_sae_evaluate(options: Any) -> list[str | Path]:
    names = [name for name in options.sae if "/" not in name]
    return ["collect", *options.runs, "--data", options.data, "--sae", *names] if names else []


NEXT: dict[str, Callable[[Any], list[str | Path]]] = {
    "demo": lambda options: ["serve", *(options.out / name for name in ("crate-2l", "gpt2-2l"))],
    "explore": lambda options: ["serve", explored_run(options)],
    "tokenize": lambda options: ["train", "--data", options.out, "--out", "runs/crate-2l"],
    "train": lambda options: ["evaluate", options.out, "--data", options.data] if options.data else [],
    "evaluate": _after_evaluate,
    "import": lambda options: ["generate", options.out],
    "collect": _after_collect,
    "explain": lambda options: ["simulate", *options.runs, *_records(options)],
    "simulate": lambda options: ["score", *options.runs, *_records(options)],
    "score": lambda options: ["report", *options.runs, *_records(options)],
    "interpret": lambda options: ["report", *options.runs, *_records(options)],
    "sae train": lambda options: ["sae", "evaluate", options.out or options.runs[0], "--data", options.data],
    "sae evaluate": _after_sae_evaluate,
    "directions": lambda options: ["neurons", options.runs[0], "--layer", "0", "--neuron", "0"],
    "report": lambda options: [] if options.site else ["serve", *options.runs],
}
"""Verb -> the words of the command that follows it; an empty list if there is none."""
