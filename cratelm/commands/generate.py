"""Continue a text with a trained model, or let it begin one.

    cratelm generate runs/crate-2l --prompt "def read_file("
    cratelm generate runs/crate-2l --temperature 0.5 --seed 1

The text is written as it is made. Temperature 0 takes the most probable token each time.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cratelm.errors import CrateError
from cratelm.runtime import DeviceName, select_device

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm generate`."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help_behavior_hint="")]
    """Run directory or model directory."""
    prompt: str | None = None
    """Text to continue; left out, the model begins a document of its own."""
    tokens: int = 100
    """Tokens to add."""
    temperature: float = 0.8
    """Below 1 the probable becomes more probable; 0 is deterministic."""
    top_k: int | None = None
    """Draw only from so many of the most probable tokens."""
    top_p: float | None = None
    """Draw only from the fewest most probable tokens that together have this probability."""
    seed: int | None = None
    """The same seed gives the same text."""
    device: DeviceName = "auto"
    """Where to compute."""


def run(options: Options) -> None:
    """Stream the continuation to standard output."""
    import torch

    from cratelm.model.weights import load

    if (
        not 0 <= options.temperature < math.inf
        or options.tokens < 1
        or (options.top_k is not None and options.top_k < 1)
    ):
        raise CrateError("--temperature must be 0 or more, --tokens and --top-k at least 1")
    model, tokenizer = load(options.run)
    if tokenizer is None:
        raise CrateError(f"{options.run} holds no tokenizer.json. Put the model's tokenizer beside its weights")
    prompt = prompt_tokens(tokenizer, options.prompt)
    model.to(select_device(options.device))
    made: list[int] = [] if options.prompt is None else list(prompt)
    shown = tokenizer.decode(made)
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
        top_k=options.top_k, top_p=options.top_p, seed=options.seed, on_token=show,
    )  # fmt: skip
    sys.stdout.write(tokenizer.decode(made)[len(shown) :] + "\n")


def prompt_tokens(tokenizer: "Tokenizer", prompt: str | None) -> list[int]:
    """The tokens of a prompt; without one, the <|endoftext|> that comes before every document but the first."""
    from cratelm.model.weights import END_OF_TEXT

    if prompt is None:
        start = tokenizer.token_to_id(END_OF_TEXT)
        if start is None:
            raise CrateError(f"the model's tokenizer has no {END_OF_TEXT} to begin from. Give a text with --prompt")
        return [start]
    if not (tokens := tokenizer.encode(prompt).ids):
        raise CrateError("the prompt is empty. Give some text to continue with --prompt, or leave it out")
    return tokens
