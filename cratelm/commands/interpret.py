"""Explain, simulate and score the neurons of one or more runs, and print how well they are explained.

    cratelm interpret runs/demo/crate-2l runs/demo/gpt2-2l --controls shuffled
    cratelm interpret runs/demo/crate-2l --llm http://localhost:8000/v1 --dry-run
    cratelm interpret runs/demo/crate-2l --llm http://localhost:8000/v1 --controls shuffled
    cratelm interpret runs/demo/crate-2l --llm Qwen/Qwen2.5-1.5B-Instruct --neurons 50

Needs the records that `cratelm collect` wrote. Without --llm an explanation is a table of the tokens that a neuron
fires on, a simulation looks tokens up in it, and the score is how well that predicts the neuron on held-out text
(points: 100 is perfect, 0 is chance). `--controls shuffled` also uses the explanation of another neuron as a baseline.

With --llm a language model describes a sample of the neurons in a sentence each and predicts activations from the
sentence: a model behind a URL, or a Hugging Face model in this process. The cost is estimated first; with --dry-run the
command stops there. Lookup scores the same neurons for comparison, unless --skip-lookup. docs/interpret.md says which
models to use and which numbers to trust.

An interrupted command can be resumed: nothing is computed twice, and no answer is paid for twice.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from cratelm.interpretation.simulators.controls import LOOKUP_CONTROLS
from cratelm.workflows.llm.request import InterpretRequest
from cratelm.workflows.llm.run import interpret, interpret_by_lookup, merge_and_score
from cratelm.workflows.options.language_model import (
    Controls,
    Explaining,
    ExplainingGroup,
    Name,
    Scorers,
    Simulating,
    SimulatingGroup,
    Spending,
    SpendingGroup,
    group,
)
from cratelm.workflows.options.selection import Selection


@dataclass(frozen=True, kw_only=True)
class Options(Selection):
    """Which neurons, protocols and controls, and the explainer and simulator."""

    BASIC: ClassVar = (
        "layer", "protocol", "mode", "controls", "llm",
        "model", "neurons", "simulator", "dry_run", "budget_tokens",
    )  # fmt: skip
    """The options that `--help` shows; `--help-all` shows all."""
    controls: Controls = ()
    """Also score each neuron with another neuron's explanation (shuffled) or one fixed sentence (constant, --llm)."""
    scorer: Scorers = ("simulation",)
    encoder: Name = ""
    """Sentence encoder for the embedding scorers: a name on the Hugging Face hub or a directory."""
    explaining: ExplainingGroup = group(Explaining)
    """The explainer. By default lookup, which needs no language model and takes seconds."""
    simulating: SimulatingGroup = group(Simulating)
    """The simulator."""
    spending: SpendingGroup = group(Spending)
    """Limits of the cost, and how the work is divided."""
    skip_lookup: bool = False
    """With --llm: do not score by lookup for comparison, which takes seconds."""


def run(options: Options) -> bool:
    """Run the three stages on every run. Returns whether nothing waits in a batch."""
    request = InterpretRequest.of(options, stages=("explain", "simulate", "score"))
    if request.by_lookup and options.spending.merge:
        _interpret_by_lookup(request, asyncio.run(merge_and_score(request)), skip=options.skip_lookup)
        return True
    complete = asyncio.run(interpret(request))
    is_scored = complete and "score" in request.stages and not (options.spending.dry_run or options.spending.part)
    if is_scored and not request.by_lookup:
        _interpret_by_lookup(request, dict.fromkeys(options.runs, options.protocol), skip=options.skip_lookup)
    return complete


def _interpret_by_lookup(
    request: InterpretRequest, protocols: Mapping[Path, tuple[str, ...]], *, skip: bool
) -> None:  # fmt: skip
    """Interpret by lookup what a language model interpreted, for comparison in the report.

    Lookup takes all neurons of a layer; the report selects the neurons that the model was asked about.
    """
    for run, names in protocols.items():
        if names and not skip:
            selection = replace(request.selection, runs=(run,), protocol=tuple(names))
            interpret_by_lookup(selection, controls=LOOKUP_CONTROLS)
            print(f"\n{run.name}: scored by lookup too; cratelm report shows both side by side")
