"""The paper's simulator: one prompt per excerpt, in which every activation is given as unknown.

The activations are read from the prompt logprobs: what the model expected in place of each `unknown`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from cratelm.activations.records import Mode
from cratelm.interpretation.llm import LLM, Prompt, PromptLogprobs
from cratelm.interpretation.prompts import simulator as prompts
from cratelm.interpretation.prompts.few_shot import FewShotNeuron
from cratelm.interpretation.simulators.prompt_fitting import (
    examples_to_leave_out,
    fitting_prefix,
    simulation_settings,
)
from cratelm.interpretation.simulators.readout import ReadOut, count_unread, read_activations
from cratelm.interpretation.simulators.simulation import Activations
from cratelm.interpretation.store.identities import SimulatorName

UNKNOWN = ("unknown", "?", "_", "-", "x")
"""Placeholders for an activation: the first one that leaves the tab before it a separate token is used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AllAtOnce:
    """Reads all activations of an excerpt from the logprobs of one prompt."""

    llm: LLM
    read_out: ReadOut
    unknown: str = UNKNOWN[0]
    left_out: int = 0
    """Few-shot neurons that the prompts leave out; a prompt that is still too long leaves out more."""
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> SimulatorName:
        """Method, scale and model."""
        return self.read_out.name("all-at-once", self.llm.name)

    @property
    def strings_mode(self) -> Mode:
        """How tokens are converted to text."""
        return "fixed" if self.read_out.escaped else "compat"

    def cache_settings(self) -> dict[str, Any]:
        """Every setting that the simulations depend on."""
        settings = {**asdict(self.read_out), "unknown": self.unknown}
        return simulation_settings(str(self.name), self.llm, settings, self.left_out)

    def needs(self, excerpts: Iterable[Sequence[str]]) -> int:
        """Few-shot neurons to leave out for these excerpts."""
        rests = (prompts.all_at_once_rows(tokens, unknown=self.unknown)[0] for tokens in excerpts)
        return examples_to_leave_out(partial(self._prefix, ""), rests, self.llm)

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """Send one prompt per excerpt; all prompts have the same prefix."""
        tables = [prompts.all_at_once_rows(tokens, unknown=self.unknown) for tokens in excerpts]
        rests = [rest for rest, _ in tables]
        prefix = fitting_prefix(partial(self._prefix, explanation), rests, self.llm, self.counts, self.left_out)
        questions = [Prompt(prefix=prefix, rest=rest, at=places, numbers=True) for rest, places in tables]
        answers = await self.ask(questions)
        reads = [
            read_activations(self.read_out, answer, places, self.llm)
            for answer, (_, places) in zip(answers, tables, strict=True)
        ]
        count_unread(self.counts, reads, self.read_out, self.llm)
        return [
            np.array([values[place] or 0.0 for place in places])
            for values, (_, places) in zip(reads, tables, strict=True)
        ]

    async def ask(self, questions: Sequence[Prompt]) -> Sequence[PromptLogprobs]:
        """The candidates at every wanted place of each prompt."""
        return await self.llm.prompt_logprobs(questions, top=self.read_out.candidates)

    def _prefix(self, explanation: str, examples: Sequence[FewShotNeuron]) -> str:
        top, escaped = self.read_out.top, self.read_out.escaped
        return prompts.all_at_once_prefix(explanation, examples, top=top, unknown=self.unknown, escaped=escaped)
