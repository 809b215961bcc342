"""Runs that a live browser can show and turn: made-up records of as many neurons as a small random model has."""

from pathlib import Path

import numpy as np
from synthetic import make_tokenizer
from test_tables import scored_runs
from tiny import random_model, tiny_config

from cratelm.model.weights import save_model
from cratelm.rundir import read_json, write_json

NEURONS = 64
CONTEXT = 48


def live_runs(folder: Path, rng: np.random.Generator, *names: str) -> list[Path]:
    """Scored runs with a model each; `crate-2l` and `gpt2-2l` by default."""
    runs = scored_runs(folder, rng, *(names or ("crate-2l", "gpt2-2l")), neurons=NEURONS)
    for run in runs:
        description = read_json(run / "run.json", made_by="the test")
        arch = description["arch"]
        config = tiny_config(arch, vocab_size=description["model"]["vocab_size"], context_length=CONTEXT)
        description["model"]["context_length"] = CONTEXT
        write_json(run / "run.json", {k: v for k, v in description.items() if k != "format_version"})
        save_model(random_model(config, rng), run / "model", make_tokenizer())
    return runs
