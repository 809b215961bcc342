"""Score neurons: compare simulated with real activations, and print the mean scores by layer.

    cratelm score runs/demo/crate-2l
    cratelm score runs/demo/crate-2l --model Mistral-7B-Instruct-v0.2
    cratelm score runs/demo/crate-2l --llm http://localhost:8000/v1 --scorer detection fuzzing

Reads what `cratelm simulate` stored in RUN/interpretation.sqlite and stores the scores there. --model scores the stored
simulations from that language model's explanations, without calling a model. A score is the correlation over the tokens
of all excerpts together (points: times 100). The table counts the neurons without a score: dead (never fires), rare (in
too few documents), const a / const s (the activations or the simulation are all equal), failed (no usable answer).
Other scorers ask --llm about pieces of text; docs/interpret.md says what they test.
"""

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from cratelm.workflows.llm.request import InterpretRequest
from cratelm.workflows.llm.run import interpret
from cratelm.workflows.options.language_model import (
    Controls,
    Explaining,
    ExplainingGroup,
    Name,
    Scorers,
    Spending,
    SpendingGroup,
    group,
)
from cratelm.workflows.options.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons, controls and scorers."""

    BASIC: ClassVar = ("layer", "protocol", "mode", "controls", "scorer", "llm", "model", "dry_run")
    """The options that `--help` shows; `--help-all` shows all."""
    controls: Controls = ()
    """Also score the simulations from another neuron's explanation (shuffled) or one fixed sentence (constant)."""
    scorer: Scorers = ("simulation",)
    encoder: Name = ""
    """Sentence encoder for the embedding scorers: a name on the Hugging Face hub or a directory."""
    explaining: ExplainingGroup = group(Explaining)
    """The explainer whose explanations are scored; by default lookup."""
    spending: SpendingGroup = group(Spending)
    """Limits of the cost, and how the work is divided."""


def run(options: Options) -> None:
    """Score the neurons of every run and print the table."""
    asyncio.run(interpret(InterpretRequest.of(options, stages=("score",))))
