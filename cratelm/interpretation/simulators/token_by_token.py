"""The simulator that sends one prompt per token: the activation is read from the logprobs at its last place."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from cratelm.activations.records import Mode
from cratelm.interpretation.llm import LLM, Prompt
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


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenByToken:
    """Reads one activation per prompt."""

    llm: LLM
    read_out: ReadOut
    left_out: int = 0
    """Few-shot neurons that the prompts leave out; a prompt that is still too long leaves out more."""
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> SimulatorName:
        """Method, scale and model."""
        return self.read_out.name("token-by-token", self.llm.name)

    @property
    def strings_mode(self) -> Mode:
        """How tokens are converted to text."""
        return "fixed" if self.read_out.escaped else "compat"

    def cache_settings(self) -> dict[str, Any]:
        """Every setting that the simulations depend on."""
        return simulation_settings(str(self.name), self.llm, asdict(self.read_out), self.left_out)

    def needs(self, excerpts: Iterable[Sequence[str]]) -> int:
        """Few-shot neurons to leave out for these excerpts."""
        rests = (prompts.token_by_token_question(tokens, len(tokens) - 1, answer="0")[0] for tokens in excerpts)
        return examples_to_leave_out(partial(self._prefix, ""), rests, self.llm)

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """Send one prompt per token; all prompts have the same prefix."""
        rows = [
            prompts.token_by_token_question(tokens, place, answer="0")
            for tokens in excerpts for place in range(len(tokens))
        ]  # fmt: skip
        rests = [rest for rest, _ in rows]
        prefix = fitting_prefix(partial(self._prefix, explanation), rests, self.llm, self.counts, self.left_out)
        questions = [Prompt(prefix=prefix, rest=rest, at=(at,), numbers=True) for rest, at in rows]
        answers = await self.llm.prompt_logprobs(questions, top=self.read_out.candidates)
        reads = [
            read_activations(self.read_out, answer, (at,), self.llm)
            for answer, (_, at) in zip(answers, rows, strict=True)
        ]
        count_unread(self.counts, reads, self.read_out, self.llm)
        values = np.array([next(iter(read.values())) or 0.0 for read in reads])
        ends = np.cumsum([len(tokens) for tokens in excerpts])[:-1]
        return np.split(values, ends) if excerpts else []

    def _prefix(self, explanation: str, examples: Sequence[FewShotNeuron]) -> str:
        top, escaped = self.read_out.top, self.read_out.escaped
        return prompts.token_by_token_prefix(explanation, examples, top=top, escaped=escaped)
