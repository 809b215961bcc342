"""The simulator that answers in JSON, for models that give no prompt logprobs: one chat per excerpt.

The answer must repeat each token once and unchanged, with its activation.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cratelm.activations.records import Mode
from cratelm.interpretation.explainers.answers import quoted
from cratelm.interpretation.llm import LLM, LLMError, Sampling
from cratelm.interpretation.prompts import simulator as prompts
from cratelm.interpretation.prompts.escaping import escaped, unescaped
from cratelm.interpretation.prompts.few_shot import few_shot_neurons
from cratelm.interpretation.simulators.prompt_fitting import simulation_settings
from cratelm.interpretation.simulators.simulation import Activations
from cratelm.interpretation.store.identities import SimulatorName


@dataclass(frozen=True, kw_only=True, slots=True)
class Structured:
    """Requests the activations of an excerpt as JSON and checks the tokens that come back."""

    llm: LLM
    mode: Mode = "fixed"
    """In `compat` mode an excerpt with an unusable answer gets activation 0 everywhere, as in the released code."""
    left_out: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> SimulatorName:
        """Method and model."""
        return SimulatorName(method="structured", model=self.llm.name)

    @property
    def strings_mode(self) -> Mode:
        """How tokens are converted to text."""
        return self.mode

    def cache_settings(self) -> dict[str, Any]:
        """Every setting that the simulations depend on."""
        return simulation_settings(str(self.name), self.llm, {"mode": self.mode})

    def needs(self, _: Iterable[Sequence[str]]) -> int:
        """None: the prompts show all few-shot neurons."""
        return 0

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """Send one chat per excerpt."""
        return list(await asyncio.gather(*(self._simulate_excerpt(explanation, tokens) for tokens in excerpts)))

    async def _simulate_excerpt(self, explanation: str, tokens: Sequence[str]) -> Activations:
        chat = prompts.structured_chat(explanation, tokens, few_shot_neurons(), escaped=self.mode == "fixed")
        longest = self.llm.count(prompts.structured_answer(tokens, [10] * len(tokens)))
        # Half as much again, for line breaks and spaces that our own layout does not have.
        sampling = Sampling(max_tokens=longest + longest // 2 + 32, schema=prompts.structured_schema(len(tokens)))
        reply = await self.llm.chat(chat, sampling)
        self.counts["tokens"] += len(tokens)
        try:
            return structured_activations(reply.text, tokens)
        except LLMError:
            if self.mode == "compat":
                self.counts["unread"] += len(tokens)
                return np.zeros(len(tokens))
            raise


def structured_activations(answer: str, tokens: Sequence[str]) -> Activations:
    """Parse the activations in an answer. Raises `LLMError`, with the answer, if the answer is malformed."""
    fenced = re.search(r"```(?:json)?\s*\n(.*?)```", answer, re.DOTALL)
    try:
        parsed = json.loads(fenced[1] if fenced else answer, strict=False)  # allows a raw line break in a string
    except json.JSONDecodeError as error:
        raise LLMError(f"the answer is not JSON ({error.msg}): {quoted(answer)}") from None
    rows = parsed.get("activations") if isinstance(parsed, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LLMError(f"the answer has no list of activations: {quoted(answer)}")
    if len(rows) != len(tokens):
        raise LLMError(f"the answer has {len(rows)} activations for {len(tokens)} tokens: {quoted(answer)}")
    for number, (row, token) in enumerate(zip(rows, tokens, strict=True), 1):
        if not _is_token(row.get("token"), token):
            raise LLMError(f"token {number} is {token!r}, and the answer has {row.get('token')!r}: {quoted(answer)}")
        value = row.get("activation")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
            raise LLMError(
                f"the activation of token {number} is {value!r}, not a number from 0 to 10: {quoted(answer)}"
            )
    return np.array([float(row["activation"]) for row in rows])


def _is_token(text: Any, token: str) -> bool:
    r"""Whether an answer spells a token, escaped or not: a line break for `\n`."""
    return isinstance(text, str) and token in (text, escaped(text)) or text == unescaped(token)
