"""Models of a few thousand weights, a made-up language they can learn in seconds, and runs of a few steps on it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cratelm.data.tokens import TokenDirectory, tokenize
from cratelm.model.config import Architecture, ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.runtime import ProgressBar, progress_bars
from cratelm.training.config import TrainConfig
from cratelm.training.train import train

SUBJECTS, VERBS, OBJECTS = ("a crate", "the neuron", "one code"), ("holds", "sees", "keeps"), ("rain", "light", "sand")


def make_tokens(folder: Path, rng: np.random.Generator, *, documents: int = 120, vocab: int = 270) -> TokenDirectory:
    """A token directory of documents in which each sentence repeats the one before with its parts moved on by one."""
    texts = []
    for number in range(documents):
        start = rng.integers(0, 3, size=3)
        sentences = [
            f"{SUBJECTS[(start[0] + i) % 3]} {VERBS[(start[1] + i) % 3]} {OBJECTS[(start[2] + i) % 3]}."
            for i in range(int(rng.integers(4, 12)))
        ]
        texts.append(f"{number}: " + " ".join(sentences))
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tokenize([str(source)], folder, f"bpe:{vocab}", held_out=0.3)


def tiny_config(arch: Architecture = "crate", **changes: Any) -> ModelConfig:
    """Two layers of width 16."""
    config = ModelConfig(arch=arch, num_layers=2, d_model=16, num_heads=2, vocab_size=272, context_length=16)
    return replace(config, **changes)


def random_model(config: ModelConfig, rng: np.random.Generator) -> LanguageModel:
    """A model none of whose weights is at a special value: no bias is 0 and no gain is 1."""
    model = LanguageModel(config).initialise(int(rng.integers(1 << 31)))
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 31)))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.empty(parameter.shape).normal_(generator=generator)
    return model.eval()


def short_training(**changes: Any) -> TrainConfig:
    """Twelve steps of 64 tokens."""
    config = TrainConfig(
        tokens=12 * 64, batch_tokens=64, micro_batch=2, context=16, learning_rate=1e-2, final_learning_rate=1e-3,
        warmup_steps=3, log_every=1, evaluate_every=5, evaluate_tokens=200, checkpoint_every=4,
    )  # fmt: skip
    return replace(config, **changes)


def train_quietly(
    config: TrainConfig, model: ModelConfig, data: TokenDirectory, run: Path, **more: Any
) -> LanguageModel:
    """Train on the CPU with a bar that nobody sees."""
    return train(config, model, data, run, device=torch.device("cpu"), bar=hidden_bar(), **more)


def hidden_bar() -> ProgressBar:
    """A progress bar that is never drawn."""
    with progress_bars() as add:
        return add("test", 1)


def rows(run: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without the one number that depends on the machine, as it lies in the file."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "tokens_per_second"} for line in lines]


def weights_of(run: Path) -> bytes:
    """The final weights, as they lie in the file."""
    return (run / "model" / "model.safetensors").read_bytes()
