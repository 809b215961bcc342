"""Continue a text with a trained model, or let the model begin one.

    cratelm generate runs/crate-2l --prompt "def read_file("
    cratelm generate runs/crate-2l --temperature 0.5 --seed 1

The text is printed as it is generated. Temperature 0 takes the most probable token each time.
"""

import sys
from dataclasses import dataclass

from cratelm.errors import CrateError, check_least
from cratelm.workflows.opening import open_model
from cratelm.workflows.options.arguments import Device, RunPath


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm generate`."""

    run: RunPath
    """Run directory, model directory, or a Hugging Face name."""
    prompt: str | None = None
    """Text to continue; without it the model begins a document."""
    tokens: int = 100
    """Tokens to add."""
    temperature: float = 0.8
    """Sampling temperature; 0 always takes the most probable token."""
    top_k: int | None = None
    """Sample only from the N most probable tokens."""
    top_p: float | None = None
    """Sample only from the fewest most probable tokens that together have this probability."""
    seed: int | None = None
    """The same seed gives the same text."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Stream the continuation to standard output."""
    import torch

    from cratelm.steering.generate import Decoding, generate

    check_least(options, 1, "tokens", "top_k")
    check_least(options, 0, "temperature")
    opened = open_model(options.run, options.device)
    causal, tokenizer = opened.causal, opened.tokenizer
    if options.prompt is not None:
        prompt = causal.encode(options.prompt)
    elif begin := causal.text_beginning or causal.end_tokens:
        prompt = list(begin)
    else:
        raise CrateError("the model's tokenizer has no token to begin a document from. Give a text with --prompt")
    made: list[int] = [] if options.prompt is None else prompt[len(causal.text_beginning) :]
    shown = tokenizer.decode(made)
    sys.stdout.write(shown)

    def show(new: torch.Tensor, _logits: torch.Tensor) -> None:
        nonlocal shown
        made.append(int(new[0]))
        text = tokenizer.decode(made)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # wait for the rest of a character
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text

    decoding = Decoding(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    tokens = torch.tensor([prompt], device=causal.device)
    generate(opened.model, tokens, options.tokens, decoding=decoding, on_step=show)
    sys.stdout.write(tokenizer.decode(made)[len(shown) :] + "\n")
