"""The simulator that answers in JSON, for models that give no prompt logprobs: one chat per excerpt.

The answer must repeat each token once and unchanged, with its activation.
"""

import asyncio
import json
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
from cratelm.interpretation.reasoning import without_reasoning
from cratelm.interpretation.simulators.prompt_fitting import simulation_settings
from cratelm.interpretation.simulators.simulation import Activations
from cratelm.interpretation.store.identities import SimulatorName

MOST_OBJECTS = 100
"""Places in an answer at which a JSON object is looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Structured:
    """Requests the activations of an excerpt as JSON and checks the tokens that come back."""

    llm: LLM
    mode: Mode = "fixed"
    """In `compat` mode an excerpt with an unusable answer gets activation 0 everywhere, as in the released code."""
    left_out: int = 0
    answer_tokens: int = 0
    """Tokens of an answer at least, for models that reason first."""
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
        limit = {"answer_tokens": self.answer_tokens} if self.answer_tokens else {}
        return simulation_settings(str(self.name), self.llm, {"mode": self.mode, **limit})

    def needs(self, _: Iterable[Sequence[str]]) -> int:
        """None: the prompts show all few-shot neurons."""
        return 0

    async def simulate(self, explanation: str, excerpts: Sequence[Sequence[str]]) -> list[Activations]:
        """Send one chat per excerpt."""
        return list(await asyncio.gather(*(self._simulate_excerpt(explanation, tokens) for tokens in excerpts)))

    async def _simulate_excerpt(self, explanation: str, tokens: Sequence[str]) -> Activations:
        chat = prompts.structured_chat(explanation, tokens, few_shot_neurons(), escaped=self.mode == "fixed")
        longest = self.llm.count(prompts.structured_answer(tokens, [10] * len(tokens)))
        # Half as much again, for line breaks and spaces that the layout of `structured_answer` does not have.
        limit = max(longest + longest // 2 + 32, self.answer_tokens)
        sampling = Sampling(max_tokens=limit, schema=prompts.structured_schema(tokens))
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
    objects, reason = _objects(without_reasoning(answer))
    if not objects:
        raise LLMError(f"the answer is not JSON ({reason}): {quoted(answer)}")
    rows = next((parsed["activations"] for parsed in reversed(objects) if "activations" in parsed), None)
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


def _objects(answer: str) -> tuple[list[dict[str, Any]], str]:
    """The JSON objects in an answer, with words or fences around them, and why the first one cannot be read."""
    decoder, objects, reason = json.JSONDecoder(strict=False), list[dict[str, Any]](), ""
    start = answer.find("{")
    for _ in range(MOST_OBJECTS):
        if start < 0:
            break
        try:
            value, end = decoder.raw_decode(answer, start)  # not strict: allows a raw line break in a string
            objects.append(value)
        except (ValueError, RecursionError) as error:
            reason, end = reason or getattr(error, "msg", str(error)), start + 1
        start = answer.find("{", end)
    whole = [value for value in objects if "activations" in value]
    return whole or ([] if reason else objects), reason or "Expecting value"


def _is_token(text: Any, token: str) -> bool:
    r"""Whether an answer spells a token, escaped or not: a line break for `\n`. A leading space may be lost."""
    spelled = isinstance(text, str) and (text in (token, unescaped(token)) or escaped(text) == token)
    return spelled or (token.startswith(" ") and _is_token(text, token[1:]))
