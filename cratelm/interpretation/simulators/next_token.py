"""The paper's simulator on servers that report the candidates of the next token only, such as llama.cpp.

The all-at-once prompt is cut behind the tab of each token, and the next token is requested: the same expectation as
the prompt logprobs give, one request per token. The requests about an excerpt follow each other, because each extends
the one before by a row, which a server that keeps prompts in its cache reads alone. Servers with slots keep one prompt
in each: as many excerpts are in progress.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cratelm.interpretation.llm import LLM, Prompt, PromptLogprobs
from cratelm.interpretation.simulators.all_at_once import AllAtOnce
from cratelm.interpretation.store.identities import SimulatorName

TENS = "".join(f" boat\t10\n{word}\t10\n" for word in ("the", " and", " of", " a")) + " boat\t"
"""A table of tens before the next one: a model that writes 10 as one token expects that token."""


@dataclass(slots=True)
class Chains:
    """Limits the excerpts in progress to the slots of a server; the limit belongs to the running event loop."""

    loop: asyncio.AbstractEventLoop | None = None
    places: asyncio.Semaphore | None = None

    def place(self, slots: int | None) -> contextlib.AbstractAsyncContextManager[None]:
        """A place for one excerpt; without known slots there is no limit."""
        if slots is None:
            return contextlib.nullcontext()
        if self.places is None or self.loop is not asyncio.get_running_loop():
            self.loop, self.places = asyncio.get_running_loop(), asyncio.Semaphore(slots)
        return self.places


@dataclass(frozen=True, kw_only=True, slots=True)
class NextToken(AllAtOnce):
    """Reads each activation of an excerpt from the candidates of the next token."""

    chains: Chains = field(default_factory=Chains)

    @property
    def name(self) -> SimulatorName:
        """Method, scale and model."""
        return self.read_out.name("next-token", self.llm.name)

    async def ask(self, prompts: Sequence[Prompt]) -> Sequence[PromptLogprobs]:
        """The candidates at every wanted place of each prompt, one request per place."""
        return await asyncio.gather(*map(self._ask_excerpt, prompts))

    async def _ask_excerpt(self, prompt: Prompt) -> PromptLogprobs:
        answers: dict[int, PromptLogprobs] = {}
        async with self.chains.place(self.llm.slots):
            for place in prompt.at or ():
                cut = replace(prompt, rest=prompt.rest[:place], at=(place,))
                (answers[place],) = await self.llm.prompt_logprobs([cut], top=self.read_out.candidates)
        return PromptLogprobs(
            tokens=(prompt.rest,), logprobs=np.array([np.nan]),
            candidates={
                place: answer.candidates[place] for place, answer in answers.items() if place in answer.candidates
            },
            prompt_tokens=sum(answer.prompt_tokens for answer in answers.values()),
        )  # fmt: skip


async def writes_ten_as_a_token(llm: LLM) -> bool:
    """Whether 10 is among the candidates of the next token after a table of tens."""
    prompt = Prompt(prefix="", rest=TENS, at=(len(TENS),))
    (answer,) = await llm.prompt_logprobs([prompt], top=15)
    return any(text.strip(" ") == "10" for text in answer.candidates.get(len(TENS), {}))
