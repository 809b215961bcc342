"""What a stage would ask a language model, counted from the prompts themselves, without asking.

The stage runs on some neurons with a model that counts and answers nothing; the others are taken to cost the same.
"""

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cratelm.interpretation.llm import LLM, LLMError, LLMWrapper, Message, Prompt, PromptLogprobs, Reply, Sampling
from cratelm.interpretation.prompts.explainer import TURN
from cratelm.interpretation.store.answer_cache import chat_hash, is_kept, prompt_logprobs_hash
from cratelm.interpretation.store.database import Store

COUNTED = 8
"""Neurons of a set whose prompts are counted; of a smaller one all are, and the numbers are exact."""


@dataclass(slots=True)
class Asked:
    """What was, or would be, asked of a language model."""

    calls: int = 0
    """Prompts to read and chats to answer."""
    read: int = 0
    """Tokens of all prompts."""
    computed: int = 0
    """Tokens left where a beginning that prompts of one neuron share is read once."""
    written: int = 0
    """Tokens of answers, at most."""
    kept: int = 0
    """Calls whose answers the cache has; they are not counted above."""
    again: int = 0
    """Calls that ask what another one of the plan asks too; they are not counted above."""

    def add(self, other: "Asked", times: float = 1.0) -> None:
        """Take in more, so many times."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + round(times * getattr(other, name)))


@dataclass(slots=True)
class CountingLLM(LLMWrapper):
    """Stands for a language model where only the cost of asking it is wanted."""

    inner: LLM
    store: Store
    """Where answers are kept that need not be asked for."""
    seen: set[str] = field(default_factory=set)
    """Hashes of what the plan asks; shared by all that count for it."""
    about: str = ""
    """What the answer to be asked about depends on, where that is not there yet and another text stands for it."""
    asked: Asked = field(default_factory=Asked)

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Count a chat. Its answer says nothing."""
        if not self._is_new(chat_hash(self.identity, messages, sampling)):
            return Reply(text="", finish="stop", prompt_tokens=0, new_tokens=0)
        read = sum(self.expected(message.text) + TURN for message in messages)
        self.asked.add(Asked(calls=1, read=read, computed=read, written=sampling.max_tokens))
        return Reply(text="", finish="stop", prompt_tokens=read, new_tokens=0)

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """Count prompts. Everywhere the model is taken to expect a 0."""
        new = [prompt for prompt in prompts if self._is_new(prompt_logprobs_hash(self.identity, prompt, top))]
        prefixes = {prefix: self.expected(prefix) for prefix in {prompt.prefix for prompt in new}}
        self.asked.computed += sum(prefixes.values())
        for prompt in new:
            rest = self.expected(prompt.rest)
            self.asked.add(Asked(calls=1, read=prefixes[prompt.prefix] + rest, computed=rest))
        return [_expecting_zero(prompt, top) for prompt in prompts]

    def _is_new(self, asked: str) -> bool:
        """Whether a question has no answer yet and nobody asked it before."""
        if not self.about and is_kept(self.store, asked):
            self.asked.kept += 1
            return False
        if f"{self.about} {asked}" in self.seen:
            self.asked.again += 1
            return False
        self.seen.add(f"{self.about} {asked}")
        return True


def _expecting_zero(prompt: Prompt, top: int) -> PromptLogprobs:
    return PromptLogprobs(
        tokens=(prompt.rest,), logprobs=np.array([np.nan]), candidates={at: {"0": 0.0} for at in prompt.at or () if top}
    )


async def estimated(
    llm: LLM, neurons: Sequence[int], ask: Callable[[CountingLLM, int], Awaitable[object]], store: Store, *,
    counted: int = COUNTED, seen: set[str] | None = None,
) -> Asked:  # fmt: skip
    """What asking about these neurons would cost: `ask` is what is done for one of them, with whatever model.

    What is in the cache of the store costs nothing, nor does what is `seen` already: it is asked once.
    """
    some = [neurons[i * len(neurons) // counted] for i in range(counted)] if len(neurons) > counted else list(neurons)
    counting = CountingLLM(llm, store, set() if seen is None else seen)
    for neuron in some:
        with contextlib.suppress(LLMError):  # of an answer that says nothing
            await ask(counting, neuron)
    total = Asked()
    if some:
        total.add(counting.asked, len(neurons) / len(some))
    return total
