"""Continue a text with a trained model.

    cratelm generate runs/crate-2l --prompt "def read_file("

The text is written as it is made. Temperature 0 takes the most probable token each time.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from cratelm.errors import CrateError
from cratelm.runtime import DeviceName, select_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm generate`."""

    run: tyro.conf.Positional[Path]
    """Run directory or model directory."""
    prompt: str
    """Text to continue."""
    tokens: int = 100
    """Tokens to add."""
    temperature: float = 0.8
    """Below 1 the probable becomes more probable; 0 is deterministic."""
    top_k: int | None = None
    """Draw only from so many of the most probable tokens."""
    seed: int | None = None
    """The same seed gives the same text."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Stream the continuation to standard output."""
    import torch

    from cratelm.model.weights import load

    if options.temperature < 0 or options.tokens < 1 or (options.top_k is not None and options.top_k < 1):
        raise CrateError("--temperature must be 0 or more, --tokens and --top-k at least 1")
    model, tokenizer = load(options.run)
    if tokenizer is None:
        raise CrateError(f"{options.run} holds no tokenizer.json. Put the model's tokenizer beside its weights")
    prompt = tokenizer.encode(options.prompt).ids
    if not prompt:
        raise CrateError("the prompt is empty. Give some text to continue with --prompt")
    model.to(select_device(options.device))
    made: list[int] = list(prompt)
    shown = tokenizer.decode(prompt)
    sys.stdout.write(shown)

    def show(new: torch.Tensor) -> None:
        nonlocal shown
        made.append(int(new[0]))
        text = tokenizer.decode(made)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # wait for the rest of a character
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text

    model.generate(
        torch.tensor([prompt], device=model.device), options.tokens, temperature=options.temperature,
        top_k=options.top_k, seed=options.seed, on_token=show,
    )  # fmt: skip
    sys.stdout.write(tokenizer.decode(made)[len(shown) :] + "\n")
